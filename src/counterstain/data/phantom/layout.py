"""Where the nests and ducts of a region lie: instances and their subtypes.

Outlines are drawn on a coarse grid as signed distances and evaluated as smooth surfaces, so that they are as rounded
as an annotator's polygons at any resolution. Shapes: H, W = rows and columns of the region, h, w = of the coarse grid.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from counterstain.data.phantom.noise import smooth_noise, upsample
from counterstain.data.phantom.styles import SlideStyle
from counterstain.seeding import numpy_generator

DUCT = 5  # LCIS/DCIS in the taxonomy her2; 1..4 are HER2 0..3+
STEP_UM = 4.0  # of the coarse grid
GAP_UM = 9.0  # stroma between nests
TOUCHING_SHARE = 0.12  # nests that grow against their neighbours
SMALLEST_UM2 = 500.0
ATTEMPTS_PER_MM2 = 900


def lay_out(shape: tuple[int, int], style: SlideStyle, seed: int, mpp: float) -> tuple[np.ndarray, dict[int, int]]:
    """Place nests and ducts in a region.

    Parameters
    ----------
    shape : (H, W)
    style : SlideStyle
    seed : int
    mpp : float
        Micrometres per pixel.

    Returns
    -------
    instances : (H, W) int32 array
        0 = background.
    subtypes : dict
        Instance -> 1..4 for HER2 0..3+, 5 for LCIS/DCIS.
    """
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


def _on_pixels(
    outline_um: np.ndarray, shape: tuple[int, int], step_px: float
) -> tuple[tuple[slice, slice], np.ndarray]:
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
