"""Polygons to instance maps: largest painted first, holes honoured, a pixel belongs to what its centre lies in.

The fill is a scanline of its own in numpy. PIL's paints the boundary pixels of both of two polygons that touch, and
OpenCV and rasterio are large dependencies for this one step. Here every edge is followed from its upper to its lower
end, whichever way the polygon runs, so two polygons that share an edge find bit-identical crossings: each pixel centre
is in exactly one of them, without gaps or overlaps.

Shapes: H, W = rows and columns of the region in pixels; x to the right, y downwards, pixel (row 0, column 0) covers
x 0..1 and y 0..1, so its centre is (0.5, 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import shapely
from shapely import MultiPolygon, Polygon

from counterstain.errors import InputError
from counterstain.io.annotations.outlines import Annotation

POINTS_AT_ONCE = 200_000
CROSSINGS_AT_ONCE = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Annotations in the pixels of a region."""

    annotations: tuple[Annotation, ...]
    """Those that the region shows, in the order given."""
    polygons: tuple[Polygon | MultiPolygon, ...]
    """Their outlines in region pixels, whole: :func:`rasterise` cuts at the region's edge."""
    cut: int
    """How many reach over the region's edge."""
    outside: int
    """How many lie wholly outside and were left out."""


def place(
    annotations: Sequence[Annotation],
    box: tuple[float, float, float, float],
    scale: float = 1.0,
    *,
    offset: tuple[float, float] = (0.0, 0.0),
) -> Placed:
    """Move annotations into the pixels of a region.

    Parameters
    ----------
    annotations : sequence of Annotation
    box : x, y, width, height
        The region in level-0 pixels of the slide.
    scale : float
        Level-0 pixels per region pixel: the region's mpp over the slide's.
    offset : x, y
        Added to the annotations first, in level-0 pixels: where their origin lies on the slide.

    Returns
    -------
    Placed
    """
    x, y, width, height = box
    if not (scale > 0 and width > 0 and height > 0):
        raise InputError(f"region of {width} x {height} level-0 px at scale {scale}: expected all above 0")
    drawn = np.array([a.polygon for a in annotations], dtype=object)
    shift = np.subtract(offset, (x, y))
    moved = shapely.transform(drawn, lambda xy: (xy + shift) / scale)
    window = shapely.box(0, 0, width / scale, height / scale)
    shapely.prepare(window)
    within = shapely.covers(window, moved)
    across = ~within & shapely.intersects(window, moved)
    across[across] = shapely.area(shapely.intersection(moved[across], window)) > 0  # touching is not showing
    shown = np.flatnonzero(within | across)
    return Placed(
        annotations=tuple(annotations[i] for i in shown.tolist()),
        polygons=tuple(moved[shown]),
        cut=int(across.sum()),
        outside=len(drawn) - len(shown),
    )


def rasterise(instances: Sequence[tuple[int, Polygon | MultiPolygon]], shape: tuple[int, int]) -> np.ndarray:
    """Paint polygons into an instance map.

    The largest is painted first, so that an instance inside another one shows; of equals, the one with the lower id.
    What reaches over the edge is cut there. An instance without a pixel centre in it, or painted over, is not in
    the map.

    Parameters
    ----------
    instances : sequence of (id, polygon)
        Valid polygons in pixels of the region. Id 0 paints background: what lies inside a larger instance and is none.
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
    rings, part = shapely.get_rings(parts, return_index=True)  # of polygons alone: a MultiPolygon has none
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
