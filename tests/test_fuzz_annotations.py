"""Corrupted annotation files: always an answer or one line, in time and in little memory.

COUNTERSTAIN_FUZZ sets how many corruptions are tried over all formats (240 by default, 2,000 before a release).
"""

import json
import os
import re
import resource
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from counterstain.errors import InputError
from counterstain.io.annotations import FORMATS, read_annotations
from counterstain.io.annotations.outlines import AnnotationFile
from counterstain.io.labels import LabelMap, draft_labels

TRIALS = int(os.environ.get("COUNTERSTAIN_FUZZ", "240"))
KINDS = ("bytes", "values")
SECONDS, MEMORY_KB = 5, 2**20
fuzzed = settings(
    max_examples=max(1, TRIALS // (len(FORMATS) * len(KINDS))),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

RING = [[10, 10], [30.5, 10], [30, 30], [10, 10]]
HOLE = [[20, 12], [25, 12], [25, 15], [20, 12]]
FEATURE = {
    "type": "Feature",
    "id": "a",
    "geometry": {"type": "MultiPolygon", "coordinates": [[RING, HOLE], [RING]]},
    "properties": {"classification": {"name": "Tumor", "colorRGB": -3670016}, "measurements": []},
}
ROW = {
    "id": 1,
    "annotation_type": {"id": 7, "name": "Tumor", "vector_type": 5, "product": 1},
    "image": {"id": 12, "name": "A1.mrxs"},
    "vector": {"x1": 1, "y1": 1, "x2": 9, "y2": 1, "x3": 9, "y3": 9},
    "deleted": False,
}
JSON_FILES = {
    "qupath": {"type": "FeatureCollection", "features": [FEATURE, FEATURE]},
    "exact": {"count": 2, "next": None, "results": [ROW, {**ROW, "annotation_type": 7}]},
}
XML_FILES = {
    "asap": (
        '<?xml version="1.0"?><ASAP_Annotations><Annotations><Annotation Name="_0" Type="Spline" PartOfGroup="tumor" '
        'Color="#F4FA58"><Coordinates><Coordinate Order="0" X="1" Y="1"/><Coordinate Order="1" X="9" Y="1"/>'
        '<Coordinate Order="2" X="9" Y="9"/></Coordinates></Annotation></Annotations></ASAP_Annotations>'
    ),
    "aperio": (
        '<Annotations MicronsPerPixel="0.25"><Annotation Id="1" Name="Tumor" LineColor="65280"><Attributes>'
        '<Attribute Name="Description" Value="x"/></Attributes><Regions><Region Id="1" Type="0" Text="t" '
        'NegativeROA="0"><Vertices><Vertex X="1" Y="1"/><Vertex X="9" Y="1"/><Vertex X="9" Y="9"/></Vertices></Region>'
        '<Region Id="2" Type="2" NegativeROA="1"><Vertices><Vertex X="3" Y="3"/><Vertex X="4" Y="4"/></Vertices>'
        "</Region></Regions></Annotation></Annotations>"
    ),
}
SAMPLES = {**{f: json.dumps(content) for f, content in JSON_FILES.items()}, **XML_FILES}

NASTY_TEXT = st.sampled_from(
    ["", "../../etc/passwd", "..\\..\\x", "/", "a\x00b", "\ud800", "\u202e", "x" * 500, "nan", "1e999", "#12", "None"]
)
NASTY_NUMBER = st.sampled_from([float("nan"), float("inf"), -(10**400), 1e308, 2**31, -1, 0, 0.1, True])
DEEP = json.loads("[" * 400 + "]" * 400)
NASTY = NASTY_TEXT | NASTY_NUMBER | st.sampled_from([None, [], {}, [[]] * 50, DEEP, {"a": {"id": {}}}])
NASTY_BYTES = st.sampled_from(
    (
        *(b"", b"\xff\xfe", b"\x00", b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;", b"<!--", b"<![CDATA[", b"[" * 3000),
        *(b"<a>" * 300, b"9" * 5000, b"NaN", b'"', b"\xf0\x9f\x92\xa9", b"]]}}", b"<Region>", b"</Annotation>"),
    )
)
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), NASTY_BYTES), min_size=1, max_size=4)


def edited(sample, edits):
    """Cut bytes out and put others in."""
    for share, cut, insert in edits:
        at = int(share * len(sample))
        sample = sample[:at] + insert + sample[at + cut :]
    return sample


def places(content, path=()):
    """Return the path of every value in a JSON document."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(found for key, value in items for found in places(value, (*path, key)))]


def replaced(content, path, value):
    """Return a JSON document with another value at a path."""
    if not path:
        return value
    key, *rest = path
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[key] = replaced(content[key], rest, value)
    return copy


def with_other_values(data, file_format):
    """Put nasty values in the place of sound ones, leaving the file well-formed."""
    if file_format in JSON_FILES:
        content = JSON_FILES[file_format]
        for _ in range(data.draw(st.integers(1, 3))):
            content = replaced(content, data.draw(st.sampled_from(places(content))), data.draw(NASTY))
        return json.dumps(content).encode()
    parts = re.split(r'(?<==")([^"]*)', XML_FILES[file_format])  # odd ones are the attributes' values
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(range(1, len(parts), 2)))
        parts[at] = data.draw(NASTY_TEXT | NASTY_NUMBER.map(lambda number: str(float(number > 0) or number)))
    return "".join(parts).encode("utf-8", "surrogatepass")


def check(path, file_format, content):
    """Read a file: an answer or one line that names it, in time and in little memory."""
    path.write_bytes(content)
    start, peak_kb = time.process_time(), peak_memory_kb()
    try:
        file = read_annotations(path, file_format)
        check_sound(file)
    except InputError as error:
        file, message = None, str(error)
        assert "\n" not in message
        assert message.startswith(str(path))
        assert len(message) < len(str(path)) + 600
    assert time.process_time() - start < SECONDS
    assert peak_memory_kb() - peak_kb < MEMORY_KB
    return file


def peak_memory_kb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check_sound(file):
    """What was read can be used: polygons are valid, names are names, the drafted label map is YAML."""
    assert isinstance(file, AnnotationFile)
    assert len({a.id for a in file.annotations}) == len(file.annotations)
    for annotation in file.annotations:
        assert annotation.polygon.is_valid
        assert annotation.polygon.area > 0
        assert annotation.label.isprintable()
        assert "/" not in (annotation.slide or "")
        assert (annotation.slide or "x") not in {".", ".."}
    draft = yaml.safe_load(draft_labels([file]))
    meanings = dict.fromkeys(draft["labels"], "ignore")
    assert set(LabelMap(labels=meanings, regions=draft["regions"]).labels) <= set(file.labels)


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_sound_file_is_read(tmp_path, file_format):
    assert check(tmp_path / "a", file_format, SAMPLES[file_format].encode()).annotations


@pytest.mark.parametrize("file_format", FORMATS)
@fuzzed
@given(edits=EDITS)
def test_corrupted_bytes_give_an_answer_or_one_line(tmp_path, file_format, edits):
    check(tmp_path / "a", file_format, edited(SAMPLES[file_format].encode(), edits))


@pytest.mark.parametrize("file_format", FORMATS)
@fuzzed
@given(data=st.data())
def test_corrupted_values_give_an_answer_or_one_line(tmp_path, file_format, data):
    check(tmp_path / "a", file_format, with_other_values(data, file_format))


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_cut_short_anywhere_gives_one_line(tmp_path, file_format):
    sample = SAMPLES[file_format].encode()
    for end in range(0, len(sample) - 1, 1 + len(sample) // TRIALS):
        assert check(tmp_path / "a", file_format, sample[:end]) is None
