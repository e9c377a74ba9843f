"""Regions of a slide: rectangles that are listed, drawn or placed on tissue, and the instances painted into them.

Places are level-0 pixels of the whole canvas. In a region x points to the right, y downwards, and pixel (row 0, column
0) covers x 0..1 and y 0..1, so its centre is (0.5, 0.5). Shapes: H, W = rows and columns of a region in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely
from scipy import ndimage
from shapely import MultiPolygon, Polygon
from skimage.filters import threshold_otsu

from counterstain.errors import InputError
from counterstain.io.slides import Box, slide_name
from counterstain.io.table import csv_rows

COLUMNS = ("slide", "x_level0_px", "y_level0_px", "width_level0_px", "height_level0_px")
CELLS = 32  # a region is so many cells wide while its place is sought
MIN_FILLED = 0.98  # an outline that fills less of its bounding box is no upright rectangle
CENTRING = 0.01  # how much it counts that annotated tissue lies in the middle of a region
POINTS_AT_ONCE = 200_000
CROSSINGS_AT_ONCE = 2_000_000

# Tissue on a thumbnail, see tissue_mask: saturation 0..1, brightness 0..255.
MIN_SATURATION = 0.04  # paler pixels are never tissue, so that a blank slide has none
MAX_SATURATION = 0.2  # stronger pixels are always tissue, so that a strong stain does not hide pale tissue
MIN_BRIGHTNESS = 30  # darker pixels are a border or a felt pen
CLOSING_PX = 3  # gaps up to about this width are closed
MIN_AREA_SHARE = 2e-4  # of the thumbnail; smaller specks are dust
SATURATION_BINS = 256

Outline = Polygon | MultiPolygon


def read_region_table(path: str | Path) -> dict[str, list[Box]]:
    """Read the regions of each slide from a CSV table with columns as in COLUMNS and perhaps region, a unique name.

    Raises InputError that names the row, the column and the value.
    """
    boxes: dict[str, list[Box]] = {}
    for where, row in csv_rows(path, COLUMNS, ("region",)):
        of_slide = boxes.setdefault(slide_name(row["slide"]), [])
        x, y, width, height = (_pixels(where, column, row[column]) for column in COLUMNS[1:])
        if width <= 0 or height <= 0:
            raise InputError(f"{where}: a region of {width} x {height} px; expected a width and a height above 0")
        name = row.get("region") or f"region{len(of_slide) + 1}"
        if any(name == other.name for other in of_slide):
            raise InputError(f"{where}: slide {row['slide']} already has a region {name!r}; rename one")
        of_slide.append(Box(x, y, width, height, name))
    return boxes


def _pixels(where: str, column: str, text: str) -> int:
    try:
        return round(float(text))
    except (ValueError, OverflowError):
        raise InputError(f"{where}: {column} is {text!r}; expected a number of level-0 pixels") from None


def drawn_boxes(slide: str, outlines: Sequence[Outline]) -> list[Box]:
    """Turn drawn rectangles into regions, numbered from top to bottom.

    Raises InputError where an outline is no upright rectangle.
    """
    boxes = []
    ordered = sorted(outlines, key=lambda outline: (outline.bounds[1], outline.bounds[0]))
    for number, outline in enumerate(ordered, start=1):
        x0, y0, x1, y1 = (round(side) for side in outline.bounds)
        if x0 == x1 or y0 == y1 or outline.area < MIN_FILLED * shapely.box(*outline.bounds).area:
            raise InputError(
                f"slide {slide}: the outline of a region at x {x0}, y {y0} is no upright rectangle; "
                "draw it with the rectangle tool"
            )
        boxes.append(Box(x0, y0, x1 - x0, y1 - y0, f"region{number}"))
    return boxes


def place_boxes(
    outlines: Sequence[Outline],
    *,
    count: int,
    edge: int,
    extent: Box,
    weights: Sequence[float] | None = None,
    tissue: np.ndarray | None = None,
) -> list[Box]:
    """Place regions one after the other, each where it covers most annotated tissue that no region covers yet.

    Regions are squares of ``edge`` level-0 pixels, ``count`` at most: fewer when everything annotated is covered. They
    do not overlap and stay within ``extent``; where that is smaller than a region, so is the region. The same input
    gives the same regions. ``weights`` say how much a pixel of each outline counts (1 by default): give rare subtypes
    more. Glass that is annotated counts half, where ``tissue`` in ``extent``, (H, W) bool at any resolution, is known.
    """
    width, height = min(edge, extent.width), min(edge, extent.height)
    cell_x, cell_y = width / CELLS, height / CELLS
    rows = max(CELLS, math.ceil(extent.height / cell_y - 1e-9))
    columns = max(CELLS, math.ceil(extent.width / cell_x - 1e-9))

    # The weighted area of every outline, spread over the cells that it covers.
    worth = np.zeros((rows, columns))
    drawn = np.array(outlines, dtype=object)
    in_cells = shapely.transform(drawn, lambda xy: (xy - (extent.x, extent.y)) / (cell_x, cell_y))
    for outline, area, weight in zip(in_cells, shapely.area(drawn), weights or [1.0] * len(drawn), strict=True):
        row, column = _cells_of(outline, worth.shape)
        worth[row, column] += weight * area / max(1, len(row))
    if tissue is not None:
        y = (np.arange(rows) + 0.5) * cell_y / extent.height * tissue.shape[0]
        x = (np.arange(columns) + 0.5) * cell_x / extent.width * tissue.shape[1]
        y, x = (np.minimum(place.astype(int), side - 1) for place, side in zip((y, x), tissue.shape, strict=True))
        worth *= (1 + tissue[np.ix_(y, x)]) / 2

    # Where a region begins that starts with each cell; those over the edge are moved back.
    xs = np.minimum(np.rint(np.arange(columns - CELLS + 1) * cell_x), extent.width - width).astype(int)
    ys = np.minimum(np.rint(np.arange(rows - CELLS + 1) * cell_y), extent.height - height).astype(int)
    return [
        Box(extent.x + int(xs[column]), extent.y + int(ys[row]), width, height, f"region{number}")
        for number, (row, column) in enumerate(_best_places(worth, count, xs, ys, (width, height)), start=1)
    ]


def _cells_of(outline: Outline, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and columns of the cells whose centres an outline covers; for a small one, of the cell it lies in."""
    x0, y0, x1, y1 = np.floor(outline.bounds).astype(int)
    rows, columns = np.arange(max(y0, 0), min(y1 + 1, shape[0])), np.arange(max(x0, 0), min(x1 + 1, shape[1]))
    row, column = np.meshgrid(rows, columns, indexing="ij")
    shapely.prepare(outline)
    inside = shapely.contains_xy(outline, column + 0.5, row + 0.5)
    if not inside.any():
        point = outline.representative_point()
        inside = (row == math.floor(point.y)) & (column == math.floor(point.x))
    return row[inside], column[inside]


def _best_places(
    worth: np.ndarray, count: int, xs: np.ndarray, ys: np.ndarray, size: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """Yield row and column of the upper left cell of one region after the other; ties go to the uppermost, leftmost.

    ``xs`` and ``ys`` are the places of regions that start with each column and row of cells, ``size`` their width and
    height, all in pixels.
    """
    least = 1e-9 * worth.sum()
    before = CELLS // 2
    means = _window_sums(np.pad(worth, (before, CELLS - 1 - before))) / CELLS**2
    centred = CENTRING * _window_sums(means)  # of all that is annotated, so that regions lie side by side
    free = np.ones((len(ys), len(xs)), bool)
    for _ in range(count):
        gain = _window_sums(worth)
        score = np.where(free & (gain > least), gain + centred, -1.0)
        row, column = np.unravel_index(int(score.argmax()), score.shape)
        if score[row, column] < 0:
            return
        yield int(row), int(column)
        worth[row : row + CELLS, column : column + CELLS] = 0
        free &= ~np.logical_and.outer(abs(ys - ys[row]) < size[1], abs(xs - xs[column]) < size[0])


def _window_sums(values: np.ndarray) -> np.ndarray:
    """Return the sum of every window of CELLS x CELLS, by its upper left cell."""
    total = np.pad(values, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    return np.asarray(total[CELLS:, CELLS:] - total[:-CELLS, CELLS:] - total[CELLS:, :-CELLS] + total[:-CELLS, :-CELLS])


def tissue_mask(image: np.ndarray) -> np.ndarray:
    """Return where a thumbnail, (H, W, 3) uint8, shows tissue, (H, W) bool: stain is colourful, glass is not.

    The threshold of saturation is Otsu's (1979) between MIN_SATURATION and MAX_SATURATION.
    """
    red, green, blue = image.transpose(2, 0, 1)  # by hand: numpy reduces a short last axis slowly
    brightness = np.maximum(np.maximum(red, green), blue)
    darkest = np.minimum(np.minimum(red, green), blue)
    saturation = (brightness - darkest) / np.maximum(brightness, 1).astype(np.float32)
    values = ndimage.median_filter(saturation, size=3)
    counts, edges = np.histogram(values, bins=SATURATION_BINS, range=(0, 1))
    spread = np.count_nonzero(counts) > 1
    otsu = threshold_otsu(hist=(counts, edges[1:])) if spread else 0.0
    threshold = float(np.clip(otsu, MIN_SATURATION, MAX_SATURATION))
    mask = (values > threshold) & (brightness >= MIN_BRIGHTNESS)
    y, x = np.ogrid[-CLOSING_PX : CLOSING_PX + 1, -CLOSING_PX : CLOSING_PX + 1]
    padded = np.pad(mask, CLOSING_PX, mode="edge")  # otherwise tissue at the border is eaten away
    closed = ndimage.binary_closing(padded, structure=x**2 + y**2 <= CLOSING_PX**2)
    parts, _ = ndimage.label(closed[CLOSING_PX:-CLOSING_PX, CLOSING_PX:-CLOSING_PX])
    keep = np.bincount(parts.ravel()) >= MIN_AREA_SHARE * mask.size
    keep[0] = False
    return np.asarray(keep[parts])


class Placed(NamedTuple):
    """Outlines in the pixels of a region."""

    shown: list[int]  # which of the outlines the region shows
    polygons: list[Outline]  # those, whole: :func:`rasterise` cuts at the region's edge
    cut: int  # how many reach over the region's edge


def place(outlines: Sequence[Outline], box: Box, scale: float = 1.0) -> Placed:
    """Move outlines from level-0 pixels of the slide into the pixels of a region.

    ``scale`` is level-0 pixels per region pixel: the region's mpp over the slide's.
    """
    moved = shapely.transform(np.array(outlines, dtype=object), lambda xy: (xy - (box.x, box.y)) / scale)
    window = shapely.box(0, 0, box.width / scale, box.height / scale)
    shapely.prepare(window)
    within = shapely.covers(window, moved)
    across = ~within & shapely.intersects(window, moved)
    across[across] = shapely.area(shapely.intersection(moved[across], window)) > 0  # touching is not showing
    shown = np.flatnonzero(within | across)
    return Placed(shown.tolist(), list(moved[shown]), int(across.sum()))


def rasterise(instances: Sequence[tuple[int, Outline]], shape: tuple[int, int]) -> np.ndarray:
    """Paint polygons, valid and in pixels of the region, into an instance map, (H, W) int32, 0 = background.

    A pixel belongs to the polygon that its centre lies in; holes stay empty. The largest polygon is painted first, so
    that an instance inside another one shows; of equals, the one with the lower id. Id 0 paints background, such as a
    gland's lumen. What reaches over the edge is cut there; what covers no pixel centre, or is painted over, is not
    there.

    PIL would paint the boundary pixels of both of two polygons that touch. Here every edge is followed from its upper
    to its lower end, whichever way the polygon runs, so two polygons that share an edge find bit-identical crossings:
    each pixel centre is in exactly one of them.
    """
    return InstanceWindow(instances, shape).read(0, 0, *shape)


class InstanceWindow:
    """An instance map of ``shape`` H, W that is painted piece by piece; any piece equals that part of the whole.

    Takes what :func:`rasterise` takes.
    """

    def __init__(self, instances: Sequence[tuple[int, Outline]], shape: tuple[int, int]) -> None:
        drawn = np.array([polygon for _, polygon in instances], dtype=object)
        ids = np.array([instance for instance, _ in instances], np.int64)
        order = np.lexsort((ids, -shapely.area(drawn)))
        self.shape, self._drawn, self._ids = shape, drawn[order], ids[order]
        self._tops, self._bottoms = shapely.bounds(self._drawn).reshape(-1, 4)[:, (1, 3)].T

    def read(self, y_px: int, x_px: int, height_px: int, width_px: int) -> np.ndarray:
        """Return a piece of the map, (height_px, width_px) int32."""
        painted = np.zeros((height_px, self.shape[1]), np.int32)
        seen = np.flatnonzero((self._tops < y_px + height_px) & (self._bottoms > y_px))
        last_point = np.cumsum(shapely.get_num_coordinates(self._drawn[seen]))
        for batch in np.split(seen, np.flatnonzero(np.diff(last_point // POINTS_AT_ONCE)) + 1):
            _paint(painted, y_px, self._ids[batch], self._drawn[batch])
        return painted[:, x_px : x_px + width_px]


def _paint(painted: np.ndarray, first_row: int, ids: np.ndarray, polygons: np.ndarray) -> None:
    """Paint polygons one over the other, in place, into rows from ``first_row`` on."""
    height, width = painted.shape
    edges = _edges(polygons)
    reach = np.clip(edges[4], first_row, first_row + height) - np.clip(edges[2], first_row, first_row + height)
    bands = first_row + np.linspace(0, height, int(reach.sum()) // CROSSINGS_AT_ONCE + 2).astype(np.int64)
    pixels = painted.reshape(-1)
    for top, bottom in pairwise(bands.tolist()):
        polygon, row, column = _crossings(edges, top, bottom)
        # Sorted by line, polygon and column, crossings come in pairs: into the polygon and out of it. Columns go to
        # `width` inclusive; what enters left of the region enters at its edge.
        places = np.sort((row * len(ids) + polygon) * (width + 1) + np.clip(column, 0, width))
        line, column = np.divmod(places, width + 1)
        row, polygon = np.divmod(line, len(ids))
        start, stop = ((row - first_row) * width + column).reshape(-1, 2).T
        wide = np.flatnonzero(stop > start)
        spans = zip(start[wide].tolist(), stop[wide].tolist(), ids[polygon[::2][wide]].tolist(), strict=True)
        for first, last, value in spans:
            pixels[first:last] = value


def _edges(polygons: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the edges of polygons, each from its upper to its lower end: which polygon, x0, y0, x1, y1, (n,) each."""
    parts, whole = shapely.get_parts(polygons, return_index=True)
    rings, part = shapely.get_rings(parts, return_index=True)  # it finds none in a MultiPolygon
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    start = np.flatnonzero(ring[1:] == ring[:-1])
    downwards = xy[start, 1] <= xy[start + 1, 1]
    upper, lower = np.where(downwards, start, start + 1), np.where(downwards, start + 1, start)
    return whole[part][ring[start]], *xy[upper].T, *xy[lower].T


def _crossings(edges: tuple[np.ndarray, ...], top: int, bottom: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where edges cross the lines through pixel centres: polygon, row and column, (n,) integer each.

    An edge covers the lines from its upper end, inclusive, to its lower end, exclusive. The column is that of the
    first pixel whose centre is not left of the crossing.
    """
    first = np.clip(np.ceil(edges[2] - 0.5), top, bottom).astype(np.int64)
    lines = np.clip(np.ceil(edges[4] - 0.5), top, bottom).astype(np.int64) - first
    edge = np.repeat(np.arange(len(lines)), lines)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(lines) - lines - first, lines)
    polygon, x0, y0, x1, y1 = (values[edge] for values in edges)
    x = x0 + (row + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
    return polygon, row, np.ceil(x - 0.5).astype(np.int64)
