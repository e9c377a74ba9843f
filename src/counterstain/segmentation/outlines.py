"""Probabilities to outlines: one polygon for each area of tumour, whole across tiles, holes kept.

Shapes: h, w = rows and columns of samples, n = pieces. Coordinates are pixels of the image, x to the right, y
downwards; pixel (row 0, column 0) covers x 0..1 and y 0..1, its probability is that of its centre.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import shapely
from contourpy import FillType, contour_generator
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from shapely import Polygon

from counterstain.io.annotations.outlines import polygonal
from counterstain.io.regions import rasterise
from counterstain.segmentation.inference import Span
from counterstain.storage import replacing

# Outlines may move by this much to have a sixth of the corners. Half a pixel would take twice as many away, and a tenth
# off the area of something 5 px wide.
SIMPLIFY_PX = 0.25
ABOVE_ALL = 2.0  # no probability is above it


class Piece(NamedTuple):
    """What one tile shows of an area of tumour."""

    polygon: Polygon
    probability_sum: float
    """Over the pixels whose centre it covers."""
    pixels: int


class Area(NamedTuple):
    """An area of tumour."""

    polygon: Polygon
    mean_probability: float


def pieces(probability: np.ndarray, rows: Span, columns: Span, threshold: float) -> Iterator[Piece]:
    """Outline what is at or above a threshold in one tile.

    Outlines follow the threshold between pixel centres, so that exactly the pixels above it have their centre inside
    (a pixel at the threshold has it on the outline). Tiles meet on the line through the centres of their shared pixels.

    Parameters
    ----------
    probability : (read_px, read_px) float array
        Of all pixels that were read.
    rows, columns : Span
        Which pixels of the image these are.
    threshold : float
    """
    known = probability[_known(rows, len(probability)), _known(columns, probability.shape[1])]
    if known.max() < threshold:
        return
    y, x = _centres(rows, known.shape[0]), _centres(columns, known.shape[1])
    sides = [(int(rows.start == 0), int(rows.last)), (int(columns.start == 0), int(columns.last))]
    polygons = _filled(np.pad(known, sides, mode="edge"), _to_edge(y, sides[0]), _to_edge(x, sides[1]), threshold)
    own = known[: rows.stop - rows.start, : columns.stop - columns.start]
    corner = (columns.start, rows.start)
    painted = rasterise(
        [(i, shapely.transform(p, lambda xy: xy - corner)) for i, p in enumerate(polygons, start=1)], own.shape
    ).ravel()
    counts = np.bincount(painted, minlength=len(polygons) + 1)
    sums = np.bincount(painted, weights=own.ravel(), minlength=len(polygons) + 1)
    for number, polygon in enumerate(polygons, start=1):
        yield Piece(polygon, float(sums[number]), int(counts[number]))


def join(found: Sequence[Piece], simplify_px: float = SIMPLIFY_PX) -> list[Area]:
    """Join the pieces of neighbouring tiles and simplify the outlines, from top to bottom."""
    if not found:
        return []
    polygons = np.array([piece.polygon for piece in found], dtype=object)
    joined = shapely.get_parts(_united(polygons))
    joined = joined[np.lexsort(shapely.bounds(joined)[:, :2].T)]
    piece, owner = shapely.STRtree(joined).query(shapely.point_on_surface(polygons), predicate="intersects")
    sums, pixels = np.array([(p.probability_sum, p.pixels) for p in found], float)[piece].T
    total, count = (np.bincount(owner, weights=values, minlength=len(joined)) for values in (sums, pixels))
    simple = shapely.simplify(joined, simplify_px)
    return [
        Area(part, float(total[number] / count[number]))
        for number, whole in enumerate(simple)
        if count[number] > 0
        for part in shapely.get_parts(whole)
    ]


def _united(polygons: np.ndarray) -> np.ndarray:
    """Unite what meets, (n,) -> (m,) polygons or multipolygons; one union of them all takes hours on a large slide."""
    first, second = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    links = coo_array((np.ones(len(first), bool), (first, second)), shape=(len(polygons),) * 2)
    _, group = connected_components(links, directed=False)
    order = np.argsort(group, kind="stable")
    members = np.split(polygons[order], np.flatnonzero(np.diff(group[order])) + 1)
    united = [shapely.union_all(of_group) if len(of_group) > 1 else of_group[0] for of_group in members]
    return np.array(united, dtype=object)


def mask_polygons(mask: np.ndarray) -> list[Polygon]:
    """Outline the areas of an (h, w) bool mask in its own pixels."""
    rows, columns = (Span(0, length, 0, length) for length in mask.shape)
    return [area.polygon for area in join(list(pieces(mask.astype(np.float32), rows, columns, 0.5)))]


def _known(span: Span, length: int) -> slice:
    """Return the samples of a tile, with the one that it shares with the next tile."""
    stop = span.stop if span.last else span.stop + 1
    return slice(span.start - span.read_from, min(stop - span.read_from, length))


def _centres(span: Span, count: int) -> np.ndarray:
    return span.start + 0.5 + np.arange(count)


def _to_edge(centres: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """Add the image's edge where the tile reaches it: the outermost pixels reach half a pixel beyond their centre."""
    before, after = [centres[0] - 0.5] * sides[0], [centres[-1] + 0.5] * sides[1]
    return np.concatenate([before, centres, after])


def _filled(samples: np.ndarray, y: np.ndarray, x: np.ndarray, threshold: float) -> list[Polygon]:
    generator = contour_generator(x, y, samples, name="serial", fill_type=FillType.OuterOffset)
    areas: Any = generator.filled(threshold, ABOVE_ALL)
    found: list[Polygon] = []
    for xy, starts in zip(*areas, strict=True):
        outer, *holes = [xy[a:b] for a, b in pairwise(starts)]
        drawn = Polygon(outer, holes)
        valid = drawn if drawn.is_valid else polygonal(shapely.make_valid(drawn))
        found += [part for part in shapely.get_parts(valid) if part.area > 0]
    return found


# Areas of tumour as GeoJSON that QuPath opens (File > Import objects, or by dropping the file on the slide).
#
# Measurements are a list of name and value, as QuPath wrote it before version 0.4: newer ones read both, older ones
# no other.

ObjectType = Literal["annotation", "detection"]
DECIMALS = 2  # of a level-0 pixel
TUMOUR_COLOUR = (200, 0, 0)  # QuPath's own for tumour
HEAD_BYTES = 4096
_NAMESPACE = uuid.UUID("5f0c1bd4-6a40-4c1e-9f53-2d0f9b7d6a11")


class Outlined(NamedTuple):
    """An area of tumour on a slide."""

    polygon: Polygon
    """In level-0 pixels."""
    mean_probability: float
    area_um2: float
    region: str


def write_geojson(
    path: Path,
    areas: Iterable[Outlined],
    *,
    label: str,
    object_type: ObjectType,
    offset_xy_level0_px: tuple[int, int],
    about: dict[str, Any],
) -> None:
    """Write areas in one step.

    Parameters
    ----------
    path : Path
    areas : iterable of Outlined
    label : str
        Class of all of them.
    object_type : ``annotation`` or ``detection``
    offset_xy_level0_px : x, y
        Where the coordinates of the file begin on the canvas.
    about : dict
        Where they come from; stands at the beginning, QuPath passes over it.
    """
    head = json.dumps({"type": "FeatureCollection", "counterstain": about}, ensure_ascii=False)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(head[:-1] + ', "features": [')
        for number, area in enumerate(areas):
            feature = _feature(area, offset_xy_level0_px, str(uuid.uuid5(_NAMESPACE, f"{about} {number}")))
            feature["properties"] |= {
                "objectType": object_type,
                "classification": {"name": label, "color": list(TUMOUR_COLOUR)},
            }
            file.write((",\n" if number else "\n") + json.dumps(feature, ensure_ascii=False, allow_nan=False))
        file.write("\n]}\n")


def is_written(path: Path, fingerprint: str) -> bool:
    """Whether a file holds the areas that this fingerprint, part of its ``about``, stands for."""
    with path.open("rb") as file:
        return fingerprint.encode() in file.read(HEAD_BYTES)


def _feature(area: Outlined, offset: tuple[int, int], identifier: str) -> dict[str, Any]:
    rings = [area.polygon.exterior, *area.polygon.interiors]
    measurements = {
        "Mean probability": round(area.mean_probability, 4),
        "Area um^2": round(area.area_um2, 2),
    }
    return {
        "type": "Feature",
        "id": identifier,
        "geometry": {
            "type": "Polygon",
            "coordinates": [np.round(np.asarray(ring.coords) - offset, DECIMALS).tolist() for ring in rings],
        },
        "properties": {
            "isLocked": False,
            "measurements": [{"name": name, "value": value} for name, value in measurements.items()],
            "metadata": {"region": area.region},
        },
    }
