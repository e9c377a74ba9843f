import json

import pytest

from counterstain.errors import InputError
from counterstain.io.annotations import read_annotations

SQUARE = [[10, 10], [30, 10], [30, 30], [10, 30], [10, 10]]
HOLE = [[15, 15], [20, 15], [20, 20], [15, 20], [15, 15]]
FAR = [[50, 50], [60, 50], [60, 60], [50, 60], [50, 50]]
POLYGON = {"type": "Polygon", "coordinates": [SQUARE]}


def read(tmp_path, content):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(content))
    return read_annotations(path, "qupath")


def feature(geometry=POLYGON, **more):
    return {"type": "Feature", "geometry": geometry, "properties": {}, **more}


@pytest.mark.parametrize(
    "content",
    [
        [feature()],
        feature(),
        {"type": "FeatureCollection", "features": [feature()]},
        POLYGON,
        {"type": "GeometryCollection", "geometries": [POLYGON]},
        {"type": "MultiPolygon", "coordinates": [[SQUARE]]},
    ],
)
def test_every_layout_gives_the_same_polygon(tmp_path, content):
    (annotation,) = read(tmp_path, content).annotations
    assert annotation.polygon.bounds == (10, 10, 30, 30)
    assert (annotation.label, annotation.slide) == ("Unclassified", None)


def test_holes_and_parts_are_kept(tmp_path):
    many = {"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE], [FAR]]}
    (annotation,) = read(tmp_path, [feature(many)]).annotations
    assert annotation.polygon.area == 400 - 25 + 100


@pytest.mark.parametrize(
    ("properties", "label"),
    [
        ({"classification": {"name": "Tumor", "colorRGB": -3670016}}, "Tumor"),
        ({"classification": {"names": ["Tumor", "Positive"]}}, "Tumor: Positive"),
        ({"name": "UT", "color": [255, 0, 0]}, "UT"),
        ({"name": "my first", "classification": {"name": "Tumor"}}, "Tumor"),
        ({"classification": None}, "Unclassified"),
        ({"classification": {"name": ""}}, "Unclassified"),
        ({"classification": {"name": "a\n\u202eb", "color": "red"}, "measurements": [{"name": "x"}]}, "a b"),
    ],
)
def test_names_of_all_versions_are_understood(tmp_path, properties, label):
    assert read(tmp_path, [feature(properties=properties)]).labels == {label: 1}


def test_points_and_lines_and_empty_objects_are_counted(tmp_path):
    kinds = ("Point", "MultiPoint", "LineString", "MultiLineString")
    geometries = [{"type": kind, "coordinates": []} for kind in kinds]
    collection = {"type": "GeometryCollection", "geometries": [POLYGON, geometries[0]]}
    file = read(tmp_path, [*map(feature, geometries), feature(None), feature(collection)])
    assert [a.polygon.area for a in file.annotations] == [400]
    assert file.skipped == {"point": 2, "points": 1, "line": 1, "lines": 1, "object without geometry": 1}


def nested(depth):
    return {"type": "GeometryCollection", "geometries": [nested(depth - 1)]} if depth else POLYGON


def ring(*points):
    return feature({"type": "Polygon", "coordinates": [list(points)]})


def test_a_third_coordinate_is_left_out(tmp_path):
    (annotation,) = read(tmp_path, [ring(*([x, y, 7] for x, y in SQUARE))]).annotations
    assert not annotation.polygon.has_z


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"type": []}, r"found \[\]"),
        ({"type": "Topology"}, "expected QuPath's GeoJSON .* found 'Topology'"),
        ({"type": "FeatureCollection"}, "features: expected a list, found None"),
        ([7], "feature 1: expected type Feature, found 7"),
        ([feature("x")], "feature 1 geometry: expected a GeoJSON geometry, found 'x'"),
        ([feature({"type": "Circle"})], "feature 1 geometry: unknown type 'Circle'"),
        ([feature(nested(60))], "unknown type 'GeometryCollection'"),
        ([feature({"type": "Polygon"})], "feature 1 coordinates: expected a list"),
        ([feature({"type": "Polygon", "coordinates": []})], "feature 1: expected a polygon's outline"),
        ([feature({"type": "Polygon", "coordinates": [3]})], "feature 1 ring 1: expected a list of points"),
        ([feature(), ring([0, 0], [1])], r"feature 2 ring 1 point 2: expected x and y.* found \[1\]"),
        ([ring([0, "1"])], "point 1: expected x and y"),
        ([ring([0, True])], "point 1: expected x and y"),
        ([ring([0, 1e300])], "at most 10,000,000 either way, found"),
        ([ring([0, 10**400])], "at most 10,000,000 either way"),
        ([feature(properties=[1])], "feature 1 properties: expected an object"),
        ([feature(properties={"classification": "Tumor"})], "properties classification: expected an object"),
        ([feature(properties={"classification": {"name": 3}})], "feature 1 class: expected a name"),
        ([feature(properties={"classification": {"name": "x" * 300}})], "a name of at most 200 characters"),
        ([feature(id=[1])], "feature 1 id: expected text or a number"),
    ],
)
def test_faults_are_named_with_their_place(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, content)
