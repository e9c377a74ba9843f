"""What tissue is drawn on and with: a mask with its distances, seeded noise, scattered points, nuclei, and two stains.

Shapes: H, W = rows and columns of the region in pixels, n = points or nuclei, k = pixels of the window that the largest
nucleus needs. Points are (n, 2) arrays of row and column.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy import ndimage

from counterstain.data.phantom.styles import SlideStyle
from counterstain.seeding import numpy_generator

Window = tuple[slice, slice]
_UNIT = 1.77  # cubic B-spline weights shrink white noise; this brings its spread back to about 1


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], scale_px: float, *, count: int = 1) -> np.ndarray:
    """Draw ``count`` fields of mean 0 and spread about 1, (count, H, W) float32.

    ``scale_px`` is the distance of the random knots; at 1 and below the noise is white.
    """
    if scale_px <= 1.0:
        return white_noise(rng, (count, *shape))
    knots = (count, int(shape[0] / scale_px) + 5, int(shape[1] / scale_px) + 5)
    rows, columns = (np.arange(n) / scale_px for n in shape)
    return upsample(white_noise(rng, knots) * np.float32(_UNIT), rows, columns)


def white_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw evenly spread noise of mean 0 and spread 1, float32; ten times as fast as normal noise."""
    return (rng.random(shape, dtype=np.float32) - np.float32(0.5)) * np.float32(np.sqrt(12))


def upsample(knots: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Evaluate cubic B-spline surfaces, (..., h, w) float32, on a grid, (..., H, W) float32.

    ``rows`` (H,) and ``columns`` (W,) are in knots from the second one, so that each place has two knots before it.
    """
    wide = _interpolate(np.moveaxis(knots, -1, 0), columns)  # (W, ..., h)
    whole = _interpolate(np.moveaxis(wide, (-1, 0), (0, -1)), rows)  # (H, ..., W)
    return np.moveaxis(whole, 0, -2)


def _interpolate(knots: np.ndarray, position: np.ndarray) -> np.ndarray:
    knots = np.ascontiguousarray(knots)
    first = position.astype(np.intp)
    t = (position - first).astype(np.float32).reshape(-1, *[1] * (knots.ndim - 1))
    square = t * t
    cube = t * square
    result = knots[first] * ((1 - 3 * t + 3 * square - cube) / 6)
    result += knots[first + 1] * ((4 - 6 * square + 3 * cube) / 6)
    result += knots[first + 2] * ((1 + 3 * t + 3 * square - 3 * cube) / 6)
    result += knots[first + 3] * (cube / 6)
    return np.asarray(result)


def scatter(
    rng: np.random.Generator, shape: tuple[int, int], spacing_px: float, *, jitter: float, margin_px: float = 0.0
) -> np.ndarray:
    """Draw the points of a hexagonal lattice that is turned, shifted and shaken at random, (n, 2) float.

    ``jitter`` is the largest displacement as a share of the spacing; points may lie ``margin_px`` beyond the edges.
    """
    height, width = shape
    reach = np.hypot(height, width) / 2 + margin_px + spacing_px
    count = int(np.ceil(reach / spacing_px * 2 / np.sqrt(3))) + 1
    steps = np.arange(-count, count + 1)
    draws = rng.random((2, len(steps), len(steps)))
    shift = rng.random(2)
    v = steps[:, None] * (np.sqrt(3) / 2) + jitter * (2 * draws[0] - 1) + shift[0]
    u = steps[None] + steps[:, None] % 2 / 2 + jitter * (2 * draws[1] - 1) + shift[1]
    angle = np.pi * rng.random()
    cos, sin = np.cos(angle) * spacing_px, np.sin(angle) * spacing_px
    y, x = (cos * v + sin * u).ravel() + height / 2, (cos * u - sin * v).ravel() + width / 2
    inside = (y >= -margin_px) & (x >= -margin_px) & (y < height + margin_px) & (x < width + margin_px)
    return np.stack([y[inside], x[inside]], axis=1)


def smoothstep(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return 0 below ``low``, 1 above ``high`` and a smooth rise between."""
    t = (values - low) * (1 / (high - low))
    t = np.minimum(np.maximum(t, 0), 1)
    return np.asarray(t * t * (3 - 2 * t))


def lookup(field: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the values of an (H, W, …) field at the pixels nearest to points, clamped to the edges."""
    nearest = (points + 0.5).astype(np.intp)
    nearest = np.minimum(np.maximum(nearest, 0), np.array(field.shape[:2]) - 1)
    return np.asarray(field[nearest[:, 0], nearest[:, 1]])


def level_angle(field: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the angle of the level lines of an (H, W) field at points, 0 = along a row."""
    down, right = np.array([2.0, 0.0]), np.array([0.0, 2.0])
    rows = lookup(field, points + down) - lookup(field, points - down)
    columns = lookup(field, points + right) - lookup(field, points - right)
    return np.asarray(np.arctan2(rows, columns) + np.pi / 2)


# Fields of smooth noise by their scale; those of one scale are drawn at once.
SCALES_UM = {
    50.0: ("long waves", "oedema", "staining", "aggregates", "vigour", "necrosis"),
    18.0: ("short waves", "slack", "clefts"),
    9.0: ("lumen outline", "streaks"),
    5.5: ("wobble y", "wobble x", "fragments"),
    1.5: ("grain",),
}
_SCALE_OF = {name: scale for scale, names in SCALES_UM.items() for name in names}
FAR_UM = 500.0  # distance where there is nothing to be distant from


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The mask of a region, its scale, its style and its seed."""

    labels: np.ndarray  # (H, W) uint8, 0 = background, 1..4 = HER2 0..3+, 5 = LCIS/DCIS
    instances: np.ndarray  # (H, W) integer
    style: SlideStyle
    seed: int
    mpp: float
    _fields: dict[float, np.ndarray] = field(default_factory=dict)  # those of a scale that are drawn already

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.labels.shape[0], self.labels.shape[1]

    @cached_property
    def depth_um(self) -> np.ndarray:
        """Distance of a pixel of a nest to its outline; the edges of the region are no outline. (H, W) float32."""
        inner, ids = self.labels != 0, self.instances
        inner[1:] &= ids[1:] == ids[:-1]
        inner[:, 1:] &= ids[:, 1:] == ids[:, :-1]
        return self._distance_um(inner)

    @cached_property
    def outside_um(self) -> np.ndarray:
        """Distance of a pixel of the background to the nearest nest, (H, W) float32."""
        return self._distance_um(self.labels == 0)

    def axes_um(self, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows (H, 1) and columns (1, W) as distances from an origin in pixels, float32."""
        y, x = ((np.arange(n) - zero) * self.mpp for n, zero in zip(self.shape, origin, strict=True))
        return y.astype(np.float32)[:, None], x.astype(np.float32)[None]

    def rng(self, name: str, *keys: int) -> np.random.Generator:
        """Return the generator for one thing that is drawn; it does not depend on labels."""
        return numpy_generator(self.seed, name, *keys)

    def noise(self, name: str) -> np.ndarray:
        """Return one of the fields of ``SCALES_UM``, mean 0 and spread about 1, (H, W) float32."""
        scale_um = _SCALE_OF[name]
        names = SCALES_UM[scale_um]
        if scale_um not in self._fields:
            rng = self.rng(names[0])
            self._fields[scale_um] = smooth_noise(rng, self.shape, scale_um / self.mpp, count=len(names))
        return np.asarray(self._fields[scale_um][names.index(name)])

    def scatter(self, rng: np.random.Generator, spacing_um: float, *, jitter: float, margin_um: float) -> np.ndarray:
        """Return points of a shaken lattice in pixels; see :func:`scatter`."""
        return scatter(rng, self.shape, spacing_um / self.mpp, jitter=jitter, margin_px=margin_um / self.mpp)

    def _distance_um(self, inside: np.ndarray) -> np.ndarray:
        if inside.all():
            return np.full(self.shape, FAR_UM, np.float32)
        distance_um = ndimage.distance_transform_edt(inside).astype(np.float32) * np.float32(self.mpp)
        return np.asarray(np.minimum(distance_um, FAR_UM))


@dataclass(frozen=True)
class Stains:
    """Amounts of the two stains in optical density, drawn upon in place."""

    haematoxylin: np.ndarray  # (H, W) float32
    dab: np.ndarray  # (H, W) float32

    def cover(self, coverage: np.ndarray, *, haematoxylin: np.ndarray | float, dab: np.ndarray | float) -> None:
        """Lay something over what is there; ``coverage`` 1 hides it, 0 leaves it."""
        self.haematoxylin[...] += coverage * (haematoxylin - self.haematoxylin)
        self.dab[...] += coverage * (dab - self.dab)


@dataclass(frozen=True, kw_only=True)
class Nuclei:
    """Nuclei of one kind, one entry each."""

    points: np.ndarray  # (n, 2) rows and columns in pixels
    radius_um: np.ndarray  # (n,), of a circle of the same area
    stretch: np.ndarray  # (n,), long axis over short axis
    angle: np.ndarray  # (n,), of the long axis, 0 = along a row
    amount: np.ndarray  # (n,), haematoxylin in optical density
    lumps: np.ndarray  # (n, 2), amplitudes of the outline's waves
    rim: float = 0.3  # how much darker the rim is than the middle

    def chosen(self, keep: np.ndarray) -> Nuclei:
        """Return the nuclei that a mask or an index picks."""
        names = ("points", "radius_um", "stretch", "angle", "amount", "lumps")
        return Nuclei(**{name: getattr(self, name)[keep] for name in names}, rim=self.rim)


def make_nuclei(
    rng: np.random.Generator,
    points: np.ndarray,
    *,
    radius_um: float,
    spread: float,
    amount: float,
    stretch: tuple[float, float] = (1.0, 1.5),
    angle: np.ndarray | None = None,
    lumpiness: float = 0.06,
    rim: float = 0.3,
) -> Nuclei:
    """Draw nuclei about a typical size; ``spread`` is that of the logarithm of the radius."""
    n = len(points)
    return Nuclei(
        points=points,
        radius_um=radius_um * np.exp(spread * np.clip(rng.standard_normal(n), -2, 2)),
        stretch=rng.uniform(*stretch, n),
        angle=rng.uniform(0, np.pi, n) if angle is None else angle + rng.normal(0, 0.15, n),
        amount=amount * np.exp(rng.normal(0, 0.18, n)),
        lumps=rng.normal(0, lumpiness, (n, 2)),
        rim=rim,
    )


def stamp(nuclei: Nuclei, shape: tuple[int, int], mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw nuclei: coverage, 0..1, and haematoxylin in optical density, (H, W) float32 each; the stronger shows."""
    coverage, amount = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    if not len(nuclei.points):
        return coverage, amount
    reach = int(np.ceil(float((nuclei.radius_um * np.sqrt(nuclei.stretch)).max()) * 1.15 / mpp)) + 1
    window = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)  # (2, k)
    nearest = np.rint(nuclei.points).astype(np.int32)
    y, x = (nearest[:, i, None] + window[i].astype(np.int32) for i in (0, 1))  # (n, k)
    rho = _radii(nuclei, y, x, mpp)
    softness = np.maximum(mpp, 0.7) / nuclei.radius_um[:, None].astype(np.float32)
    inside = np.clip((1 - rho) / softness + 0.5, 0, 1)
    shade = 1 - nuclei.rim / 2 + nuclei.rim * np.exp(-(((rho - 0.85) / 0.2) ** 2))
    hit = (inside > 0) & (y >= 0) & (x >= 0) & (y < shape[0]) & (x < shape[1])
    flat = (y * shape[1] + x)[hit]
    np.maximum.at(coverage.reshape(-1), flat, inside[hit])
    np.maximum.at(amount.reshape(-1), flat, (inside * shade * nuclei.amount[:, None].astype(np.float32))[hit])
    return coverage, amount


def _radii(nuclei: Nuclei, y: np.ndarray, x: np.ndarray, mpp: float) -> np.ndarray:
    """Return the distance of window pixels to the middle in units of the radius there, (n, k) float32."""
    points = nuclei.points.astype(np.float32)
    dy, dx = ((of_pixel - points[:, i, None]) * np.float32(mpp) for i, of_pixel in enumerate((y, x)))
    cos, sin = (f(nuclei.angle)[:, None].astype(np.float32) for f in (np.cos, np.sin))
    axis = np.sqrt(nuclei.stretch)[:, None].astype(np.float32)
    u, v = (cos * dx + sin * dy) / axis, (cos * dy - sin * dx) * axis
    square = u * u + v * v + np.float32(1e-6)
    r = np.sqrt(square)
    lumps, radius = nuclei.lumps.astype(np.float32), nuclei.radius_um[:, None].astype(np.float32)
    waves = ((3 * u * u - v * v) * v / r * lumps[:, :1] + 2 * u * v * lumps[:, 1:]) / square
    return np.asarray(r / radius * (1 + waves))
