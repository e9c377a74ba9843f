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
    assert annotation.label == "Unclassified"
    assert annotation.slide is None


def test_holes_and_parts_are_kept(tmp_path):
    many = {"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE], [FAR]]}
    (annotation,) = read(tmp_path, [feature(many)]).annotations
    assert annotation.kind == "multipolygon"
    assert annotation.polygon.area == 400 - 25 + 100


def test_a_collection_inside_a_feature_is_one_annotation_of_its_polygons(tmp_path):
    point = {"type": "Point", "coordinates": [1, 1]}
    file = read(tmp_path, [feature({"type": "GeometryCollection", "geometries": [POLYGON, point]})])
    assert [a.polygon.area for a in file.annotations] == [400]
    assert file.skipped == {"point": 1}


@pytest.mark.parametrize(
    ("properties", "label", "colour"),
    [
        ({"classification": {"name": "Tumor", "colorRGB": -3670016}}, "Tumor", "#c80000"),
        ({"classification": {"name": "Tumor", "color": [200, 0, 1]}}, "Tumor", "#c80001"),
        ({"classification": {"names": ["Tumor", "Positive"]}}, "Tumor: Positive", None),
        ({"name": "UT", "color": [255, 0, 0]}, "UT", "#ff0000"),
        ({"name": "my first", "classification": {"name": "Tumor"}}, "Tumor", None),
        ({"classification": None}, "Unclassified", None),
        ({"classification": {"name": ""}}, "Unclassified", None),
        ({"classification": {"name": "a\n\u202eb", "color": "red"}, "measurements": [{"name": "x"}]}, "a b", None),
    ],
)
def test_names_and_colours_of_all_versions_are_understood(tmp_path, properties, label, colour):
    (annotation,) = read(tmp_path, [feature(properties=properties)]).annotations
    assert (annotation.label, annotation.colour) == (label, colour)


def test_points_and_lines_and_empty_objects_are_counted(tmp_path):
    kinds = ("Point", "MultiPoint", "LineString", "MultiLineString")
    features = [feature({"type": kind, "coordinates": []}) for kind in kinds]
    file = read(tmp_path, [*features, feature(None)])
    assert file.skipped == {"point": 1, "points": 1, "line": 1, "lines": 1, "object without geometry": 1}


def test_a_third_coordinate_is_left_out(tmp_path):
    deep = [[x, y, 7] for x, y in SQUARE]
    (annotation,) = read(tmp_path, [feature({"type": "Polygon", "coordinates": [deep]})]).annotations
    assert not annotation.polygon.has_z


def ring(*points):
    return feature({"type": "Polygon", "coordinates": [list(points)]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"type": []}, r"found \[\]"),
        ({"type": "Topology"}, "expected QuPath's GeoJSON .* found 'Topology'"),
        ({"type": "FeatureCollection"}, "features: expected a list, found None"),
        ([7], "feature 1: expected type Feature, found 7"),
        ([feature("x")], "feature 1 geometry: expected a GeoJSON geometry, found 'x'"),
        ([feature({"type": "Circle"})], "feature 1 geometry: unknown type 'Circle'"),
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


def test_collections_nested_without_end_are_refused(tmp_path):
    geometry = POLYGON
    for _ in range(60):
        geometry = {"type": "GeometryCollection", "geometries": [geometry]}
    with pytest.raises(InputError, match="unknown type 'GeometryCollection'"):
        read(tmp_path, [feature(geometry)])
