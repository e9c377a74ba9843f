"""QuPath's GeoJSON, from the bare lists of version 0.2 to the FeatureCollections of 0.6.

A position is ``[x, y, …]`` in level-0 pixels. Classes are ``properties.classification`` with ``name`` and ``colorRGB``
(a signed integer, old) or ``color`` (a list, new); tools that write none put the class into ``properties.name``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from counterstain.errors import InputError
from counterstain.io.annotations.outlines import UNCLASSIFIED, AnnotationFile, Collector, Rings
from counterstain.io.annotations.safe_parsing import (
    MAX_COORDINATE_PX,
    MAX_DEPTH,
    colour_of_rgb,
    name,
    parse_json,
    shown,
    usable,
)

Json = Any

WITHOUT_AREA = {
    "Point": "point",
    "MultiPoint": "points",
    "LineString": "line",
    "MultiLineString": "lines",
}


def read_geojson(path: Path, data: bytes) -> AnnotationFile:
    """Read QuPath's GeoJSON.

    Raises
    ------
    InputError
        Names the feature and what is wrong with it.
    """
    collector = Collector(path, "qupath")
    for number, feature in enumerate(_features(parse_json(path, data), path), start=1):
        _add_feature(collector, feature, number)
    return collector.finish()


def _features(content: Json, path: Path) -> list[Json]:
    """Return the features of any of the layouts; a bare geometry is a feature without properties."""
    if isinstance(content, list):
        return content
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "FeatureCollection":
        return _list(content, "features", str(path))
    if kind == "Feature":
        return [content]
    if kind == "GeometryCollection":
        geometries = _list(content, "geometries", str(path))
        return [{"type": "Feature", "geometry": geometry} for geometry in geometries]
    if isinstance(kind, str) and kind in {"Polygon", "MultiPolygon", *WITHOUT_AREA}:
        return [{"type": "Feature", "geometry": content}]
    raise InputError(
        f"{path}: expected QuPath's GeoJSON (a FeatureCollection, a Feature, a geometry or a list of features), "
        f"found {shown(kind) if isinstance(content, dict) else shown(content)}; "
        "export with File > Export objects as GeoJSON"
    )


def _add_feature(collector: Collector, feature: Json, number: int) -> None:
    where = f"{collector.path} feature {number}"
    if not isinstance(feature, dict) or feature.get("type") != "Feature":
        found = feature.get("type") if isinstance(feature, dict) else feature
        raise InputError(f"{where}: expected type Feature, found {shown(found)}; export it again")
    properties = _mapping(feature, "properties", where)
    label, colour = _class(properties, where)
    geometry = feature.get("geometry")
    if geometry is None:
        collector.skip("object without geometry")
        return
    parts = list(_parts(collector, geometry, where, depth=0))
    if parts:
        identifier = feature.get("id", number)
        if not isinstance(identifier, str | int):
            raise InputError(f"{where} id: expected text or an integer, found {shown(identifier)}; export it again")
        polygon = collector.polygon(parts, where)
        collector.add(polygon, identifier=name(str(identifier), where), label=label, colour=colour)


def _class(properties: dict[str, Json], where: str) -> tuple[str, str | None]:
    """Return label and colour."""
    classification = _mapping(properties, "classification", f"{where} properties")
    given = classification.get("name")
    if given is None and isinstance(classification.get("names"), list):  # a derived class, outermost first
        given = ": ".join(name(part, f"{where} classification") for part in classification["names"])
    if given is None and not classification:
        given = properties.get("name")
    label = name(given, f"{where} class") if given is not None else UNCLASSIFIED
    return label or UNCLASSIFIED, _colour(classification) or _colour(properties)


def _colour(owner: dict[str, Json]) -> str | None:
    packed, channels = owner.get("colorRGB"), owner.get("color")
    if isinstance(channels, list) and len(channels) == 3:
        return colour_of_rgb(*channels)
    if type(packed) is int and abs(packed) < 2**32:  # Java's ARGB, signed
        return f"#{packed & 0xFFFFFF:06x}"
    return None


def _parts(collector: Collector, geometry: Json, where: str, depth: int) -> Iterator[Rings]:
    """Yield a geometry's polygons as rings; what has no area is skipped."""
    if not isinstance(geometry, dict):
        raise InputError(f"{where} geometry: expected a GeoJSON geometry, found {shown(geometry)}; export it again")
    kind = geometry.get("type")
    if kind == "Polygon":
        yield _rings(collector, _list(geometry, "coordinates", where), where)
    elif kind == "MultiPolygon":
        for number, polygon in enumerate(_list(geometry, "coordinates", where), start=1):
            yield _rings(collector, polygon, f"{where} part {number}")
    elif kind == "GeometryCollection" and depth < MAX_DEPTH:
        for member in _list(geometry, "geometries", where):
            yield from _parts(collector, member, where, depth + 1)
    elif isinstance(kind, str) and kind in WITHOUT_AREA:
        collector.skip(WITHOUT_AREA[kind])
    else:
        raise InputError(f"{where} geometry: unknown type {shown(kind)}; expected Polygon or MultiPolygon")


def _rings(collector: Collector, rings: Json, where: str) -> Rings:
    if not isinstance(rings, list) or not rings:
        raise InputError(f"{where}: expected a polygon's outline and its holes, found {shown(rings)}; export it again")
    return [_ring(collector, ring, f"{where} ring {number}") for number, ring in enumerate(rings, start=1)]


def _ring(collector: Collector, ring: Json, where: str) -> np.ndarray:
    if not isinstance(ring, list):
        raise InputError(f"{where}: expected a list of points, found {shown(ring)}; export it again")
    collector.count_points(len(ring))
    for number, point in enumerate(ring, start=1):
        if not (isinstance(point, list) and len(point) >= 2 and usable(point[0]) and usable(point[1])):
            raise InputError(
                f"{where} point {number}: expected x and y in level-0 pixels, at most {MAX_COORDINATE_PX:,} either "
                f"way, found {shown(point)}; correct it or export it again"
            )
    return np.array([point[:2] for point in ring], float).reshape(-1, 2)


def _list(owner: dict[str, Json], key: str, where: str) -> list[Json]:
    value = owner.get(key)
    if not isinstance(value, list):
        raise InputError(f"{where} {key}: expected a list, found {shown(value)}; export it again")
    return value


def _mapping(owner: dict[str, Json], key: str, where: str) -> dict[str, Json]:
    value = owner.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where} {key}: expected an object, found {shown(value)}; export it again")
    return value
