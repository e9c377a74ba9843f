"""Annotations saved as JSON: QuPath's GeoJSON and the rows of EXACT's server.

QuPath writes bare lists (version 0.2) to FeatureCollections (0.6). A position is ``[x, y, …]`` in level-0 pixels.
Classes are ``properties.classification``, text or an object with a ``name``; tools that write none put the class into
``properties.name``. Whether an object is an annotation or a detection is ``properties.objectType``; version 0.3 called
it ``object_type``, and 0.2 wrote the name of a Java class for the ``id``.

EXACT answers ``/api/v1/annotations/annotations/`` with rows, paged or not, of one image or many. A row's ``vector`` is
an object ``{"x1": 10, "y1": 20, "x2": …}`` in level-0 pixels, or null. Types and images are numbers, or objects if
the request said ``expand=``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from counterstain.errors import InputError
from counterstain.io.annotations.outlines import UNCLASSIFIED, AnnotationFile, Collector, Rings, rectangle
from counterstain.io.annotations.safe_parsing import (
    COORDINATE,
    MAX_DEPTH,
    OddObjectError,
    expect,
    file_name,
    identifier,
    name,
    parse_json,
    read_bytes,
    shown,
    usable,
)

Json = Any
Row = dict[str, Json]

QUPATH_WITHOUT_AREA = {"Point": "point", "MultiPoint": "points", "LineString": "line", "MultiLineString": "lines"}
ANNOTATION = "annotation"
OBJECTS = (ANNOTATION, "detection", "cell", "tile", "tma_core")  # of QuPath
JAVA_CLASSES = {f"Path{name.title()}Object": name for name in OBJECTS} | {"TMACoreObject": "tma_core"}
EMPTY = "object without geometry"
BOX, POINT, FIXED_BOX = 1, 2, 6
EXACT_WITHOUT_AREA = {POINT: "point", 3: "line", 4: "lines", 7: "label of the whole image", 8: "pixel segmentation"}
NO_VECTOR = "row without outline (vector is null)"
DELETED = "deleted row"
AMBIGUOUS = "two points of a type that is only a number (a box or a line?)"
AXIS = re.compile(r"([xy])([1-9][0-9]{0,6})")


def read_geojson(path: Path, data: bytes, objects: Collection[str] = (ANNOTATION,)) -> AnnotationFile:
    """Read QuPath's GeoJSON: objects of the types ``objects``, which are of OBJECTS, and those that say no type.

    Errors name the feature and what is wrong with it.
    """
    collector = Collector(path)
    for number, feature in enumerate(_features(parse_json(path, data), path), start=1):
        try:
            _add_feature(collector, feature, number, objects)
        except OddObjectError as error:
            collector.odd(error)
    return collector.finish()


def _features(content: Json, path: Path) -> list[Json]:
    """Return the features of any of the layouts; a bare geometry is a feature without properties."""
    if isinstance(content, list):
        return content
    kind = expect(content, dict, str(path), "GeoJSON").get("type") if isinstance(content, dict) else None
    if kind == "FeatureCollection":
        return expect(content.get("features"), list, f"{path} features", "a list")
    if kind == "Feature":
        return [content]
    if kind == "GeometryCollection":
        geometries = expect(content.get("geometries"), list, f"{path} geometries", "a list")
        return [{"type": "Feature", "geometry": geometry} for geometry in geometries]
    if isinstance(kind, str) and kind in {"Polygon", "MultiPolygon", *QUPATH_WITHOUT_AREA}:
        return [{"type": "Feature", "geometry": content}]
    raise InputError(
        f"{path}: expected QuPath's GeoJSON (a FeatureCollection, a Feature, a geometry or a list of features), "
        f"found {shown(kind) if isinstance(content, dict) else shown(content)}; "
        "export with File > Export objects as GeoJSON"
    )


def _add_feature(collector: Collector, feature: Json, number: int, objects: Collection[str]) -> None:
    where = f"{collector.path} feature {number}"
    if expect(feature, dict, where, "an object of type Feature").get("type") != "Feature":
        raise OddObjectError(f"{where}: expected type Feature, found {shown(feature.get('type'))}; export it again")
    properties = expect(feature.get("properties") or {}, dict, f"{where} properties", "an object")
    kind = properties.get("objectType", properties.get("object_type"))
    kind = kind or JAVA_CLASSES.get(str(feature.get("id")), ANNOTATION)
    if kind not in objects:
        known = f"{kind} (imported with --objects {','.join((*objects, str(kind)))})"
        collector.skip(known if kind in OBJECTS else f"object of type {shown(kind)}")
        return
    label = _class(properties, where)
    if feature.get("geometry") is None:
        collector.skip(EMPTY)
        return
    skipped = collector.skips
    parts = list(_parts(collector, feature["geometry"], where, depth=0))
    if parts:
        polygon = collector.polygon(parts, where)
        collector.add(polygon, identifier=identifier(feature.get("id"), number), label=label)
        if colour := _colour(properties.get("classification")):
            collector.colours.setdefault(label, colour)
    elif collector.skips == skipped:
        collector.skip(EMPTY)


def _class(properties: dict[str, Json], where: str) -> str:
    classification = properties.get("classification") or {}
    if isinstance(classification, str):
        return name(classification, f"{where} class")
    classification = expect(classification, dict, f"{where} properties classification", "a name or an object")
    given = classification.get("name")
    if given is None and isinstance(classification.get("names"), list):  # a derived class, outermost first
        given = ": ".join(name(part, f"{where} classification") for part in classification["names"])
    if given is None and not classification:
        given = properties.get("name")
    return name(given, f"{where} class") if given is not None else UNCLASSIFIED


def _colour(classification: Json) -> str | None:
    """Return the colour of a class as #rrggbb: its ``color``, [r, g, b], or the number ``colorRGB`` of old versions."""
    found = classification if isinstance(classification, dict) else {}
    rgb, packed = found.get("color"), found.get("colorRGB")
    if type(packed) is int and -(2**31) <= packed < 2**31:
        return f"#{packed & 0xFFFFFF:06x}"
    if isinstance(rgb, list) and len(rgb) == 3 and all(type(value) is int and 0 <= value <= 255 for value in rgb):
        return "#{:02x}{:02x}{:02x}".format(*rgb)
    return None


def _parts(collector: Collector, geometry: Json, where: str, depth: int) -> Iterator[Rings]:
    """Yield a geometry's polygons as rings; what has no area is skipped."""
    kind = expect(geometry, dict, f"{where} geometry", "a GeoJSON geometry").get("type")
    if kind in ("Polygon", "MultiPolygon"):
        coordinates = expect(geometry.get("coordinates"), list, f"{where} coordinates", "a list")
        if kind == "Polygon" and coordinates:
            yield _rings(collector, coordinates, where)
        elif kind == "MultiPolygon":
            parts = ((f"{where} part {number}", part) for number, part in enumerate(coordinates, start=1))
            yield from (_rings(collector, part, place) for place, part in parts if part != [])
    elif kind == "GeometryCollection" and depth < MAX_DEPTH:
        for member in expect(geometry.get("geometries"), list, f"{where} geometries", "a list"):
            yield from _parts(collector, member, where, depth + 1)
    elif isinstance(kind, str) and kind in QUPATH_WITHOUT_AREA:
        collector.skip(QUPATH_WITHOUT_AREA[kind])
    else:
        raise OddObjectError(f"{where} geometry: unknown type {shown(kind)}; expected Polygon or MultiPolygon")


def _rings(collector: Collector, rings: Json, where: str) -> Rings:
    rings = expect(rings, list, where, "a polygon's outline and its holes")
    return [_ring(collector, ring, f"{where} ring {number}") for number, ring in enumerate(rings, start=1)]


def _ring(collector: Collector, ring: Json, where: str) -> np.ndarray:
    collector.count_points(len(expect(ring, list, where, "a list of points")))
    for number, point in enumerate(ring, start=1):
        if not (isinstance(point, list) and len(point) >= 2 and usable(point[0]) and usable(point[1])):
            raise OddObjectError(
                f"{where} point {number}: expected x and y, each {COORDINATE}, found {shown(point)}; correct it or "
                "export it again"
            )
    return np.array([point[:2] for point in ring], float).reshape(-1, 2)


class ExactType(NamedTuple):
    """An annotation type of EXACT."""

    name: str
    vector_type: int | None = None
    product: str | None = None


def read_exact(path: Path, data: bytes, types: Path | None = None) -> AnnotationFile:
    """Read saved rows of EXACT.

    ``types`` are saved rows of ``/api/v1/annotations/annotation_types/``, or a JSON object type id -> name,
    for rows whose type is only a number; such types are otherwise called ``type 7``. Errors name the row and what is
    wrong with it, or that pages are missing.
    """
    collector, rows = Collector(path), []
    known = _read_types(types) if types is not None else {}
    used: set[str] = set()
    for number, found in enumerate(_rows(parse_json(path, data), path), start=1):
        try:
            row, where = _row(found, f"{path} row {number}"), f"{path} row {number} annotation_type"
            if row.get("annotation_type") is not None:
                used.add(_id(row["annotation_type"], where))
            if isinstance(row.get("annotation_type"), dict):
                known[_id(row["annotation_type"], where)] = _type(row["annotation_type"], where)
        except OddObjectError as error:
            collector.odd(error)
        else:
            rows.append((number, row))
    labels = _labels({type_id: known[type_id] for type_id in used if type_id in known})
    for number, row in rows:
        try:
            _add_row(collector, row, number, known, labels)
        except OddObjectError as error:
            collector.odd(error)
    return collector.finish()


def _read_types(path: Path) -> dict[str, ExactType]:
    content = parse_json(path, read_bytes(path))
    if isinstance(content, dict) and "results" not in content:
        return {str(key): ExactType(name(value, f"{path} {shown(key)}")) for key, value in content.items()}
    rows = [(f"{path} row {number}", row) for number, row in enumerate(_rows(content, path), start=1)]
    return {_id(_row(row, where), where): _type(row, f"{where} annotation_type") for where, row in rows}


def _rows(content: Json, path: Path) -> list[Json]:
    """Return the rows of one page, a list of pages or a bare list."""
    pages = content if isinstance(content, list) else [content]
    if all(isinstance(page, dict) and "results" in page for page in pages) and pages:
        rows: list[Json] = []
        for number, page in enumerate(pages, start=1):
            rows += expect(page["results"], list, f"{path} page {number} results", "a list")
        _check_complete(pages, len(rows), path)
        return rows
    return pages


def _row(found: Json, where: str) -> Row:
    if not isinstance(found, dict) or not {"annotation_type", "vector", "vector_type"} & found.keys():
        raise OddObjectError(
            f"{where}: expected a row of EXACT's API with annotation_type and vector, found {shown(found)}; save what "
            "/api/v1/annotations/annotations/ answers"
        )
    return expect(found, dict, where, "a row")


def _check_complete(pages: list[dict[str, Json]], rows: int, path: Path) -> None:
    count = pages[0].get("count")
    expected = count if type(count) is int else rows
    if rows < expected or (len(pages) == 1 and type(count) is not int and pages[0].get("next")):
        total = f" of {expected:,}" if rows < expected else ""
        raise InputError(
            f"{path}: holds {rows:,}{total} rows, pages are missing; save every page into one list, or ask the server "
            "with a limit above the count"
        )


def _add_row(
    collector: Collector, row: Row, number: int, known: Mapping[str, ExactType], labels: Mapping[str, str]
) -> None:
    where = f"{collector.path} row {number}"
    given = row.get("annotation_type")
    type_id = "" if given is None else _id(given, f"{where} annotation_type")
    exact_type = known.get(type_id, ExactType(f"type {type_id}" if type_id else UNCLASSIFIED))
    kind = exact_type.vector_type
    if not isinstance(row.get("deleted", False), bool | None):
        raise OddObjectError(f"{where} deleted: expected true or false, found {shown(row['deleted'])}; save it again")
    reason = DELETED if row.get("deleted") else EXACT_WITHOUT_AREA.get(kind or 0)
    if reason or row.get("vector") in (None, {}):
        collector.skip(reason or NO_VECTOR)
        return
    points = _points(collector, row["vector"], f"{where} vector")
    if kind is None and len(points) <= 2:
        collector.skip(AMBIGUOUS if len(points) == 2 else EXACT_WITHOUT_AREA[POINT])
        return
    collector.add(
        collector.polygon([[rectangle(points) if kind in {BOX, FIXED_BOX} else points]], where),
        identifier=identifier(row.get("unique_identifier") or row.get("id"), number),
        label=labels.get(type_id, exact_type.name),
        slide=_slide(row.get("image"), f"{where} image"),
        number=row["image"].get("id") if isinstance(row.get("image"), dict) else row.get("image"),
    )


def _points(collector: Collector, vector: Json, where: str) -> np.ndarray:
    """Return the points of ``{"x1": …, "y1": …, …}``, (n, 2) float, in the order of their numbers."""
    vector = expect(vector, dict, where, 'an object {"x1": …, "y1": …} or null')
    count = len(vector) // 2
    collector.count_points(count)
    xy = np.full((count, 2), np.nan)
    for key, value in vector.items():
        match = AXIS.fullmatch(key)
        if match is None or int(match[2]) > count:
            raise OddObjectError(f"{where}: expected x1, y1, x2, y2, … in pairs without a gap, found {shown(key)}")
        if not usable(value):
            raise OddObjectError(
                f"{where} {key}: expected {COORDINATE}, found {shown(value)}; correct it or export it again"
            )
        xy[int(match[2]) - 1, "xy".index(match[1])] = value
    if np.isnan(xy).any():
        missing = int(np.flatnonzero(np.isnan(xy).any(axis=1))[0]) + 1
        raise OddObjectError(f"{where}: x{missing} or y{missing} is missing; correct it or export it again")
    return xy


def _labels(known: Mapping[str, ExactType]) -> dict[str, str]:
    """Return type id -> label: the type's name, with its product where two products share a name."""
    products: dict[str, set[str | None]] = {}
    for exact_type in known.values():
        products.setdefault(exact_type.name, set()).add(exact_type.product)
    return {
        type_id: f"{t.product}/{t.name}" if len(products[t.name]) > 1 and t.product is not None else t.name
        for type_id, t in known.items()
    }


def _type(row: Json, where: str) -> ExactType:
    product = row.get("product")
    if isinstance(product, dict):
        product = product.get("name") or product.get("id")
    vector_type = row.get("vector_type")
    return ExactType(
        name=name(row.get("name"), f"{where} name") or UNCLASSIFIED,
        vector_type=vector_type if type(vector_type) is int else None,
        product=name(str(product), f"{where} product") if isinstance(product, str | int) else None,
    )


def _id(given: Json, where: str) -> str:
    number = given.get("id") if isinstance(given, dict) else given
    if isinstance(number, bool) or not isinstance(number, str | int):
        raise OddObjectError(f"{where}: expected a number or an object with an id, found {shown(given)}; save it again")
    return name(str(number), where)


def _slide(image: Json, where: str) -> str | None:
    """Return the image's name, or ``image 12`` where the row holds a number alone."""
    if image is None:
        return None
    given = (image.get("name") or image.get("filename")) if isinstance(image, dict) else None
    if given is not None:
        return file_name(given, f"{where} name")
    number = file_name(_id(image, where), where)
    return None if number is None else f"image {number}"
