"""Stains of an image: their colours, which ones a cohort shows, unmixing, and random changes of their strength.

Shapes: H, W = rows and columns in pixels. Optical density is the natural logarithm of white over the grey level.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from counterstain.errors import ConfigError

if TYPE_CHECKING:
    from counterstain.data.cohort import Cohort
    from counterstain.data.patches import Patch

Stains = Literal["channels", "dab", "eosin", "macenko"]
Stain = Literal["dab", "eosin"]  # beside haematoxylin
# Optical density of red, green and blue of the pure stains (Ruifrok & Johnston 2001).
STAIN_VECTORS = {"haematoxylin": (0.65, 0.70, 0.29), "dab": (0.27, 0.57, 0.78), "eosin": (0.07, 0.99, 0.11)}
STAINED_DENSITY = 0.15  # beta of Macenko et al. 2009: less is background
ANGLES_PERCENT = (1, 99)  # alpha of Macenko et al. 2009
FEWEST_PIXELS = 64
SMALLEST_ANGLE = np.deg2rad(5)  # nearer colours cannot be told apart

LOOKED_AT, WINDOW_PX = 12, 256  # instances of each subtype, and the edge of what is looked at around each
COLOURED = 0.25  # length of the optical density from which a pixel has a colour
MARGIN = 0.15  # by which eosin absorbs more green than anything else, of a density of length 1
MOSTLY_PINK, HARDLY_PINK, SOME_BROWN = 0.5, 0.25, 0.02  # shares of coloured pixels; H&E 0.85, H-DAB 0.00 to 0.08 pink

_DENSITY = -np.log(np.maximum(np.arange(256), 1) / 255).astype(np.float32)  # (256,) of every grey level


def jitter_stains(image: np.ndarray, stains: Stains, sd: float, rng: np.random.Generator) -> np.ndarray:
    """Scale and shift the optical density of each stain, at random, once for the whole image, (H, W, 3) uint8.

    What is changed is each colour channel; or haematoxylin and DAB or eosin (the residual is kept); or two stains whose
    colours are estimated from the image, each channel where there are no two. ``sd`` is the standard deviation of the
    factor (around 1) and of the offset (around 0).
    """
    vectors = None
    if stains != "channels":
        vectors = macenko_vectors(image) if stains == "macenko" else _pure(stains)
    if vectors is None:
        return _jitter_channels(image, sd, rng)
    basis = _with_residual(vectors)
    factor, offset = sd * rng.standard_normal((2, 2))
    change = np.linalg.inv(basis) @ np.diag([*(1 + factor), 1.0]) @ basis
    shift = np.array([*offset, 0.0]) @ basis
    changed = _DENSITY[image] @ change.astype(np.float32) + shift.astype(np.float32)
    return np.asarray(np.clip(np.rint(255 * np.exp(-changed)), 0, 255).astype(np.uint8))


def unmixing(other: Stain) -> np.ndarray:
    """Return the matrix that turns optical density into amounts of stains (Ruifrok & Johnston 2001), (3, 3) float.

    ``density @ unmixing(other)`` has the amounts of haematoxylin, of the other stain and of the residual at a right
    angle to both; negative where a colour lies outside.
    """
    return np.asarray(np.linalg.inv(_with_residual(_pure(other))))


def amounts(image: np.ndarray, other: Stain) -> tuple[np.ndarray, np.ndarray]:
    """Return the amounts of haematoxylin and of the other stain in an image, (H, W, 3) uint8, as (H, W) float32."""
    found = _DENSITY[image] @ unmixing(other)[:, :2].astype(np.float32)
    return found[..., 0], found[..., 1]


def macenko_vectors(image: np.ndarray) -> np.ndarray | None:
    """Read the colours of two stains off an image (Macenko et al., ISBI 2009).

    Returns unit vectors of optical density, (2, 3) float, the bluer (redder-absorbing) stain first; None where too few
    pixels are stained or all have one colour.
    """
    density = _DENSITY[image].reshape(-1, 3).astype(np.float64)
    stained = density[(density > STAINED_DENSITY).all(axis=1)]
    if len(stained) < FEWEST_PIXELS:
        return None
    _, axes = np.linalg.eigh(np.cov(stained, rowvar=False))
    plane = axes[:, [2, 1]] * np.where(axes[:, [2, 1]].sum(axis=0) < 0, -1, 1)  # (3, 2), pointing to more density
    on_plane = stained @ plane
    low, high = np.percentile(np.arctan2(on_plane[:, 1], on_plane[:, 0]), ANGLES_PERCENT)
    if high - low < SMALLEST_ANGLE:
        return None
    vectors = np.array([[np.cos(angle), np.sin(angle)] for angle in (low, high)]) @ plane.T
    return np.asarray(vectors[np.argsort(-vectors[:, 0], kind="stable")])


class StainShares(NamedTuple):
    """Shares of the coloured pixels of images, 0 to 1."""

    brown: float
    pink: float

    @property
    def stain(self) -> Literal["dab", "eosin"] | None:
        """The stain beside haematoxylin; None where the colours do not tell."""
        if self.pink >= MOSTLY_PINK:
            return "eosin"
        return "dab" if self.pink < HARDLY_PINK and self.brown >= SOME_BROWN else None


def stain_shares(images: Iterable[np.ndarray]) -> StainShares:
    """Measure how much of images, (H, W, 3) uint8, is brown, as DAB is, and how much pink, as eosin is.

    Brown absorbs blue most, pink clearly absorbs green most.
    """
    total = brown = pink = 0
    for image in images:
        density = _DENSITY[image].reshape(-1, 3)
        length = np.linalg.norm(density, axis=1)
        red, green, blue = (density[length > COLOURED] / length[length > COLOURED, None]).T
        total += len(red)
        brown += int(((blue > green) & (blue > red)).sum())
        pink += int(((green > blue + MARGIN) & (green > red + MARGIN)).sum())
    return StainShares(brown / max(total, 1), pink / max(total, 1))


def stained_windows(cohort: Cohort) -> list[Patch]:
    """Cut windows of at most 256 px around a dozen instances of each subtype, from as many regions as there are."""
    edges = cohort.regions[["height_px", "width_px"]].to_numpy().tolist()
    position_of = {region: i for i, region in enumerate(cohort.regions["region"])}
    windows = []
    for _, of_subtype in cohort.instances.groupby("subtype"):
        turns = of_subtype.groupby("region").cumcount()
        rows = of_subtype.iloc[np.argsort(turns, kind="stable")[: max(LOOKED_AT, int((turns == 0).sum()))]]
        chosen = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, LOOKED_AT).astype(int))]
        for region, *box in chosen[["region", "y0", "x0", "y1", "x1"]].to_numpy().tolist():
            whole = edges[position_of[region]]
            size = [min(WINDOW_PX, edge) for edge in whole]
            middle = [(box[0] + box[2]) // 2, (box[1] + box[3]) // 2]
            place = [min(max(middle[k] - size[k] // 2, 0), whole[k] - size[k]) for k in (0, 1)]
            windows.append(cohort.cut(position_of[region], place[0], place[1], size[0], size[1]))
    return windows


def named_stains(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the keys of settings in use that say what haematoxylin is unmixed from, each with what it says."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from named_stains(value, f"{prefix}{key}.")
        elif key == "other_stain" or (key == "stains" and settings.get("stain_jitter")):
            yield f"{prefix}{key}", str(value)


def check_stains(cohort: Cohort, named: Iterable[tuple[str, str]]) -> None:
    """Raise ConfigError where a setting names DAB and the cohort clearly shows eosin, or the other way round."""
    wanted = {key: stain for key, stain in named if stain in {"dab", "eosin"}}
    if not wanted:
        return
    shown = stain_shares(patch.image for patch in stained_windows(cohort))
    for key, stain in wanted.items():
        if shown.stain not in {None, stain}:
            raise ConfigError(
                f"{key}: {stain}, but {cohort.folder} is stained with haematoxylin and "
                f"{'eosin' if shown.stain == 'eosin' else 'DAB'}, as far as colours tell ({shown.pink:.0%} of its "
                f"coloured pixels are pink, {shown.brown:.0%} brown); set {key}={shown.stain}"
            )


def _pure(other: str) -> np.ndarray:
    vectors = np.array([STAIN_VECTORS["haematoxylin"], STAIN_VECTORS[other]])
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _with_residual(vectors: np.ndarray) -> np.ndarray:
    residual = np.cross(*vectors)
    return np.stack([*vectors, residual / np.linalg.norm(residual)])


def _jitter_channels(image: np.ndarray, sd: float, rng: np.random.Generator) -> np.ndarray:
    density = -np.log(np.maximum(np.arange(256), 1) / 255)
    factor, offset = sd * rng.standard_normal((2, 3, 1))
    curves = 255 * np.exp(-(density * (1 + factor) + offset))
    lookup = np.minimum(np.rint(curves), 255).astype(np.uint8)  # (3, 256)
    jittered = np.empty_like(image)
    for channel in range(3):
        jittered[..., channel] = lookup[channel][image[..., channel]]
    return jittered
