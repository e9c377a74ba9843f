import gzip
import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest

from counterstain.errors import InputError
from counterstain.io.annotations import annotation_files, looks_like, outlines, read_all, read_annotations, safe_parsing

SQUARE = [[10, 10], [30, 10], [30, 30], [10, 30], [10, 10]]
HOLE = [[15, 15], [20, 15], [20, 20], [15, 20], [15, 15]]
FAR = [[50, 50], [60, 50], [60, 60], [50, 60], [50, 50]]
POLYGON = {"type": "Polygon", "coordinates": [SQUARE]}


def feature(geometry=POLYGON, **more):
    return {"type": "Feature", "geometry": geometry, "properties": {}, **more}


def ring(*points):
    return feature({"type": "Polygon", "coordinates": [list(points)]})


def write(tmp_path, content, name="slide.geojson"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def read(tmp_path, content):
    return read_annotations(write(tmp_path, content), "qupath")


def test_outlines_that_cross_themselves_are_repaired_and_counted(tmp_path):
    bow_tie = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]
    file = read(tmp_path, [ring(*bow_tie), feature()])
    assert file.repaired == 1
    assert [a.polygon.is_valid for a in file.annotations] == [True, True]
    assert file.annotations[0].polygon.area == pytest.approx(50)


def test_the_inside_of_a_loop_drawn_over_itself_stays_inside(tmp_path):
    angle = np.arange(5) * 4 * np.pi / 5
    (annotation,) = read(tmp_path, ring(*np.stack([np.cos(angle), np.sin(angle)], axis=1).tolist())).annotations
    assert not annotation.polygon.interiors
    assert annotation.polygon.buffer(-0.1).centroid.coords[0] == pytest.approx((0, 0))


def test_parts_that_overlap_are_joined(tmp_path):
    overlapping = {"type": "MultiPolygon", "coordinates": [[SQUARE], [[[x + 5, y] for x, y in SQUARE]]]}
    file = read(tmp_path, [feature(overlapping)])
    assert file.repaired == 1
    assert file.annotations[0].polygon.area == 25 * 20


def test_outlines_without_area_are_skipped_and_counted(tmp_path):
    line = [[0, 0], [5, 5], [10, 10], [0, 0]]
    file = read(tmp_path, [ring(*line), ring([1, 1]), ring()])
    assert not file.annotations
    assert file.skipped == {"outline without area": 3}


def test_ids_are_unique_and_the_same_every_time(tmp_path):
    features = [feature(id=given) for given in ("a", "a", "a#2", "a")]
    ids, again = ([a.id for a in read(tmp_path, features).annotations] for _ in range(2))
    assert ids == again
    assert ids[:2] == ["a", "a#2"]
    assert len(set(ids)) == 4


def test_a_file_packed_with_gzip_is_read_whatever_its_name(tmp_path):
    assert read(tmp_path, gzip.compress(json.dumps([feature()]).encode())).annotations


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b'<?xml version="1.0"?><ASAP_Annotations/>', "asap"),
        (b'\xef\xbb\xbf<Annotations MicronsPerPixel="0.25"/>', "aperio"),
        (b'<Annotations><Annotation Visible="True"/></Annotations>', "halo"),
        (b"<Annotations/>", None),
        (b"SQLite format 3\0", "sliderunner"),
        (b'{"type": "FeatureCollection", "features": []}', "qupath"),
        (b'[{"type":"Feature"}]', "qupath"),
        (b'{"count": 0, "next": null, "results": []}', "exact"),
        (b'[{"id": 1, "annotation_type": 2}]', "exact"),
        (b"<html></html>", None),
        (b"PK", None),
    ],
)
def test_a_format_is_recognised_by_its_beginning(content, looks):
    assert looks_like(content) == looks


def test_the_wrong_format_is_named_with_the_right_one(tmp_path):
    path = write(tmp_path, [feature()], "a.json")
    with pytest.raises(InputError, match=r"a\.json: looks like qupath, not exact; give --format qupath"):
        read_annotations(path, "exact")


@pytest.mark.parametrize("file_format", ["exact", "qupath", "asap", "aperio"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"\x1f\x8b\x08broken", "damaged gzip"),
        (gzip.compress(b"[1]" * 1000, mtime=0)[:-9], "damaged gzip"),
        (b"PK\x03\x04", r"a zip that cannot be read \(.*\); unpack it"),
        (b"hello", "line 1: not (JSON|XML) or cut short"),
        (b"\x89PNG\r\n", "is an image, which is not read; export the outlines as GeoJSON"),
        (gzip.compress(gzip.compress(b"[]", mtime=0), mtime=0), "is a packed file in a packed file, which is not read"),
        (b"<!DOCTYPE html><html>", "is a web page, which is not read"),
        (b'<?xml version="1.0"?><annotations><ndpviewstate/></annotations>', "is a file of Hamamatsu's NDP.view"),
        (b'{"version": "2.0", "item": {"slots": [' + b'{"a": "b"},' * 999, "is a file of V7 Darwin, which is not read"),
        (b'{"annotations": [{"name": "T", "polygon": {"paths": []}}]}', "is a file of V7 Darwin, which is not read"),
        (b'{"images": [], "categories": [], "annotations": []}', "looks like coco, not .*; give --format coco"),
    ],
)
def test_what_is_no_annotation_file_gives_one_line(tmp_path, file_format, content, message):
    path = write(tmp_path, content, "broken")
    with pytest.raises(InputError, match=message) as caught:
        read_annotations(path, file_format)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"type": "Feature", ', "line 1: not JSON or cut short"),
        (b'["\xff"]', "byte 2: not UTF-8"),
        ('["ä"]'.encode("utf-16"), "not UTF-8; save it as UTF-8"),
        (b'{"type": "Feature", "type": "Polygon"}', "'type' stands twice in one object"),
        (b"[" + b"9" * 5000 + b"]", "not usable JSON"),
        (b"[" * 200_000, "nested too deep"),
        (b"7", "found 7"),
    ],
)
def test_json_is_read_strictly(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, content)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_annotations(tmp_path / "none.json", "qupath")
    with pytest.raises(InputError, match="is a folder"):
        read_annotations(tmp_path, "qupath")


def test_a_file_beyond_the_limit_is_refused_packed_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_parsing, "MAX_BYTES", 2**20)
    for content in (b" " * (2**20 + 1), gzip.compress(b" " * 2**24)):
        with pytest.raises(InputError, match="larger than 1 MB; export the annotations alone"):
            read(tmp_path, content)


def test_json_that_would_fill_the_memory_is_refused_before_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_parsing, "MAX_JSON_MEMORY", 2**20)
    with pytest.raises(InputError, match="would take more than 1 MB of memory"):
        read(tmp_path, b"[" + b"[]," * 20_000 + b"[]]")


def test_the_memory_of_json_is_never_underestimated(tmp_path, monkeypatch):
    for data in (b"[" + b"[]," * 9999 + b"[]]", b"[" + b"[1.5,2.5]," * 9999 + b"[]]", b"[" + b'"ab",' * 9999 + b"{}]"):
        tracemalloc.start()
        kept = json.loads(data)
        monkeypatch.setattr(safe_parsing, "MAX_JSON_MEMORY", tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        with pytest.raises(InputError, match="would take more than"):
            safe_parsing.parse_json(tmp_path, data)
        del kept


TANGLE = np.random.default_rng(0).uniform(0, 1000, (5000, 2)).tolist()


@pytest.mark.parametrize(
    ("limits", "features", "message"),
    [
        ({}, [ring(*TANGLE)], r"\.geojson feature 1: the outline of 5,001 points crosses itself all over"),
        ({"MAX_TANGLES": 1000}, [ring(*TANGLE[:150])] * 3, "outlines of the file cross themselves all over"),
        ({"MAX_REPAIR_POINTS": 99}, [ring(*TANGLE[:150])], "has 151 points; at most 99 can be repaired; simplify"),
        ({"MAX_POINTS": 9}, [feature()] * 2, "more than 9 points; export tissue annotations alone"),
    ],
)
def test_what_would_take_hours_or_fill_the_memory_is_refused(tmp_path, monkeypatch, limits, features, message):
    for name, limit in limits.items():
        monkeypatch.setattr(outlines, name, limit)
    with pytest.raises(InputError, match=message):
        read(tmp_path, features)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (ring([0, 0], [5, "x"], [5, 5]), r"feature 2 ring 1 point 2: expected x and y"),
        (ring([0, 0], [float("inf"), 1], [5, 5]), "feature 2 ring 1 point 2"),
        (feature({"type": "Circle"}), "feature 2 geometry: unknown type 'Circle'"),
        (feature(properties={"name": "a long remark " * 20}), "feature 2 class: expected a name of at most 200"),
        (ring(*TANGLE), "feature 2: the outline of 5,001 points crosses itself all over"),
        ([], r"feature 2: expected an object of type Feature, found \[\]"),
    ],
)
def test_one_odd_object_is_left_out_counted_and_described(tmp_path, odd, message):
    file = read(tmp_path, [feature(), odd])
    assert (len(file.annotations), file.skipped) == (1, {outlines.ODD: 1})
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(*file.odd)


def test_what_is_no_coordinate_may_be_anything(tmp_path):
    measured = feature(properties={"measurements": {"Positive %": float("nan"), "a": [-float("inf")]}}, id=None)
    file = read(tmp_path, [measured, feature(id=[1]), feature(id="a remark " * 99), feature(id=True)])
    assert [a.id[:20] for a in file.annotations] == ["1", "2", "a remark a remark a ", "4"]
    twice = json.dumps([feature(properties={"measurements": {"a": 1}})]).replace('"a": 1', '"a": 1, "a": 2')
    assert len(read(tmp_path, twice.encode()).annotations) == 1


def zipped(*names):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, json.dumps([feature()]))
    return packed.getvalue()


def test_a_zip_of_one_file_is_read_and_any_other_refused(tmp_path, monkeypatch):
    packed = zipped("a/slide.geojson", "a/.DS_Store", "__MACOSX/a/slide.geojson")
    assert annotation_files(write(tmp_path, packed, "a.zip").parent, "qupath") == [tmp_path / "a.zip"]
    assert read(tmp_path, packed).annotations
    with pytest.raises(InputError, match=r"a zip that cannot be read \(it holds 2 files, not one\)"):
        read(tmp_path, zipped("a.geojson", "b.geojson"))
    locked = bytearray(zipped("a.geojson"))
    locked[6] |= 1
    locked[locked.rfind(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(InputError, match=r"a zip that cannot be read .*password"):
        read(tmp_path, bytes(locked))
    monkeypatch.setattr(safe_parsing, "MAX_ZIP_DIRECTORY", 2**12)
    with pytest.raises(InputError, match="it holds thousands of files"):
        read(tmp_path, zipped(*(f"{i}.geojson" for i in range(200))))
    monkeypatch.setattr(safe_parsing, "MAX_BYTES", 20)
    with pytest.raises(InputError, match="larger than"):
        read(tmp_path, packed)


def test_the_files_of_a_folder_are_those_of_the_format(tmp_path):
    for name in ("b.xml", "a.xml", "a.json", "note.txt", "._a.xml"):
        (tmp_path / name).write_text("x")
    assert [f.name for f in annotation_files(tmp_path, "asap")] == ["a.xml", "b.xml"]
    assert annotation_files(tmp_path / "note.txt", "asap") == [tmp_path / "note.txt"]
    with pytest.raises(InputError, match=r"no annotation file; format exact expects names that end in \.json"):
        annotation_files(tmp_path.joinpath("empty") if (tmp_path / "empty").mkdir() else tmp_path / "empty", "exact")
    with pytest.raises(InputError, match="no such file or folder"):
        annotation_files(tmp_path / "none", "exact")


# GeoJSON of all versions


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
        ({"classification": "Tumor"}, "Tumor"),
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


@pytest.mark.parametrize(
    "geometry",
    [
        {"type": "Polygon", "coordinates": []},
        {"type": "MultiPolygon", "coordinates": []},
        {"type": "MultiPolygon", "coordinates": [[], []]},
        {"type": "GeometryCollection", "geometries": []},
    ],
)
def test_empty_geometries_are_counted_and_empty_parts_overlooked(tmp_path, geometry):
    file = read(tmp_path, [feature(), feature(geometry)])
    assert (len(file.annotations), file.skipped) == (1, {"object without geometry": 1})
    parts = feature({"type": "MultiPolygon", "coordinates": [[], [SQUARE]]})
    assert read(tmp_path, [parts]).annotations[0].polygon.area == 400


OTHER_OBJECTS = [
    feature(properties={"objectType": "detection", "classification": {"name": "Tumor"}}),
    feature(properties={"object_type": "cell"}),
    feature(id="PathTileObject"),
    feature(id="TMACoreObject"),
    feature(properties={"objectType": "root"}),
]


def test_only_annotations_of_qupath_are_read_unless_others_are_asked_for(tmp_path):
    annotations = [feature(properties={"objectType": "annotation"}), feature(id="PathAnnotationObject"), feature()]
    path = write(tmp_path, annotations + OTHER_OBJECTS)
    file = read_annotations(path, "qupath")
    assert len(file.annotations) == 3
    assert [reason.split()[0] for reason in file.skipped] == ["detection", "cell", "tile", "tma_core", "object"]
    assert "detection (imported with --objects annotation,detection)" in file.skipped
    file = read_annotations(path, "qupath", objects=["detection", "cell"])
    assert (file.labels, len(file.annotations)) == ({"Tumor": 1, "Unclassified": 1}, 2)
    with pytest.raises(InputError, match="--objects cells: expected names of annotation, detection, cell, tile"):
        read_annotations(path, "qupath", objects=["cells"])
    write(tmp_path, OTHER_OBJECTS)
    with pytest.raises(InputError, match=r"no annotation with an area; found 1 x cell \(imported with --objects"):
        read_all(path, "qupath")


def nested(depth):
    return {"type": "GeometryCollection", "geometries": [nested(depth - 1)]} if depth else POLYGON


def test_a_third_coordinate_is_left_out(tmp_path):
    (annotation,) = read(tmp_path, [ring(*([x, y, 7] for x, y in SQUARE))]).annotations
    assert not annotation.polygon.has_z


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"type": []}, r"found \[\]"),
        ({"type": "Topology"}, "expected QuPath's GeoJSON .* found 'Topology'"),
        ({"type": "FeatureCollection"}, "features: expected a list, found None"),
        ([7], "feature 1: expected an object of type Feature, found 7"),
        ([{"type": "Polygon"}], "feature 1: expected type Feature, found 'Polygon'"),
        ([feature("x")], "feature 1 geometry: expected a GeoJSON geometry, found 'x'"),
        ([feature({"type": "Circle"})], "feature 1 geometry: unknown type 'Circle'"),
        ([feature(nested(60))], "unknown type 'GeometryCollection'"),
        ([feature({"type": "Polygon"})], "feature 1 coordinates: expected a list"),
        ([feature({"type": "Polygon", "coordinates": [3]})], "feature 1 ring 1: expected a list of points"),
        ([ring([0, 0], [1])], r"feature 1 ring 1 point 2: expected x and y.* found \[1\]"),
        ([feature(), *[ring([0, float("nan")])] * 3], r"feature 2 .* found \[0, nan\].* \(and 2 more such objects\)"),
        ([ring([0, "1"])], "point 1: expected x and y"),
        ([ring([0, True])], "point 1: expected x and y"),
        ([ring([0, 1e300])], "at most 10,000,000 either way, found"),
        ([ring([0, 10**400])], "at most 10,000,000 either way"),
        ([feature(properties=[1])], "feature 1 properties: expected an object"),
        ([feature(properties={"classification": 3})], "properties classification: expected a name or an object"),
        ([feature(properties={"classification": {"name": 3}})], "feature 1 class: expected a name"),
        ([feature(properties={"classification": {"name": "x" * 300}})], "a name of at most 200 characters"),
    ],
)
def test_faults_are_named_with_their_place(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, content)
