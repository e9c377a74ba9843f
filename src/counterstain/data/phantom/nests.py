"""Tumour nests and ducts: cells, their nuclei, and membranes whose DAB follows the subtype.

Positions, sizes and nuclei follow from instances and seed alone; the label decides how membranes stain and whether a
nest has the lumina and the rim of a duct. Shapes: n = nuclei or cells, p = pixels of nests, k = pixels of the window
that the largest nucleus needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from counterstain.data.phantom.canvas import Canvas, Stains, level_angle, lookup, smoothstep
from counterstain.data.phantom.layout import DUCT
from counterstain.seeding import numpy_generator


@dataclass(frozen=True, kw_only=True)
class Nuclei:
    """Nuclei of one kind."""

    points: np.ndarray  # (n, 2) rows and columns in pixels
    radius_um: np.ndarray  # (n,), of a circle of the same area
    stretch: np.ndarray  # (n,), long axis over short axis
    angle: np.ndarray  # (n,), of the long axis, 0 = along a row
    amount: np.ndarray  # (n,), haematoxylin in optical density
    lumps: np.ndarray  # (n, 2), amplitudes of the outline's waves
    rim: float = 0.3
    """How much darker the rim is than the middle."""

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


# By HER2 score 0, 1+, 2+, 3+; values between scores (hidden scores of ducts) are interpolated.
SCORES = (0.0, 1.0, 2.0, 3.0)
MEMBRANE_DAB = (0.0, 0.26, 0.58, 1.35)  # optical density at the middle of the membrane
MEMBRANE_WIDTH_UM = (0.7, 0.75, 1.0, 1.6)
COMPLETE_SHARE = (0.0, 0.45, 0.86, 1.0)  # of a cell's circumference
CYTOPLASM_DAB = (0.0, 0.035, 0.10, 0.27)
STAINED_CELLS = (0.0, 0.75, 0.96, 1.0)
DARK_SHARE = 0.03  # of nuclei are mitotic or shrunken
DUCT_SCORES = (1.0, 1.6, 2.2, 2.7, 3.0)  # DCIS is HER2-positive more often than not


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Tumour cells."""

    points: np.ndarray  # (n, 2) rows and columns in pixels
    labels: np.ndarray  # (n,) label of the nest
    instances: np.ndarray  # (n,)
    score: np.ndarray  # (n,) 0..3, for ducts hidden and continuous


@dataclass(frozen=True, kw_only=True)
class Bodies:
    """Pixels of nests and the cell that each belongs to."""

    where: tuple[np.ndarray, ...]  # rows and columns, (p,) each
    cell: np.ndarray  # (p,) index into Cells
    margin_um: np.ndarray  # (p,) distance to the cell's own membrane, negative outside of all cells


def draw_nests(canvas: Canvas, stains: Stains) -> np.ndarray:
    """Draw all nests; return where there is room for stroma cells, (H, W) bool."""
    if not canvas.labels.any():
        return np.ones(canvas.shape, bool)
    cells = place_cells(canvas)
    lumen = _lumina(canvas)
    bodies = _bodies(canvas, cells)
    body, membrane = _draw_bodies(canvas, stains, cells, bodies)
    _draw_nuclei(canvas, stains, cells, body, lumen)
    _draw_lumina(canvas, stains, lumen)
    _draw_rim(canvas, stains)
    return (body < 0.2) & (lumen < 0.2) & (membrane < 0.05)


def place_cells(canvas: Canvas) -> Cells:
    """Place cells on a shaken lattice, a little inside the outlines; every nest has one at least."""
    size = canvas.style.cell_size_um
    points = canvas.scatter(canvas.rng("cells"), size, jitter=0.3, margin_um=size)
    slack = 0.8 + 0.8 * np.abs(lookup(canvas.noise("slack"), points))
    keep = (lookup(canvas.labels, points) > 0) & (lookup(canvas.depth_um, points) > 0.48 * size + slack)
    points = points[keep]
    points = np.concatenate([points, _centres_of_empty(canvas, lookup(canvas.instances, points))])
    labels, instances = lookup(canvas.labels, points), lookup(canvas.instances, points)
    return Cells(points=points, labels=labels, instances=instances, score=_scores(canvas, labels, instances))


def _centres_of_empty(canvas: Canvas, filled: np.ndarray) -> np.ndarray:
    """Return the deepest pixels of the instances that are too slight for the lattice, (m, 2)."""
    ids = np.unique(canvas.instances[canvas.labels > 0])
    empty = np.setdiff1d(ids, filled)
    if not len(empty):
        return np.zeros((0, 2))
    return np.array(ndimage.maximum_position(canvas.depth_um, canvas.instances, empty), float).reshape(-1, 2)


def _scores(canvas: Canvas, labels: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Return the HER2 score of every cell; that of a duct is drawn for the instance, (n,) float."""
    scores = labels.astype(float) - 1
    for duct in np.unique(instances[labels == DUCT]).tolist():
        rng = numpy_generator(canvas.seed, "hidden score", duct)
        scores[(instances == duct) & (labels == DUCT)] = rng.choice(DUCT_SCORES) - rng.uniform(0, 0.4)
    return scores


def _bodies(canvas: Canvas, cells: Cells) -> Bodies:
    """Find the cell of every pixel and the distance to its membrane: half-planes between neighbours (Voronoi)."""
    where = np.nonzero(canvas.labels)
    size_px = canvas.style.cell_size_um / canvas.mpp
    near = _near_cells(canvas.shape, where, cells.points, block_px=max(1, int(0.3 * size_px)))  # (k, p)
    wobble = (canvas.noise(f"wobble {axis}")[where] * np.float32(0.8 / canvas.mpp) for axis in "yx")
    y, x = (pixels.astype(np.float32) + shift for pixels, shift in zip(where, wobble, strict=True))
    cell_y, cell_x = (column.astype(np.float32)[near] for column in cells.points.T)  # (k, p)
    square = np.square(cell_y - y) + np.square(cell_x - x)
    nearest = np.argmin(square, axis=0)[None]
    own_y, own_x, own_square, own = (np.take_along_axis(a, nearest, axis=0) for a in (cell_y, cell_x, square, near))
    between = np.sqrt(np.square(cell_y - own_y) + np.square(cell_x - own_x))
    to_membrane = np.where(between > 0, (square - own_square) / np.maximum(2 * between, 1e-3), np.inf).min(axis=0)
    to_outside = np.float32(0.62 * size_px) - np.sqrt(own_square[0])
    margin_um = np.minimum(to_membrane, to_outside) * np.float32(canvas.mpp)
    margin_um = np.minimum(margin_um, canvas.depth_um[where] - np.float32(1.2))  # no cell crosses its nest's outline
    return Bodies(where=where, cell=own[0], margin_um=margin_um)


def _near_cells(
    shape: tuple[int, int], where: tuple[np.ndarray, ...], points: np.ndarray, *, block_px: int
) -> np.ndarray:
    """Return the few cells nearest to the block of pixels that each pixel lies in, (k, p)."""
    y, x = (axis // block_px for axis in where)
    needed = np.zeros((shape[0] // block_px + 1, shape[1] // block_px + 1), np.int32)
    needed[y, x] = 1
    blocks = np.stack(np.nonzero(needed), axis=1)
    needed[needed > 0] = np.arange(len(blocks))
    k = min(6, len(points))
    _, near = cKDTree(points).query(blocks * block_px + (block_px - 1) / 2, k=k)
    return np.asarray(near.reshape(len(blocks), k).T[:, needed[y, x]])


def _draw_bodies(canvas: Canvas, stains: Stains, cells: Cells, bodies: Bodies) -> tuple[np.ndarray, np.ndarray]:
    """Draw cytoplasm and membranes; return their coverage, (H, W) float32 each."""
    blur_um = 0.45 * canvas.mpp
    inside = smoothstep(bodies.margin_um, -0.6 * canvas.mpp, 0.6 * canvas.mpp).astype(np.float32)
    rng = canvas.rng("membranes")
    count = len(cells.points)
    vigour = np.exp(0.22 * rng.standard_normal(count)) * np.exp(0.2 * lookup(canvas.noise("vigour"), cells.points))
    stained = rng.random(count) < np.interp(cells.score, SCORES, STAINED_CELLS)
    strength = canvas.style.dab_strength * vigour * stained
    of_pixel = bodies.cell
    score = cells.score[of_pixel]
    width = np.interp(score, SCORES, MEMBRANE_WIDTH_UM)
    profile = np.exp(-np.square(bodies.margin_um) / (width**2 + blur_um**2)) * width / np.hypot(width, blur_um)
    broken = canvas.noise("fragments")[bodies.where]
    complete = np.interp(score, SCORES, COMPLETE_SHARE)
    present = smoothstep(broken - _gap_threshold(complete), -0.35, 0.35)
    membrane = np.interp(score, SCORES, MEMBRANE_DAB) * profile * present * strength[of_pixel]
    granular = 1 + 0.3 * canvas.noise("grain")[bodies.where]
    cytoplasm = np.interp(score, SCORES, CYTOPLASM_DAB) * strength[of_pixel] * granular
    counter = canvas.style.cytoplasm * granular * (1 - 0.3 * profile)
    body, shown = np.zeros(canvas.shape, np.float32), np.zeros(canvas.shape, np.float32)
    body[bodies.where] = inside
    shown[bodies.where] = membrane
    haematoxylin, dab = np.zeros(canvas.shape, np.float32), np.zeros(canvas.shape, np.float32)
    haematoxylin[bodies.where] = counter
    dab[bodies.where] = cytoplasm + 0.6 * canvas.style.dab_background
    _draw_clefts(canvas, stains)
    stains.cover(body, haematoxylin=haematoxylin, dab=dab)
    stains.dab[...] += shown
    return body, shown


def _draw_clefts(canvas: Canvas, stains: Stains) -> None:
    """Draw the gaps that open where a nest shrinks away from the stroma."""
    open_here = smoothstep(canvas.noise("clefts") - 1.6 + 2 * min(canvas.style.clefts, 1.5), -0.2, 0.6)
    along = smoothstep(canvas.depth_um, 0.5, 2.0)
    stains.cover((0.9 * open_here * along).astype(np.float32), haematoxylin=0.01, dab=0.3 * canvas.style.dab_background)


def _gap_threshold(complete: np.ndarray) -> np.ndarray:
    """Return above which value of unit noise a membrane must appear so that ``complete`` of it does."""
    return np.asarray(np.interp(complete, (0.0, 0.16, 0.5, 0.84, 0.98, 1.0), (3.0, 1.0, 0.0, -1.0, -2.2, -9.0)))


def _draw_nuclei(canvas: Canvas, stains: Stains, cells: Cells, body: np.ndarray, lumen: np.ndarray) -> None:
    nuclei = _tumour_nuclei(canvas, cells)
    coverage, amount = stamp(nuclei, canvas.shape, canvas.mpp)
    coverage *= body * (1 - lumen)
    chromatin = 1 + 0.18 * canvas.noise("grain") * (0.5 + canvas.style.nucleoli)
    stains.cover(coverage, haematoxylin=amount * chromatin, dab=stains.dab * np.float32(0.35))
    spots, spot_amount = stamp(_nucleoli(canvas, nuclei), canvas.shape, canvas.mpp)
    stains.haematoxylin[...] += spots * coverage * spot_amount


def _tumour_nuclei(canvas: Canvas, cells: Cells) -> Nuclei:
    style = canvas.style
    rng = canvas.rng("tumour nuclei")
    offset = rng.normal(0, 0.07 * style.cell_size_um / canvas.mpp, cells.points.shape)
    nuclei = make_nuclei(
        rng,
        cells.points + offset,
        radius_um=style.nucleus_share * style.cell_size_um,
        spread=style.pleomorphism,
        amount=0.42,
        stretch=(1.0, 1.0 + 3 * style.pleomorphism),
        lumpiness=0.35 * style.pleomorphism,
        rim=0.5,
    )
    dark = rng.random(len(cells.points)) < DARK_SHARE
    return replace(
        nuclei,
        amount=nuclei.amount * np.where(dark, 1.9, 1.0),
        radius_um=nuclei.radius_um * np.where(dark, 0.75, 1.0),
    )


def _nucleoli(canvas: Canvas, nuclei: Nuclei) -> Nuclei:
    rng = canvas.rng("nucleoli")
    count = len(nuclei.points)
    offset = rng.uniform(-0.4, 0.4, (count, 2)) * nuclei.radius_um[:, None] / canvas.mpp
    shown = rng.random(count) < 0.8
    spots = make_nuclei(
        rng, nuclei.points + offset, radius_um=1.0, spread=0.25, amount=0.35 * canvas.style.nucleoli, rim=0.0
    )
    return spots.chosen(shown)


def _lumina(canvas: Canvas) -> np.ndarray:
    """Return where ducts are hollow, (H, W) float32: round spaces far enough from the outline."""
    lumen = np.zeros(canvas.shape, np.float32)
    ducts = canvas.labels == DUCT
    if not ducts.any():
        return lumen
    rng = canvas.rng("lumina")
    centres = canvas.scatter(rng, 34.0, jitter=0.3, margin_um=16.0)
    radii = rng.uniform(5.0, 15.0, len(centres))
    open_um = np.minimum(radii, lookup(canvas.depth_um, centres) - 10.0)
    keep = (lookup(canvas.labels, centres) == DUCT) & (open_um > 3.5)
    if not keep.any():
        return lumen
    where = np.nonzero(ducts & (canvas.depth_um > 8.0))
    distance, nearest = cKDTree(centres[keep]).query(np.stack(where, axis=1))
    wavy = 1 + 0.22 * canvas.noise("lumen outline")[where]
    lumen[where] = smoothstep(open_um[keep][nearest] * wavy - distance * canvas.mpp, -0.7, 0.7)
    return lumen


def _draw_lumina(canvas: Canvas, stains: Stains, lumen: np.ndarray) -> None:
    if not lumen.any():
        return
    debris = smoothstep(canvas.noise("necrosis"), 0.0, 0.6) * smoothstep(canvas.noise("grain"), -0.5, 1.5)
    stains.cover(lumen, haematoxylin=0.01 + 0.22 * debris, dab=0.5 * canvas.style.dab_background + 0.12 * debris)


def _draw_rim(canvas: Canvas, stains: Stains) -> None:
    """Draw the myoepithelium of ducts: flat dark nuclei along the outline."""
    if not (canvas.labels == DUCT).any():
        return
    rng = canvas.rng("rim")
    points = canvas.scatter(rng, 5.0, jitter=0.4, margin_um=4.0)
    depth = lookup(canvas.depth_um, points)
    points = points[(lookup(canvas.labels, points) == DUCT) & (depth > 1.0) & (depth < 4.0)]
    angle = level_angle(canvas.depth_um, points)
    nuclei = make_nuclei(rng, points, radius_um=2.2, spread=0.15, amount=0.62, stretch=(2.0, 3.5), angle=angle)
    coverage, amount = stamp(nuclei, canvas.shape, canvas.mpp)
    membrane = 0.12 * np.exp(-np.square(canvas.depth_um - np.float32(1.2))) * (canvas.labels == DUCT)
    stains.haematoxylin[...] += membrane
    stains.cover(coverage, haematoxylin=amount, dab=stains.dab * np.float32(0.6))
