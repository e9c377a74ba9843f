"""Where nests, ducts, glands, vessels and fat cells of a region lie.

Outlines of nests are drawn on a coarse grid as signed distances and evaluated as smooth surfaces, so that they are as
rounded as an annotator's polygons at any resolution. Shapes: H, W = rows and columns of the region, h, w = of the
coarse grid, n = structures of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from counterstain.data.phantom.canvas import Canvas, lookup, scatter, smooth_noise, upsample
from counterstain.data.phantom.styles import SlideStyle
from counterstain.seeding import numpy_generator

DUCT = 5  # LCIS/DCIS in the taxonomy her2; 1..4 are HER2 0..3+
STEP_UM = 4.0  # of the coarse grid
GAP_UM = 9.0  # stroma between nests
TOUCHING_SHARE = 0.12  # nests that grow against their neighbours
SMALLEST_UM2 = 500.0
ATTEMPTS_PER_MM2 = 900

Window = tuple[slice, slice]
Member = tuple[str, np.ndarray, float, float]  # kind, offset in micrometres, radius, wall


def lay_out(shape: tuple[int, int], style: SlideStyle, seed: int, mpp: float) -> tuple[np.ndarray, dict[int, int]]:
    """Place nests and ducts in a region.

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


# Glands, vessels and fat cells find room between the nests.
SPACING_UM = 78.0  # of the places where a structure or a group of them may lie
REACH_UM = 36.0  # the largest group
GLAND_RATE, FAT_RATE, VESSEL_RATE = 0.24, 0.10, 0.16  # share of the places, on the median slide


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round structure with a wall."""

    kind: str
    """``gland``, ``vessel`` or ``fat``."""
    centre: np.ndarray  # (2,) row and column in pixels
    radius_um: float
    wall_um: float
    """Thickness of the wall; all of the radius = no lumen."""
    phase: float
    """Turns the waves of the outline."""

    def outline_um(self, angle: np.ndarray) -> np.ndarray:
        """Return the radius in each direction."""
        waves = 0.10 * np.cos(2 * angle + self.phase) + 0.06 * np.cos(3 * angle + 2 * self.phase)
        return np.asarray(self.radius_um * (1 + waves))


def find_places(canvas: Canvas) -> Iterator[Round]:
    """Yield every structure, those included that reach in from beyond the edges."""
    style = canvas.style
    rates = np.array([GLAND_RATE * style.benign, FAT_RATE * style.fat, VESSEL_RATE])
    limits = np.cumsum(rates / max(rates.sum(), 1.0))
    rng = canvas.rng("places")
    centres = canvas.scatter(rng, SPACING_UM, jitter=0.3, margin_um=REACH_UM)
    kinds = rng.random(len(centres))
    rooms_um = np.minimum(lookup(canvas.outside_um, centres) + 4.0, REACH_UM)
    for place in np.flatnonzero(kinds < limits[2]).tolist():
        rng, room_um = canvas.rng("place", place), float(rooms_um[place])
        if kinds[place] < limits[0]:
            members = _glands(rng, room_um) if room_um > 12 else iter(())
        elif kinds[place] < limits[1]:
            members = _fat_cells(rng, room_um)
        else:
            members = _vessels(rng, room_um)
        for kind, offset_um, radius_um, wall_um in members:
            centre, phase = centres[place] + offset_um / canvas.mpp, rng.uniform(0, 2 * np.pi)
            if lookup(canvas.outside_um, centre[None])[0] > 0.8 * radius_um:
                yield Round(kind=kind, centre=centre, radius_um=radius_um, wall_um=wall_um, phase=phase)


def _glands(rng: np.random.Generator, room_um: float) -> Iterator[Member]:
    kind, middle = rng.random(), np.zeros(2)
    if kind < 0.35:  # one duct
        yield "gland", middle, room_um * rng.uniform(0.6, 1), rng.uniform(8, 12)
    elif kind < 0.55:  # a duct that is filled with regular cells
        radius_um = room_um * rng.uniform(0.5, 0.9)
        yield "gland", middle, radius_um, radius_um
    else:  # a lobule
        size_um = rng.uniform(9, 13)
        for offset in _group(rng, room_um, 2.3 * size_um):
            yield "gland", offset, size_um * rng.uniform(0.8, 1.1), rng.uniform(6.5, size_um)


def _fat_cells(rng: np.random.Generator, room_um: float) -> Iterator[Member]:
    size_um = rng.uniform(14, 26)
    for offset in _group(rng, room_um, 2.05 * size_um):
        yield "fat", offset, size_um * rng.uniform(0.8, 1.02), 0.0


def _vessels(rng: np.random.Generator, room_um: float) -> Iterator[Member]:
    for offset in _group(rng, room_um, 30.0)[: int(rng.integers(1, 4))]:
        yield "vessel", offset, min(rng.uniform(4.5, 13), room_um), rng.uniform(1.5, 3.5)


def _group(rng: np.random.Generator, room_um: float, spacing_um: float) -> np.ndarray:
    """Return offsets from the middle of a group in micrometres, (n, 2)."""
    edge = int(2 * room_um)
    offsets = scatter(rng, (edge, edge), spacing_um, jitter=0.1) - room_um
    near = offsets[np.hypot(*offsets.T) < room_um - 0.3 * spacing_um]
    return near if len(near) else np.zeros((1, 2))
