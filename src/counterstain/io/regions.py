"""Regions of a slide: rectangles that are listed, drawn or placed on tissue, each with its map of instances.

Places are level-0 pixels of the whole canvas. In a region x points to the right, y downwards, and pixel (row 0, column
0) covers x 0..1 and y 0..1, so its centre is (0.5, 0.5). Shapes: H, W = rows and columns of a region in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely
from shapely import MultiPolygon, Polygon

from counterstain.errors import InputError
from counterstain.io.table import csv_rows

COLUMNS = ("slide", "x_level0_px", "y_level0_px", "width_level0_px", "height_level0_px")
CELLS = 32  # a region is so many cells wide while its place is sought
MIN_FILLED = 0.95  # an outline that fills less of its bounding box is no upright rectangle
CENTRING = 0.01  # how much it counts that annotated tissue lies in the middle of a region
POINTS_AT_ONCE = 200_000
CROSSINGS_AT_ONCE = 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle of a slide in level-0 pixels."""

    name: str
    """Unique on its slide."""
    x: int
    y: int
    width: int
    height: int

    def overlaps(self, other: Box) -> bool:
        """Whether the two share a pixel."""
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )


def read_region_table(path: str | Path) -> dict[str, list[Box]]:
    """Read the regions of each slide, in the order of a CSV table.

    Its columns are slide, x_level0_px, y_level0_px, width_level0_px, height_level0_px and perhaps region (a name,
    unique on its slide).

    Raises
    ------
    InputError
        Names the row, the column and the value.
    """
    boxes: dict[str, list[Box]] = {}
    for where, row in csv_rows(path, COLUMNS, ("region",)):
        of_slide = boxes.setdefault(row["slide"], [])
        box = _box_of_row(where, row, default_name=f"region{len(of_slide) + 1}")
        if any(box.name == other.name for other in of_slide):
            raise InputError(f"{where}: slide {row['slide']} already has a region {box.name!r}; rename one")
        of_slide.append(box)
    return boxes


def _box_of_row(place: str, row: dict[str, str], default_name: str) -> Box:
    numbers = {}
    for column in COLUMNS[1:]:
        try:
            numbers[column] = round(float(row[column]))
        except (ValueError, OverflowError):
            raise InputError(f"{place}: {column} is {row[column]!r}; expected a number of level-0 pixels") from None
    x, y, width, height = numbers.values()
    if width <= 0 or height <= 0:
        raise InputError(f"{place}: a region of {width} x {height} px; expected a width and a height above 0")
    return Box(name=row.get("region") or default_name, x=x, y=y, width=width, height=height)


def drawn_boxes(slide: str, outlines: Sequence[Polygon | MultiPolygon]) -> list[Box]:
    """Turn drawn rectangles into regions, numbered from top to bottom.

    Raises
    ------
    InputError
        An outline is no upright rectangle.
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
        boxes.append(Box(name=f"region{number}", x=x0, y=y0, width=x1 - x0, height=y1 - y0))
    return boxes


class Extent(NamedTuple):
    """A rectangle of the canvas, such as the scanned area."""

    x: int
    y: int
    width: int
    height: int


def place_boxes(
    polygons: Sequence[Polygon | MultiPolygon],
    *,
    count: int,
    width: int,
    height: int,
    extent: Extent,
    weights: Sequence[float] | None = None,
    tissue: np.ndarray | None = None,
) -> list[Box]:
    """Place regions one after the other, each where it covers most annotated tissue that no region covers yet.

    Regions do not overlap and stay within ``extent``; where that is smaller than a region, so is the region. The same
    input gives the same regions.

    Parameters
    ----------
    polygons : sequence of Polygon
        Annotated instances in level-0 pixels.
    count : int
        Regions at most; there are fewer when everything annotated is covered.
    width, height : int
        Size of a region in level-0 pixels.
    extent : Extent
        The scanned area.
    weights : sequence of float, optional
        How much a pixel of each instance counts (1 by default); give rare subtypes more.
    tissue : (H, W) bool array, optional
        Tissue in ``extent`` at any resolution; annotated glass counts half.
    """
    width, height = min(width, extent.width), min(height, extent.height)
    cell = (width / CELLS, height / CELLS)
    worth = _worth(polygons, weights or [1.0] * len(polygons), extent, cell)
    if tissue is not None:
        worth *= (1 + _resampled(tissue, worth.shape, extent, cell)) / 2
    xs = _places(cell[0], worth.shape[1], extent.width - width)
    ys = _places(cell[1], worth.shape[0], extent.height - height)
    return [
        Box(name=f"region{number}", x=extent.x + int(xs[column]), y=extent.y + int(ys[row]), width=width, height=height)
        for number, (row, column) in enumerate(_best_places(worth, count, xs, ys, (width, height)), start=1)
    ]


def _places(cell: float, cells: int, last: int) -> np.ndarray:
    """Return the pixel at which a region begins that starts with each cell; those over the edge are moved back."""
    return np.asarray(np.minimum(np.rint(np.arange(cells - CELLS + 1) * cell), last), int)


def _worth(
    polygons: Sequence[Polygon | MultiPolygon], weights: Sequence[float], extent: Extent, cell: tuple[float, float]
) -> np.ndarray:
    """Spread the weighted area of every polygon over the cells of the extent."""
    rows = max(CELLS, int(np.ceil(extent.height / cell[1] - 1e-9)))
    columns = max(CELLS, int(np.ceil(extent.width / cell[0] - 1e-9)))
    worth = np.zeros((rows, columns))
    for polygon, weight in zip(polygons, weights, strict=True):
        cells = _cells_of(polygon, extent, cell, worth.shape)
        if cells is not None:
            worth[cells] += weight * polygon.area / len(cells[0])
    return worth


def _cells_of(
    polygon: Polygon | MultiPolygon, extent: Extent, cell: tuple[float, float], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return rows and columns of the cells whose centres a polygon covers; for a small one, of the cell it lies in."""
    x0, y0, x1, y1 = polygon.bounds
    first = (int((y0 - extent.y) // cell[1]), int((x0 - extent.x) // cell[0]))
    last = (int((y1 - extent.y) // cell[1]), int((x1 - extent.x) // cell[0]))
    rows = np.arange(max(first[0], 0), min(last[0] + 1, shape[0]))
    columns = np.arange(max(first[1], 0), min(last[1] + 1, shape[1]))
    if not len(rows) or not len(columns):
        return None
    y = (extent.y + (rows + 0.5) * cell[1])[:, None]
    x = (extent.x + (columns + 0.5) * cell[0])[None, :]
    shapely.prepare(polygon)
    inside = np.nonzero(shapely.contains_xy(polygon, *np.broadcast_arrays(x, y)))
    if len(inside[0]):
        return rows[inside[0]], columns[inside[1]]
    point = polygon.representative_point()
    row, column = int((point.y - extent.y) // cell[1]), int((point.x - extent.x) // cell[0])
    return (np.array([row]), np.array([column])) if 0 <= row < shape[0] and 0 <= column < shape[1] else None


def _resampled(mask: np.ndarray, shape: tuple[int, ...], extent: Extent, cell: tuple[float, float]) -> np.ndarray:
    y = (np.arange(shape[0]) + 0.5) * cell[1] / extent.height * mask.shape[0]
    x = (np.arange(shape[1]) + 0.5) * cell[0] / extent.width * mask.shape[1]
    rows, columns = (
        np.minimum(place.astype(int), side - 1) for place, side in ((y, mask.shape[0]), (x, mask.shape[1]))
    )
    return np.asarray(mask[rows[:, None], columns[None, :]], bool)


def _best_places(
    worth: np.ndarray, count: int, xs: np.ndarray, ys: np.ndarray, size: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """Yield row and column of the upper left cell of one region after the other; ties go to the uppermost, leftmost.

    ``xs`` and ``ys`` are the places of regions that start with each column and row of cells, ``size`` their width and
    height, all in pixels.
    """
    worth = worth.copy()
    least = 1e-9 * worth.sum()
    before = CELLS // 2
    means = _window_sums(np.pad(worth, (before, CELLS - 1 - before))) / CELLS**2
    centred = CENTRING * _window_sums(means)  # of all that is annotated, so that regions lie side by side
    free = np.ones((worth.shape[0] - CELLS + 1, worth.shape[1] - CELLS + 1), bool)
    for _ in range(count):
        gain = _window_sums(worth)
        score = np.where(free & (gain > least), gain + centred, -1.0)
        row, column = np.unravel_index(int(score.argmax()), score.shape)
        if score[row, column] < 0 or worth.sum() <= least:
            return
        yield int(row), int(column)
        worth[row : row + CELLS, column : column + CELLS] = 0
        free &= ~np.logical_and.outer(abs(ys - ys[row]) < size[1], abs(xs - xs[column]) < size[0])


def _window_sums(values: np.ndarray) -> np.ndarray:
    """Return the sum of every window of CELLS x CELLS, by its upper left cell."""
    total = np.pad(values, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    return np.asarray(total[CELLS:, CELLS:] - total[:-CELLS, CELLS:] - total[CELLS:, :-CELLS] + total[:-CELLS, :-CELLS])


class Placed(NamedTuple):
    """Outlines in the pixels of a region."""

    shown: list[int]
    """Which of the outlines the region shows."""
    polygons: list[Polygon | MultiPolygon]
    """Those, whole: :func:`rasterise` cuts at the region's edge."""
    cut: int
    """How many reach over the region's edge."""


def place(polygons: Sequence[Polygon | MultiPolygon], box: Box, scale: float = 1.0) -> Placed:
    """Move outlines from level-0 pixels of the slide into the pixels of a region.

    ``scale`` is level-0 pixels per region pixel: the region's mpp over the slide's.
    """
    drawn = np.array(polygons, dtype=object)
    moved = shapely.transform(drawn, lambda xy: (xy - (box.x, box.y)) / scale)
    window = shapely.box(0, 0, box.width / scale, box.height / scale)
    shapely.prepare(window)
    within = shapely.covers(window, moved)
    across = ~within & shapely.intersects(window, moved)
    across[across] = shapely.area(shapely.intersection(moved[across], window)) > 0  # touching is not showing
    shown = np.flatnonzero(within | across)
    return Placed(shown.tolist(), list(moved[shown]), int(across.sum()))


def rasterise(instances: Sequence[tuple[int, Polygon | MultiPolygon]], shape: tuple[int, int]) -> np.ndarray:
    """Paint polygons into an instance map.

    A pixel belongs to the polygon that its centre lies in; holes stay empty. The largest polygon is painted first, so
    that an instance inside another one shows; of equals, the one with the lower id. What reaches over the edge is cut
    there. An instance that covers no pixel centre, or is painted over, is not in the map.

    The fill is a scanline in numpy, since PIL's paints the boundary pixels of both of two polygons that touch, and
    OpenCV and rasterio are large dependencies for this one step. Every edge is followed from its upper to its lower
    end, whichever way the polygon runs, so two polygons that share an edge find bit-identical crossings: each pixel
    centre is in exactly one of them.

    Parameters
    ----------
    instances : sequence of (id, polygon)
        Valid polygons in pixels of the region. Id 0 paints background, such as a gland's lumen inside an instance.
    shape : H, W

    Returns
    -------
    (H, W) int32 array
        0 = background.
    """
    drawn = np.array([polygon for _, polygon in instances], dtype=object)
    ids = np.array([instance for instance, _ in instances], np.int64)
    order = np.lexsort((ids, -shapely.area(drawn)))
    painted = np.zeros(shape, np.int32)
    last_point = np.cumsum(shapely.get_num_coordinates(drawn[order]))
    batches = np.flatnonzero(np.diff(last_point // POINTS_AT_ONCE)) + 1
    for batch in np.split(order, batches):
        _paint(painted, ids[batch], drawn[batch])
    return painted


def _paint(painted: np.ndarray, ids: np.ndarray, polygons: np.ndarray) -> None:
    """Paint polygons one over the other, in place."""
    height, width = painted.shape
    edges = _edges(polygons)
    crossings = int(np.clip(edges.y1 - edges.y0, 0, height).sum())
    bands = np.linspace(0, height, crossings // CROSSINGS_AT_ONCE + 2).astype(np.int64)
    pixels = painted.reshape(-1)
    for top, bottom in pairwise(bands.tolist()):
        polygon, row, column = _crossings(edges, top, bottom)
        # Sorted by line, polygon and column, crossings come in pairs: into the polygon and out of it. Columns go to
        # `width` inclusive; what enters left of the region enters at its edge.
        places = np.sort((row * len(polygons) + polygon) * (width + 1) + np.clip(column, 0, width))
        line, column = np.divmod(places, width + 1)
        row, polygon = np.divmod(line, len(polygons))
        start, stop = (row * width + column).reshape(-1, 2).T
        wide = np.flatnonzero(stop > start)
        spans = zip(start[wide].tolist(), stop[wide].tolist(), ids[polygon[::2][wide]].tolist(), strict=True)
        for first, last, value in spans:
            pixels[first:last] = value


class _Edges(NamedTuple):
    """Edges of many polygons, (n,) each, from their upper to their lower end."""

    polygon: np.ndarray  # int, which polygon
    x0: np.ndarray  # float, like the rest
    y0: np.ndarray
    x1: np.ndarray
    y1: np.ndarray


def _edges(polygons: np.ndarray) -> _Edges:
    parts, whole = shapely.get_parts(polygons, return_index=True)
    rings, part = shapely.get_rings(parts, return_index=True)  # it finds none in a MultiPolygon
    owner = whole[part]
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    x, y = np.ascontiguousarray(xy.T)
    start = np.flatnonzero(ring[1:] == ring[:-1])
    downwards = y[start] <= y[start + 1]
    upper, lower = np.where(downwards, start, start + 1), np.where(downwards, start + 1, start)
    return _Edges(owner[ring[start]], x[upper], y[upper], x[lower], y[lower])


def _crossings(edges: _Edges, top: int, bottom: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where edges cross the lines through pixel centres: polygon, row and column, (n,) integer each.

    An edge covers the lines from its upper end, inclusive, to its lower end, exclusive. The column is that of the
    first pixel whose centre is not left of the crossing.
    """
    first = np.clip(np.ceil(edges.y0 - 0.5), top, bottom).astype(np.int64)
    lines = np.clip(np.ceil(edges.y1 - 0.5), top, bottom).astype(np.int64) - first
    edge = np.repeat(np.arange(len(lines)), lines)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(lines) - lines - first, lines)
    polygon, x0, y0, x1, y1 = (values[edge] for values in edges)
    x = x0 + (row + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
    return polygon, row, np.ceil(x - 0.5).astype(np.int64)
