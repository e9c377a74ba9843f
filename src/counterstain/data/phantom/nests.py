"""Tumour nests and ducts: where they lie, their cells and nuclei, and membranes whose DAB follows the subtype.

Outlines are drawn on a coarse grid as signed distances and evaluated as smooth surfaces, so that they are as rounded as
an annotator's polygons at any resolution. Positions, sizes and nuclei follow from instances and seed alone; the label
decides how membranes stain and whether a nest has the lumina and the rim of a duct. Shapes: H, W = rows and columns of
the region, h, w = of the coarse grid, n = cells, p = pixels of nests, k = cells near a pixel.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from counterstain.data.phantom.canvas import (
    Canvas,
    Nuclei,
    Stains,
    Window,
    level_angle,
    lookup,
    make_nuclei,
    smooth_noise,
    smoothstep,
    stamp,
    upsample,
)
from counterstain.data.phantom.styles import SlideStyle
from counterstain.seeding import numpy_generator

DUCT = 5  # LCIS/DCIS in the taxonomy her2; 1..4 are HER2 0..3+
STEP_UM = 4.0  # of the coarse grid
GAP_UM = 9.0  # stroma between nests
TOUCHING_SHARE = 0.12  # nests that grow against their neighbours
SMALLEST_UM2 = 500.0
ATTEMPTS_PER_MM2 = 900

# By HER2 score 0, 1+, 2+, 3+; values between scores (hidden scores of ducts) are interpolated.
SCORES = (0.0, 1.0, 2.0, 3.0)
MEMBRANE_DAB = (0.0, 0.26, 0.58, 1.35)  # optical density at the middle of the membrane
MEMBRANE_WIDTH_UM = (0.7, 0.75, 1.0, 1.6)
COMPLETE_SHARE = (0.0, 0.45, 0.86, 1.0)  # of a cell's circumference
PRESENT_ABOVE = (0.0, 0.16, 0.5, 0.84, 0.98, 1.0), (3.0, 1.0, 0.0, -1.0, -2.2, -9.0)  # that share -> value of the noise
CYTOPLASM_DAB = (0.0, 0.035, 0.10, 0.27)
STAINED_CELLS = (0.0, 0.75, 0.96, 1.0)
DARK_SHARE = 0.03  # of nuclei are mitotic or shrunken
DUCT_SCORES = (1.0, 1.6, 2.2, 2.7, 3.0)  # DCIS is HER2-positive more often than not


def draw_nests(canvas: Canvas, stains: Stains) -> np.ndarray:
    """Draw all nests; return where there is room for stroma cells, (H, W) bool."""
    if not canvas.labels.any():
        return np.ones(canvas.shape, bool)
    cells, lumen = _place_cells(canvas), _lumina(canvas)
    body, membrane = _draw_bodies(canvas, stains, cells)
    _draw_nuclei(canvas, stains, cells, body, lumen)
    if lumen.any():
        debris = smoothstep(canvas.noise("necrosis"), 0.0, 0.6) * smoothstep(canvas.noise("grain"), -0.5, 1.5)
        stains.cover(lumen, haematoxylin=0.01 + 0.22 * debris, dab=0.5 * canvas.style.dab_background + 0.12 * debris)
    _draw_rim(canvas, stains)
    return (body < 0.2) & (lumen < 0.2) & (membrane < 0.05)


def _place_cells(canvas: Canvas) -> np.ndarray:
    """Place cells on a shaken lattice, a little inside the outlines, (n, 2); every nest has one at least."""
    size = canvas.style.cell_size_um
    points = canvas.scatter(canvas.rng("cells"), size, jitter=0.3, margin_um=size)
    slack = 0.8 + 0.8 * np.abs(lookup(canvas.noise("slack"), points))
    points = points[(lookup(canvas.labels, points) > 0) & (lookup(canvas.depth_um, points) > 0.48 * size + slack)]
    empty = np.setdiff1d(canvas.instances[canvas.labels > 0], lookup(canvas.instances, points))
    deepest = ndimage.maximum_position(canvas.depth_um, canvas.instances, empty) if len(empty) else []
    return np.concatenate([points, np.array(deepest, float).reshape(-1, 2)])


def _scores(canvas: Canvas, cells: np.ndarray) -> np.ndarray:
    """Return the HER2 score of every cell, (n,) float; that of a duct is continuous and drawn for the instance."""
    labels, instances = lookup(canvas.labels, cells), lookup(canvas.instances, cells)
    scores = labels.astype(float) - 1
    for duct in np.unique(instances[labels == DUCT]).tolist():
        rng = numpy_generator(canvas.seed, "hidden score", duct)
        scores[(instances == duct) & (labels == DUCT)] = rng.choice(DUCT_SCORES) - rng.uniform(0, 0.4)
    return scores


def _bodies(canvas: Canvas, cells: np.ndarray, where: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Find the cell of every pixel of nests, (p,), and the distance to its membrane in micrometres, (p,) float32.

    Membranes are half-planes between neighbours (Voronoi); the distance is negative outside of all cells.
    """
    size_px = canvas.style.cell_size_um / canvas.mpp
    near = _near_cells(canvas.shape, where, cells, block_px=max(1, int(0.3 * size_px)))  # (k, p)
    wobble = (canvas.noise(f"wobble {axis}")[where] * np.float32(0.8 / canvas.mpp) for axis in "yx")
    y, x = (pixels.astype(np.float32) + shift for pixels, shift in zip(where, wobble, strict=True))
    cell_y, cell_x = (column.astype(np.float32)[near] for column in cells.T)  # (k, p)
    square = np.square(cell_y - y) + np.square(cell_x - x)
    nearest = np.argmin(square, axis=0)[None]
    own_y, own_x, own_square, own = (np.take_along_axis(a, nearest, axis=0) for a in (cell_y, cell_x, square, near))
    between = np.sqrt(np.square(cell_y - own_y) + np.square(cell_x - own_x))
    to_membrane = np.where(between > 0, (square - own_square) / np.maximum(2 * between, 1e-3), np.inf).min(axis=0)
    to_outside = np.float32(0.62 * size_px) - np.sqrt(own_square[0])
    margin_um = np.minimum(to_membrane, to_outside) * np.float32(canvas.mpp)
    return own[0], np.minimum(margin_um, canvas.depth_um[where] - np.float32(1.2))  # cells do not cross the outline


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


def _draw_bodies(canvas: Canvas, stains: Stains, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw cytoplasm and membranes; return their coverage, (H, W) float32 each."""
    where, scores = np.nonzero(canvas.labels), _scores(canvas, cells)
    cell, margin_um = _bodies(canvas, cells, where)
    blur_um = 0.45 * canvas.mpp
    rng, count = canvas.rng("membranes"), len(cells)
    vigour = np.exp(0.22 * rng.standard_normal(count)) * np.exp(0.2 * lookup(canvas.noise("vigour"), cells))
    stained = rng.random(count) < np.interp(scores, SCORES, STAINED_CELLS)
    strength = canvas.style.dab_strength * vigour * stained
    score, strength = scores[cell], strength[cell]
    width = np.interp(score, SCORES, MEMBRANE_WIDTH_UM)
    profile = np.exp(-np.square(margin_um) / (width**2 + blur_um**2)) * width / np.hypot(width, blur_um)
    gap_threshold = np.interp(np.interp(score, SCORES, COMPLETE_SHARE), *PRESENT_ABOVE)
    present = smoothstep(canvas.noise("fragments")[where] - gap_threshold, -0.35, 0.35)
    membrane = np.interp(score, SCORES, MEMBRANE_DAB) * profile * present * strength
    granular = 1 + 0.3 * canvas.noise("grain")[where]
    cytoplasm = np.interp(score, SCORES, CYTOPLASM_DAB) * strength * granular
    body, shown, haematoxylin, dab = np.zeros((4, *canvas.shape), np.float32)
    body[where] = smoothstep(margin_um, -0.6 * canvas.mpp, 0.6 * canvas.mpp)
    shown[where] = membrane
    haematoxylin[where] = canvas.style.cytoplasm * granular * (1 - 0.3 * profile)
    dab[where] = cytoplasm + 0.6 * canvas.style.dab_background
    # Clefts open where a nest shrinks away from the stroma.
    clefts = smoothstep(canvas.noise("clefts") - 1.6 + 2 * min(canvas.style.clefts, 1.5), -0.2, 0.6)
    clefts = (0.9 * clefts * smoothstep(canvas.depth_um, 0.5, 2.0)).astype(np.float32)
    stains.cover(clefts, haematoxylin=0.01, dab=0.3 * canvas.style.dab_background)
    stains.cover(body, haematoxylin=haematoxylin, dab=dab)
    stains.dab[...] += shown
    return body, shown


def _draw_nuclei(canvas: Canvas, stains: Stains, cells: np.ndarray, body: np.ndarray, lumen: np.ndarray) -> None:
    nuclei = _tumour_nuclei(canvas, cells)
    coverage, amount = stamp(nuclei, canvas.shape, canvas.mpp)
    coverage *= body * (1 - lumen)
    chromatin = 1 + 0.18 * canvas.noise("grain") * (0.5 + canvas.style.nucleoli)
    stains.cover(coverage, haematoxylin=amount * chromatin, dab=stains.dab * np.float32(0.35))
    spots, spot_amount = stamp(_nucleoli(canvas, nuclei), canvas.shape, canvas.mpp)
    stains.haematoxylin[...] += spots * coverage * spot_amount


def _tumour_nuclei(canvas: Canvas, cells: np.ndarray) -> Nuclei:
    style, rng = canvas.style, canvas.rng("tumour nuclei")
    offset = rng.normal(0, 0.07 * style.cell_size_um / canvas.mpp, cells.shape)
    nuclei = make_nuclei(
        rng, cells + offset, radius_um=style.nucleus_share * style.cell_size_um, spread=style.pleomorphism,
        amount=0.42, stretch=(1.0, 1.0 + 3 * style.pleomorphism), lumpiness=0.35 * style.pleomorphism, rim=0.5,
    )  # fmt: skip
    dark = rng.random(len(cells)) < DARK_SHARE
    darker, smaller = np.where(dark, 1.9, 1.0), np.where(dark, 0.75, 1.0)
    return replace(nuclei, amount=nuclei.amount * darker, radius_um=nuclei.radius_um * smaller)


def _nucleoli(canvas: Canvas, nuclei: Nuclei) -> Nuclei:
    rng, count = canvas.rng("nucleoli"), len(nuclei.points)
    offset = rng.uniform(-0.4, 0.4, (count, 2)) * nuclei.radius_um[:, None] / canvas.mpp
    shown, amount = rng.random(count) < 0.8, 0.35 * canvas.style.nucleoli
    return make_nuclei(rng, nuclei.points + offset, radius_um=1.0, spread=0.25, amount=amount, rim=0.0).chosen(shown)


def _lumina(canvas: Canvas) -> np.ndarray:
    """Return where ducts are hollow, (H, W) float32: round spaces far enough from the outline."""
    lumen, ducts = np.zeros(canvas.shape, np.float32), canvas.labels == DUCT
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


def lay_out(shape: tuple[int, int], style: SlideStyle, seed: int, mpp: float) -> tuple[np.ndarray, dict[int, int]]:
    """Place nests and ducts in a region: instances, (H, W) int32, and the subtype of each, as in the taxonomy her2."""
    step_px = STEP_UM / mpp
    coarse = (int(shape[0] / step_px) + 5, int(shape[1] / step_px) + 5)
    rng = numpy_generator(seed, "layout")
    wanted = style.tumour_share * rng.uniform(0.6, 1.2) * coarse[0] * coarse[1]
    attempts = 8 + int(ATTEMPTS_PER_MM2 * coarse[0] * coarse[1] * STEP_UM**2 * 1e-6)
    instances = np.zeros(shape, np.int32)
    subtypes: dict[int, int] = {}
    taken_um = np.full(coarse, np.inf, np.float32)
    for attempt in range(attempts):
        if np.count_nonzero(taken_um < 0) >= wanted:
            break
        nest = numpy_generator(seed, "nest", attempt)
        subtype = _draw_subtype(numpy_generator(seed, "subtype", len(subtypes)), style)  # the same until it fits
        whole_um = _outline(nest, coarse, style, duct=subtype == DUCT)
        gap_um = 0.0 if nest.random() < TOUCHING_SHARE else GAP_UM
        outline_um = _largest_part(np.maximum(whole_um, gap_um - taken_um))
        whole, left = (np.count_nonzero(outline < 0) for outline in (whole_um, outline_um))
        if left * STEP_UM**2 < SMALLEST_UM2 or left < whole * (0.85 if subtype == DUCT else 0.5):
            continue
        window, inside = _on_pixels(outline_um, shape, step_px)
        inside &= instances[window] == 0
        if np.count_nonzero(inside) * mpp**2 >= SMALLEST_UM2 / 2:
            subtypes[len(subtypes) + 1] = subtype
            instances[window][inside] = len(subtypes)
            taken_um = np.minimum(taken_um, outline_um)
    return instances, subtypes


def _draw_subtype(rng: np.random.Generator, style: SlideStyle) -> int:
    is_duct, is_dominant = rng.random(2) < (style.duct_share, style.purity)
    others = [score for score in range(4) if score != style.dominant_score]
    other = others[int(rng.integers(3))]
    if is_duct:
        return DUCT
    return 1 + (style.dominant_score if is_dominant else other)


def _outline(rng: np.random.Generator, coarse: tuple[int, int], style: SlideStyle, *, duct: bool) -> np.ndarray:
    """Return the signed distance to a bent, lumpy capsule in micrometres, negative inside, (h, w)."""
    radius = style.nest_radius_um * np.exp(rng.normal(0.3 if duct else 0.0, 0.25))
    length = radius * (rng.uniform(0, 0.5) if duct else style.nest_length * rng.uniform(0.0, 2.5))
    extent = np.array(coarse) * STEP_UM
    centre = rng.uniform(-0.5 * radius, extent + 0.5 * radius)
    angle, bend = rng.uniform(0, 2 * np.pi), rng.normal(0, 0.9)
    along = np.linspace(-0.5, 0.5, 9)
    heading = angle + bend * along
    path = centre + np.cumsum(np.stack([np.sin(heading), np.cos(heading)], axis=1), axis=0) * length / 9
    widths = radius * np.exp((0.0 if duct else 0.1) * rng.standard_normal(9).cumsum())
    widths = np.clip(widths, 11.0, 2.0 * radius)
    y, x = (np.arange(n, dtype=np.float32) * np.float32(STEP_UM) for n in coarse)
    path, widths = path.astype(np.float32)[..., None, None], widths.astype(np.float32)[:, None, None]
    squares = np.square(y[:, None] - path[:, 0]) + np.square(x - path[:, 1])  # (9, h, w)
    capsule = (np.sqrt(squares) - widths).min(axis=0)
    lumps = smooth_noise(rng, coarse, 28.0 / STEP_UM)[0] * (0.1 if duct else 0.3)
    return np.asarray(capsule + lumps * radius, np.float32)


def _on_pixels(outline_um: np.ndarray, shape: tuple[int, int], step_px: float) -> tuple[Window, np.ndarray]:
    """Return a window of the region that holds the nest, and where in it the nest is."""
    inside = outline_um < 0
    windows = []
    for axis, length in enumerate(shape):
        knots = np.flatnonzero(inside.any(axis=1 - axis))
        first, last = int((knots[0] - 3) * step_px), int((knots[-1] + 2) * step_px)
        windows.append(slice(max(first, 0), max(min(last, length), 0)))
    rows, columns = (np.arange(window.start, window.stop) / step_px for window in windows)
    return (windows[0], windows[1]), upsample(outline_um, rows, columns) < 0


def _largest_part(outline_um: np.ndarray) -> np.ndarray:
    parts, count = ndimage.label(outline_um < 0)
    if count <= 1:
        return outline_um
    largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    return np.where((parts == largest) | (parts == 0), outline_um, np.float32(STEP_UM))
