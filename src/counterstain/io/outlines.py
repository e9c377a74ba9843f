"""Outlines of areas: from probabilities, tile by tile, or from instances to polygons in a GeoJSON file.

An area is one polygon, across tiles and with its holes. Only one tile is in memory at a time.

Shapes: h, w = rows and columns of samples, n = pieces. Coordinates are pixels of the image, x to the right, y
downwards; pixel (row 0, column 0) covers x 0..1 and y 0..1, its probability is that of its centre.
"""

from __future__ import annotations

import hashlib
import json
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import shapely
from contourpy import FillType, contour_generator
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from shapely import MultiPolygon, Polygon
from shapely.geometry import mapping, shape

from counterstain.data.patches import instance_boxes
from counterstain.data.region_store import bands_of
from counterstain.errors import CounterstainWarning, MismatchError
from counterstain.io.annotations.outlines import polygonal
from counterstain.io.regions import rasterise
from counterstain.storage import first_difference, read_json, replacing

TILE_WINDOWS = 8  # windows of a tile along one axis
# Outlines may move by this much, which leaves a sixth of their corners. Half a pixel would halve these again, but take
# a tenth off the area of something 5 px wide.
SIMPLIFY_PX = 0.25
ABOVE_ALL = 2.0  # no probability is above it


class Span(NamedTuple):
    """A tile along one axis, in pixels of the image."""

    read_from: int  # first pixel that is read; negative before the edge of the image
    read_px: int  # pixels that are read: whole windows
    start: int  # first pixel of the tile's own
    stop: int
    """End of the tile's own pixels; pixel ``stop`` itself is known too unless the image ends, so that outlines meet."""
    last: bool = True  # whether the image ends here


def spans(length: int, size_px: int, overlap_px: int, tile_windows: int = TILE_WINDOWS) -> list[Span]:
    """Cut one axis of an image into tiles, such that no pixel's probability depends on its tile.

    All tiles take their windows from one grid over the image. A tile owns the pixels all of whose windows it reads;
    neighbouring tiles share the windows on their seam. The first window begins ``overlap_px`` before the image. A tile
    has more than ``tile_windows`` windows where they overlap so much that it would make no progress.
    """
    stride = size_px - overlap_px
    windows = max(1, -(-(length + overlap_px - size_px) // stride) + 1)
    per_tile = max(tile_windows, 2 * -(-size_px // stride))
    found: list[Span] = []
    first = start = 0
    while not found or not found[-1].last:
        last = min(first + per_tile, windows) - 1
        ends = last == windows - 1
        stop = length if ends else (last + 1) * stride - overlap_px - 1
        found.append(Span(first * stride - overlap_px, (last - first) * stride + size_px, start, stop, ends))
        start = stop
        first = max(0, (stop + overlap_px - size_px) // stride + 1)  # the first window that shows pixel ``stop``
    return found


class Piece(NamedTuple):
    """The part of an area of tumour in one tile."""

    polygon: Polygon
    probability_sum: float  # over the pixels whose centres it covers
    pixels: int
    subtype: int = 0  # 0 where subtypes are not told


class Area(NamedTuple):
    """An area of tumour."""

    polygon: Polygon
    mean_probability: float


def pieces(probability: np.ndarray, rows: Span, columns: Span, threshold: float) -> Iterator[Piece]:
    """Outline the pixels at or above a threshold in one tile.

    Outlines interpolate between pixel centres, so that exactly the pixels above the threshold have their centres inside
    (a pixel at the threshold has it on the outline). Tiles meet on the line through the centres of their shared pixels.
    ``probability`` is that of all pixels that were read, (rows.read_px, columns.read_px) float.
    """
    known = probability[_known(rows, len(probability)), _known(columns, probability.shape[1])]
    if known.max() < threshold:
        return
    y, x = (span.start + 0.5 + np.arange(length) for span, length in zip((rows, columns), known.shape, strict=True))
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
    """Unite polygons that touch, (n,) -> (m,); one union of all would take hours on a large slide."""
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


def instance_outlines(instances: np.ndarray) -> Iterator[tuple[int, Polygon | MultiPolygon]]:
    """Yield id and outline of every instance of a map, (H, W) integer, in its own pixels.

    Painted again (:func:`counterstain.io.regions.rasterise`), outlines give the same map.
    """
    for instance, _, (y0, x0, y1, x1) in instance_boxes(bands_of(instances)):
        parts = mask_polygons(np.pad(instances[y0:y1, x0:x1] == instance, 1))
        whole = parts[0] if len(parts) == 1 else MultiPolygon(parts)
        yield instance, shapely.transform(whole, lambda xy, corner=(x0 - 1, y0 - 1): xy + corner)


def _known(span: Span, length: int) -> slice:
    """Return the samples of a tile, including the one that it shares with the next tile."""
    stop = span.stop if span.last else span.stop + 1
    return slice(span.start - span.read_from, min(stop - span.read_from, length))


def _to_edge(centres: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """Extend the centres by half a pixel at the edges of the image."""
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


ObjectType = Literal["annotation", "detection"]
DECIMALS = 2  # of coordinates, in level-0 pixels
TUMOUR_COLOUR = (200, 0, 0)  # QuPath's own for tumour
PROBABILITY, AREA = "Mean probability", "Area um^2"  # measurements of an area
LONGEST_HEAD_BYTES = 2**20
_NAMESPACE = uuid.UUID("5f0c1bd4-6a40-4c1e-9f53-2d0f9b7d6a11")


RGB = tuple[int, int, int]


class Outlined(NamedTuple):
    """An area on a slide."""

    polygon: Polygon | MultiPolygon  # in level-0 pixels
    mean_probability: float | None  # None of what was not predicted
    area_um2: float
    label: str  # its class
    metadata: Mapping[str, str]  # what else is known of it


def on_slide(
    areas: Sequence[Area],
    *,
    corner_xy_level0_px: tuple[float, float],
    mpp: float,
    mpp_level0: float,
    label: str,
    region: str,
) -> Iterator[Outlined]:
    """Convert areas of a class from pixels of a region to level-0 pixels, rounded as they will be written.

    Parts too small to have an area after rounding are dropped.
    """
    for area in areas:
        moved = shapely.transform(area.polygon, lambda xy: xy * (mpp / mpp_level0) + corner_xy_level0_px)
        for part in shapely.get_parts(shapely.set_precision(moved, 10.0**-DECIMALS)):
            if part.area > 0:
                yield Outlined(part, area.mean_probability, part.area * mpp_level0**2, label, {"region": region})


def write_geojson(
    path: Path,
    areas: Iterable[Outlined],
    *,
    colours: Mapping[str, RGB],
    object_type: ObjectType,
    offset_xy_level0_px: tuple[int, int],
    about: dict[str, Any],
) -> None:
    """Write areas as GeoJSON that QuPath opens (File > Import objects, or dropped on the slide), in one step.

    ``colours`` are those of the classes, ``offset_xy_level0_px`` the origin of the file's coordinates on the canvas,
    ``about`` how the areas were made; it is written first and ignored by QuPath.
    """
    classes = {label: {"name": label, "color": list(colour)} for label, colour in colours.items()}
    digest = hashlib.sha256()
    with replacing(path) as partial, partial.open("wb") as file:

        def write(text: str) -> None:
            file.write(text.encode())
            digest.update(text.encode())

        write(_head(about))
        for number, area in enumerate(areas):
            identifier = str(uuid.uuid5(_NAMESPACE, f"{about} {number}"))
            shared = {"objectType": object_type, "classification": classes[area.label]}
            feature = _feature(area, offset_xy_level0_px, identifier, shared)
            write((",\n" if number else "\n") + json.dumps(feature, ensure_ascii=False, allow_nan=False))
        file.write(_end(digest.hexdigest()))


def read_areas(path: Path) -> list[Outlined]:
    """Read the areas of a file of :func:`write_geojson`."""
    areas = []
    for feature in read_json(path)["features"]:
        properties = feature["properties"]
        known = {measured["name"]: measured["value"] for measured in properties["measurements"]}
        label, metadata = properties["classification"]["name"], properties["metadata"]
        polygon: Any = shape(feature["geometry"])
        areas.append(Outlined(polygon, known.get(PROBABILITY), known[AREA], label, metadata))
    return areas


def is_written(path: Path, about: dict[str, Any]) -> bool:
    """Whether a file holds the areas of :func:`write_geojson` with this ``about``, all of them.

    It does not where there is none, or one that was cut short. Raises MismatchError where it holds anything else, or
    was changed since it was written.
    """
    if not path.exists():
        return False
    if not path.is_file():
        raise MismatchError(f"{path}: is no file; give another --out, or move it away")
    head, length = _head(about).encode(), len(_end("0" * 64))
    with path.open("rb") as file:
        begun = file.read(len(head))
        if begun != head and not head.startswith(begun):
            raise MismatchError(f"{path}: {_difference(path, about)}; give another --out, or delete it")
        body = path.stat().st_size - length
        digest, left = hashlib.sha256(head), body - len(head)
        while left > 0 and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
        end = file.read()
    if left == 0 and end == _end(digest.hexdigest()):
        return True
    if end.endswith(b"}\n"):
        raise MismatchError(
            f"{path}: was changed since it was written, or is of an earlier version; give another --out, or delete it "
            "to have it made again"
        )
    warnings.warn(f"{path}: was cut short; it is made again", CounterstainWarning, stacklevel=2)
    return False


def _head(about: dict[str, Any]) -> str:
    return json.dumps({"type": "FeatureCollection", "counterstain": about}, ensure_ascii=False)[:-1] + ', "features": ['


def _end(sha256: str) -> bytes:
    """Return the end of a file, with the hash of all that is before it; QuPath ignores it as it does the head."""
    return f'\n],\n"sha256": "{sha256}"}}\n'.encode()


def _difference(path: Path, about: dict[str, Any]) -> str:
    with path.open("rb") as file:
        first = file.readline(LONGEST_HEAD_BYTES)
    try:
        found = json.loads(first.decode().removesuffix("\n").removesuffix(', "features": [') + "}")["counterstain"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return "contains something else already"
    if not isinstance(found, dict):
        return "contains something else already"
    shared = {key: (found.get(key), about.get(key)) for key in sorted({*found, *about} - {"fingerprint"})}
    ours, theirs = ({key: pair[i] for key, pair in shared.items()} for i in (1, 0))
    of_what = " of other regions" if theirs == ours else first_difference(theirs, ours)
    return f"contains another prediction already{of_what}"


def _feature(area: Outlined, offset: tuple[int, int], identifier: str, shared: dict[str, Any]) -> dict[str, Any]:
    # QuPath before 0.4 reads measurements only as a list of names and values; later versions read that as well.
    probability = {} if area.mean_probability is None else {PROBABILITY: round(area.mean_probability, 4)}
    measurements = probability | {AREA: round(area.area_um2, 2)}
    properties = {
        "isLocked": False,
        "measurements": [{"name": name, "value": value} for name, value in measurements.items()],
        "metadata": dict(area.metadata),
    }
    polygon = shapely.transform(area.polygon, lambda xy: np.round(xy - offset, DECIMALS))
    return {"type": "Feature", "id": identifier, "geometry": mapping(polygon), "properties": properties | shared}
