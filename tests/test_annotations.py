import gzip
import json
import tracemalloc

import numpy as np
import pytest

from counterstain.errors import InputError
from counterstain.io.annotations import annotation_files, looks_like, outlines, read_annotations, safe_parsing

SQUARE = [[10, 10], [30, 10], [30, 30], [10, 30], [10, 10]]


def feature(coordinates, **properties):
    return {"type": "Feature", "properties": properties, "geometry": {"type": "Polygon", "coordinates": coordinates}}


def write(tmp_path, content, name="slide.geojson"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_outlines_that_cross_themselves_are_repaired_and_counted(tmp_path):
    bow_tie = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]
    file = read_annotations(write(tmp_path, [feature([bow_tie]), feature([SQUARE])]), "qupath")
    assert file.repaired == 1
    assert [a.polygon.is_valid for a in file.annotations] == [True, True]
    assert file.annotations[0].polygon.area == pytest.approx(50)


def test_the_inside_of_a_loop_drawn_over_itself_stays_inside(tmp_path):
    angle = np.arange(5) * 4 * np.pi / 5
    star = np.stack([np.cos(angle), np.sin(angle)], axis=1).tolist()
    (annotation,) = read_annotations(write(tmp_path, feature([star])), "qupath").annotations
    assert annotation.polygon.buffer(-0.1).centroid.coords[0] == pytest.approx((0, 0))
    assert not annotation.polygon.interiors


def test_parts_that_overlap_are_joined(tmp_path):
    overlapping = {"type": "MultiPolygon", "coordinates": [[SQUARE], [[[x + 5, y] for x, y in SQUARE]]]}
    file = read_annotations(write(tmp_path, [{"type": "Feature", "geometry": overlapping}]), "qupath")
    assert file.repaired == 1
    assert file.annotations[0].polygon.area == 25 * 20


def test_outlines_without_area_are_skipped_and_counted(tmp_path):
    line = [[0, 0], [5, 5], [10, 10], [0, 0]]
    file = read_annotations(write(tmp_path, [feature([line]), feature([[[1, 1]]]), feature([[]])]), "qupath")
    assert not file.annotations
    assert file.skipped == {"outline without area": 3}


def test_ids_are_unique_and_the_same_every_time(tmp_path):
    features = [{**feature([SQUARE]), "id": given} for given in ("a", "a", "a#2", "a")]
    path = write(tmp_path, features)
    ids = [a.id for a in read_annotations(path, "qupath").annotations]
    assert ids[:2] == ["a", "a#2"]
    assert len(set(ids)) == 4
    assert ids == [a.id for a in read_annotations(path, "qupath").annotations]


def test_a_file_packed_with_gzip_is_read_whatever_its_name(tmp_path):
    path = write(tmp_path, gzip.compress(json.dumps([feature([SQUARE])]).encode()))
    assert len(read_annotations(path, "qupath").annotations) == 1


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b'<?xml version="1.0"?><ASAP_Annotations/>', "asap"),
        (b"\xef\xbb\xbf<Annotations/>", "aperio"),
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
    path = write(tmp_path, [feature([SQUARE])], "a.json")
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
        (b"PK\x03\x04", "line 1: not (JSON|XML) or cut short|not UTF-8"),
        (b"hello", "line 1: not (JSON|XML) or cut short"),
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
        (b"[NaN]", "NaN is not a number"),
        (b"[-Infinity]", "-Infinity is not a number"),
        (b"[" + b"9" * 5000 + b"]", "not usable JSON"),
        (b"[" * 200_000, "nested too deep"),
        (b"7", "found 7"),
    ],
)
def test_json_is_read_strictly(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_annotations(write(tmp_path, content), "qupath")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_annotations(tmp_path / "none.json", "qupath")
    with pytest.raises(InputError, match="is a folder"):
        read_annotations(tmp_path, "qupath")


def test_a_file_beyond_the_limit_is_refused_packed_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_parsing, "MAX_BYTES", 2**20)
    for content in (b" " * (2**20 + 1), gzip.compress(b" " * 2**24)):
        with pytest.raises(InputError, match="larger than 1 MB; export the annotations alone"):
            read_annotations(write(tmp_path, content), "qupath")


def test_json_that_would_fill_the_memory_is_refused_before_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_parsing, "MAX_JSON_MEMORY", 2**20)
    with pytest.raises(InputError, match="would take more than 1 MB of memory"):
        read_annotations(write(tmp_path, b"[" + b"[]," * 20_000 + b"[]]"), "qupath")


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
        ({}, [feature([TANGLE])], r"\.geojson feature 1: the outline of 5,001 points crosses itself all over"),
        ({"MAX_TANGLES": 1000}, [feature([TANGLE[:150]])] * 3, "outlines of the file cross themselves all over"),
        ({"MAX_REPAIR_POINTS": 99}, [feature([TANGLE[:150]])], "has 151 points; at most 99 can be repaired; simplify"),
        ({"MAX_POINTS": 9}, [feature([SQUARE])] * 2, "more than 9 points; export tissue annotations alone"),
    ],
)
def test_what_would_take_hours_or_fill_the_memory_is_refused(tmp_path, monkeypatch, limits, features, message):
    for name, limit in limits.items():
        monkeypatch.setattr(outlines, name, limit)
    with pytest.raises(InputError, match=message):
        read_annotations(write(tmp_path, features), "qupath")


def test_the_files_of_a_folder_are_those_of_the_format(tmp_path):
    for name in ("b.xml", "a.xml", "a.json", "note.txt"):
        (tmp_path / name).write_text("x")
    assert [f.name for f in annotation_files(tmp_path, "asap")] == ["a.xml", "b.xml"]
    assert annotation_files(tmp_path / "note.txt", "asap") == [tmp_path / "note.txt"]
    with pytest.raises(InputError, match=r"no annotation file; format exact expects names that end in \.json"):
        annotation_files(tmp_path.joinpath("empty") if (tmp_path / "empty").mkdir() else tmp_path / "empty", "exact")
    with pytest.raises(InputError, match="no such file or folder"):
        annotation_files(tmp_path / "none", "exact")
