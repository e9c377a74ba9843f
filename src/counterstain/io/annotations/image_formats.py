"""Annotations of single images, saved as JSON: COCO's, labelme's, and lists of points.

COCO has one file for many images: ``images`` (id, file_name), ``categories`` (id, name) and ``annotations`` (image_id,
category_id, segmentation), where a segmentation is a list of flat outlines ``[x1, y1, x2, y2, …]`` or a mask in runs,
``{"size": [height, width], "counts": …}``, column by column. labelme has a file for each image; shapes of one label and
one ``group_id`` are one instance. Points are ``[{"x": 4, "y": 7, "label_id": 1}, …]``, as of SHIDC-B-Ki-67.
Coordinates are pixels of the image, pixel (column 0, row 0) covers x 0..1 and y 0..1.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from PIL import Image

from counterstain.errors import InputError
from counterstain.io.annotations.outlines import AnnotationFile, Area, Collector, Rings, ellipse, rectangle
from counterstain.io.annotations.safe_parsing import (
    COORDINATE,
    OddObjectError,
    expect,
    file_name,
    identifier,
    name,
    parse_json,
    shown,
    usable,
)

Json = Any
Row = dict[str, Json]

MOST_PIXELS, MOST_BITS = 2**28, 40  # of a mask in runs, and of one run
WITHOUT_AREA = {"point": "point", "points": "points", "line": "line", "linestrip": "line"}
CROWD = "ignore"  # what becomes of COCO's crowds, whose instances nobody outlined
POINT = "point (discs are drawn with --point-um)"


def read_coco(path: Path, data: bytes) -> AnnotationFile:
    """Read the annotations of a COCO file with the names of their images; errors name the annotation."""
    content, collector = coco_content(path, data), Collector(path)
    images = _by_id(content["images"], f"{path} images")
    for row in images.values():
        _add_size(collector, file_name(row.get("file_name"), f"{path} file_name"), row.get("height"), row.get("width"))
    categories = _by_id(content["categories"], f"{path} categories")
    for number, found in enumerate(content["annotations"], start=1):
        where = f"{path} annotation {number}"
        try:
            row = expect(found, dict, where, "an object")
            image = _referred(row, "image_id", images, where)
            category = _referred(row, "category_id", categories, where)
            _check_runs(row.get("segmentation"), image, where)
            label = CROWD if row.get("iscrowd") else name(category.get("name"), f"{where} category name")
            collector.add(
                _outlined(collector, row.get("segmentation"), where),
                identifier=identifier(row.get("id"), number),
                label=label,
                slide=file_name(image.get("file_name"), f"{where} file_name"),
                number=image.get("id"),
            )
        except OddObjectError as error:
            collector.odd(error)
    return collector.finish()


def _add_size(collector: Collector, image: str | None, height: Json, width: Json) -> None:
    if type(height) is int and type(width) is int:
        collector.sizes[image] = (height, width)


def coco_content(path: Path, data: bytes) -> dict[str, list[Json]]:
    """Return images, categories and annotations of a COCO file; InputError where one is not there."""
    content = expect(parse_json(path, data), dict, str(path), "a COCO file")
    for part in ("images", "categories", "annotations"):
        if not isinstance(content.get(part), list):
            raise InputError(
                f"{path}: no list of {part}; expected COCO's images, categories and annotations with segmentations"
            )
    return content


def _by_id(rows: Sequence[Json], where: str) -> dict[int | str, Row]:
    found: dict[int | str, Row] = {}
    for row in rows:
        key = coco_id(row.get("id")) if isinstance(row, dict) else None
        if key is None or key in found:
            given = shown(row.get("id") if isinstance(row, dict) else row)
            raise InputError(f"{where}: id {given} is {'there twice' if key in found else 'no id'}; export it again")
        found[key] = row
    return found


def coco_id(value: Json) -> int | str | None:
    """Return an id as COCO files refer to it, whole numbers as integers (pandas writes 1.0); None where it is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _referred(row: Row, key: str, rows: dict[Any, Row], where: str) -> Row:
    found = rows.get(coco_id(row.get(key)))
    if found is None:
        raise OddObjectError(f"{where}: {key} {shown(row.get(key))} is not in the file; export it again")
    return found


def _check_runs(segmentation: Json, image: Row, where: str) -> None:
    size, sides = segmentation.get("size") if isinstance(segmentation, dict) else None, ("height", "width")
    if isinstance(size, list) and all(type(image.get(side)) is int for side in sides):
        height, width = (image[side] for side in sides)
        if size != [height, width]:
            raise OddObjectError(
                f"{where} segmentation: a mask of {' x '.join(map(str, size))} in an image of {height} x {width} "
                "(height x width); export it again"
            )


def _outlined(collector: Collector, segmentation: Json, where: str) -> Area | None:
    if not segmentation:
        collector.skip("box without an outline")
        return None
    if isinstance(segmentation, dict):
        parts = list(_runs(segmentation, where))
    else:
        outlines = expect(segmentation, list, f"{where} segmentation", "outlines or a mask in runs")
        parts = [[_flat(collector, outline, where)] for outline in outlines]
    return collector.polygon(parts, where) if parts else None


def _flat(collector: Collector, outline: Json, where: str) -> np.ndarray:
    numbers = expect(outline, list, f"{where} segmentation", "x1, y1, x2, y2, …")
    collector.count_points(len(numbers) // 2)
    if len(numbers) % 2 or not all(map(usable, numbers)):
        raise OddObjectError(f"{where} segmentation: expected pairs of numbers, each {COORDINATE}; export it again")
    return np.array(numbers, float).reshape(-1, 2)


def _runs(segmentation: Row, where: str) -> Iterator[Rings]:
    """Yield the outline of a mask in runs, compressed or not."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    sized = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    height, width = size if sized and isinstance(size, list) else (0, 0)
    if not 0 < height * width <= MOST_PIXELS or not isinstance(counts, list | str):
        raise OddObjectError(f"{where} segmentation: expected a mask in runs with its size and counts; export it again")
    if isinstance(counts, str):
        counts = _unpacked(counts)
    if not all(type(run) is int and run >= 0 for run in counts) or sum(counts) != height * width:
        raise OddObjectError(f"{where} segmentation: its runs are not {height} x {width} pixels; export it again")
    inside = np.repeat(np.arange(len(counts)) % 2, counts)
    yield from mask_outlines(inside.reshape(width, height).T, 0, 0)


def _unpacked(text: str) -> list[int]:
    """Return the runs of a compressed mask: numbers of 5 bits a character, from the third on as differences to the one
    before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32 and shift < MOST_BITS:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def mask_outlines(mask: np.ndarray, x: float, y: float) -> Iterator[Rings]:
    """Yield outlines along the edges of the pixels of an (H, W) mask whose corner lies at x, y."""
    edges = np.diff(np.pad(mask.astype(bool).astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    _, ends = np.nonzero(edges == -1)
    whole = shapely.union_all(shapely.box(x + starts, y + rows, x + ends, y + rows + 1))
    for polygon in shapely.get_parts(whole):
        yield [np.asarray(ring.coords) for ring in (polygon.exterior, *polygon.interiors)]


def read_labelme(path: Path, data: bytes, point_px: float | None = None) -> AnnotationFile:
    """Read the shapes of a labelme file; points become discs ``point_px`` wide, where that is given."""
    content = expect(parse_json(path, data), dict, str(path), "a labelme file")
    collector = Collector(path)
    _add_size(collector, None, content.get("imageHeight"), content.get("imageWidth"))
    if isinstance(content.get("imagePath"), str):
        collector.image = content["imagePath"]
    instances: dict[Any, tuple[str, list[Rings]]] = {}
    for number, found in enumerate(expect(content.get("shapes"), list, f"{path} shapes", "a list"), start=1):
        where = f"{path} shape {number}"
        try:
            shape = expect(found, dict, where, "an object")
            label = name(shape.get("label"), f"{where} label")
            group = shape.get("group_id")
            key = number if group is None else (label, str(group))
            instances.setdefault(key, (label, []))[1].extend(_shape(collector, shape, where, point_px))
        except OddObjectError as error:
            collector.odd(error)
    for number, (label, parts) in enumerate(instances.values(), start=1):
        if parts:
            collector.add(collector.polygon(parts, f"{path} {label}"), identifier=str(number), label=label)
    return collector.finish()


def _shape(collector: Collector, shape: Row, where: str, point_px: float | None) -> Iterator[Rings]:
    kind = shape.get("shape_type", "polygon")
    given = expect(shape.get("points"), list, f"{where} points", "a list")
    if not all(isinstance(point, list) and len(point) == 2 and all(map(usable, point)) for point in given):
        raise OddObjectError(f"{where} points: expected pairs of numbers, each {COORDINATE}; export it again")
    collector.count_points(len(given))
    points = np.array(given, float).reshape(-1, 2)
    if kind in WITHOUT_AREA:
        if kind.startswith("point") and point_px is not None:
            yield from ([disc(point, point_px)] for point in points)
        else:
            collector.skip(POINT if kind.startswith("point") else WITHOUT_AREA[kind])
    elif kind in {"polygon", "oriented_rectangle"}:
        yield [points]
    elif kind == "rectangle" and len(points) in {2, 4}:
        yield [rectangle(points)]
    elif kind == "circle" and len(points) == 2:
        yield [disc(points[0], 2 * float(np.hypot(*(points[1] - points[0]))))]
    elif kind == "mask" and len(points) == 2:
        (x, y), mask = points.min(axis=0).tolist(), _bitmap(shape.get("mask"), where)
        box = np.abs(points[1] - points[0])[::-1] + 1  # its last pixels are inside
        if np.abs(mask.shape - box).max() > 1:
            found, expected = (" x ".join(f"{side:.0f}" for side in sides) for sides in (mask.shape, box))
            raise OddObjectError(f"{where}: a mask of {found} in a box of {expected} (height x width); draw it again")
        yield from mask_outlines(mask, x, y)
    else:
        raise OddObjectError(f"{where}: {shown(kind)} of {len(points)} points is not known; draw it as a polygon")


def _bitmap(given: Json, where: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(base64.b64decode(given, validate=True)), formats=["PNG"]) as image:
            return np.asarray(image.convert("L")) > 0
    except (TypeError, ValueError, OSError, binascii.Error, Image.DecompressionBombError) as error:
        raise OddObjectError(f"{where} mask: expected a PNG in base64; export it again") from error


def disc(centre: np.ndarray, width: float) -> np.ndarray:
    """Return the outline of a disc around a point."""
    return ellipse(np.stack([centre - width / 2, centre + width / 2]))


def read_points(path: Path, data: bytes, point_px: float | None = None) -> AnnotationFile:
    """Read a list of points with the number of their class; they become discs ``point_px`` wide, where it is given."""
    collector = Collector(path)
    for number, row in enumerate(expect(parse_json(path, data), list, str(path), "a list of points"), start=1):
        where = f"{path} point {number}"
        given = row if isinstance(row, dict) else {}
        x, y, label = (given.get(key) for key in ("x", "y", "label_id"))
        if not usable(x) or not usable(y) or not isinstance(label, int | str):
            collector.odd(OddObjectError(f"{where}: expected x, y and label_id, found {shown(row)}; export it again"))
            continue
        if point_px is None:
            collector.skip(POINT)
            continue
        outline = collector.polygon([[disc(np.array([x, y], float), point_px)]], where)
        collector.add(outline, identifier=str(number), label=name(str(label), where))
    return collector.finish()
