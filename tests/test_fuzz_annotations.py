"""Corrupted annotation files: always an answer or one line, in time and in little memory.

COUNTERSTAIN_FUZZ sets how many corruptions are tried over all formats (300 by default, 2,000 before a release).
"""

import gzip
import io
import json
import os
import re
import sqlite3
import time
import zipfile

import pytest
import yaml
from damage import EDITS, MEMORY_KB, NASTY, NASTY_NUMBER, NASTY_TEXT, edited, fuzzed, peak_memory_kb, with_nasty_values
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from counterstain.errors import InputError
from counterstain.io.annotations import ENDINGS, FORMATS, read_annotations
from counterstain.io.annotations.outlines import AnnotationFile
from counterstain.io.import_slides import import_slides
from counterstain.io.labels import LabelMap, draft_labels

TRIALS = int(os.environ.get("COUNTERSTAIN_FUZZ", "300"))
KINDS = ("bytes", "values", "one object")
SECONDS = 5

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
SHAPE = {"label": "Tumor", "points": [[1, 1], [9, 1], [9, 9]], "group_id": None, "shape_type": "polygon"}
DRAWN = {"id": 1, "image_id": 3, "category_id": 7, "segmentation": [[1, 1, 9, 1, 9, 9]], "iscrowd": 0}
COCO = {
    "images": [{"id": 3, "file_name": "A1.tif", "height": 48, "width": 64}],
    "categories": [{"id": 7, "name": "Tumor"}],
    "annotations": [DRAWN, {**DRAWN, "segmentation": {"size": [4, 2], "counts": [1, 3, 4]}}],
}
JSON_FILES = {
    "coco": COCO,
    "labelme": {
        "shapes": [SHAPE, {**SHAPE, "group_id": 1}],
        "imagePath": "A1.tif",
        "imageHeight": 48,
        "imageWidth": 64,
    },
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
    "halo": (
        '<Annotations><Annotation LineColor="65280" Name="Tumor" Visible="True"><Regions><Region Type="Ellipse" '
        'HasEndcaps="0" NegativeROA="0"><Vertices><V X="1" Y="1"/><V X="9" Y="9"/></Vertices><Comments/></Region>'
        '<Region Type="Rectangle" HasEndcaps="0" NegativeROA="1"><Vertices><V X="3" Y="3"/><V X="4" Y="4"/></Vertices>'
        "</Region></Regions></Annotation></Annotations>"
    ),
}
ROWS = {  # of SlideRunner's database
    "Slides (uid, filename)": [(1, "A1.svs")],
    "Classes (uid, name)": [(1, "Tumor")],
    "Annotations (uid, slide, type, agreedClass, deleted)": [(1, 1, 3, 1, 0), (2, 1, 2, 1, 0), (3, 1, 5, 1, 0)],
    "Annotations_coordinates (annoId, orderIdx, coordinateX, coordinateY)": [
        *((1, 0, 1, 1), (1, 1, 9, 1), (1, 2, 9, 9), (2, 0, 1, 1), (2, 1, 9, 9), (3, 0, 1, 1), (3, 1, 9, 9)),
    ],
}


def sqlite_file(rows):
    """Return a database as bytes; values that SQLite cannot hold become text."""
    with sqlite3.connect(":memory:") as database:
        for table, values in rows.items():
            database.execute(f"CREATE TABLE {table}")
            marks = ", ".join("?" * len(values[0]))
            for row in values:
                held = [ascii(v) if isinstance(v, list | dict | str) or abs(v or 0) > 2**62 else v for v in row]
                database.execute(f"INSERT INTO {table} VALUES ({marks})", held)
        database.commit()
        content = database.serialize()
    database.close()
    return content


SAMPLES = {f: json.dumps(content).encode() for f, content in JSON_FILES.items()}
SAMPLES |= {f: content.encode() for f, content in XML_FILES.items()} | {"sliderunner": sqlite_file(ROWS)}
# Three objects of a format, to damage one of them.
OBJECTS = {
    "qupath": lambda *objects: json.dumps(objects).encode(),
    "exact": lambda *objects: json.dumps(objects).encode(),
    "coco": lambda *objects: json.dumps(COCO | {"annotations": objects}).encode(),
    "labelme": lambda *objects: json.dumps({"shapes": objects}).encode(),
    "asap": lambda *objects: f"<ASAP_Annotations>{''.join(objects)}</ASAP_Annotations>".encode("utf-8", "replace"),
    "aperio": lambda *objects: f"<Annotations><Annotation>{''.join(objects)}</Annotation></Annotations>".encode(
        "utf-8", "replace"
    ),
}
OBJECT = {
    "qupath": FEATURE,
    "exact": ROW,
    "coco": DRAWN,
    "labelme": SHAPE,
    "asap": re.search(r"<Annotation .*</Annotation>", XML_FILES["asap"])[0],
    "aperio": re.search(r"<Region .*?</Region>", XML_FILES["aperio"])[0].replace(' NegativeROA="0"', ""),
}


def packed(content, how):
    """Return a file as it is, or packed with gzip or zip."""
    if how != "zip":
        return gzip.compress(content, mtime=0) if how == "gzip" else content
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("a/b.json"), content)
    return zipped.getvalue()


def with_other_values(data, file_format):
    """Put nasty values in the place of sound ones, leaving the file well-formed."""
    if file_format in JSON_FILES:
        return json.dumps(with_nasty_values(data, JSON_FILES[file_format])).encode()
    if file_format == "sliderunner":
        rows = {table: [list(row) for row in values] for table, values in ROWS.items()}
        for _ in range(data.draw(st.integers(1, 3))):
            row = data.draw(st.sampled_from([row for values in rows.values() for row in values]))
            row[data.draw(st.integers(0, len(row) - 1))] = data.draw(NASTY)
        return sqlite_file(rows)
    return nasty_xml(data, XML_FILES[file_format]).encode("utf-8", "surrogatepass")


def nasty_xml(data, text):
    parts = re.split(r'(?<==")([^"]*)', text)  # odd ones are the attributes' values
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(range(1, len(parts), 2)))
        parts[at] = data.draw(NASTY_TEXT | NASTY_NUMBER.map(lambda number: str(float(number > 0) or number)))
    return "".join(parts)


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
    assert check(tmp_path / "a", file_format, SAMPLES[file_format]).annotations


@pytest.mark.parametrize("file_format", FORMATS)
@fuzzed(TRIALS // (len(FORMATS) * len(KINDS)))
@given(edits=EDITS, inside=st.sampled_from(["", "gzip", "zip"]), how=st.sampled_from(["", "", "gzip", "zip"]))
def test_corrupted_bytes_give_an_answer_or_one_line(tmp_path, file_format, edits, inside, how):
    check(tmp_path / "a", file_format, packed(edited(packed(SAMPLES[file_format], inside), edits), how))


@pytest.mark.parametrize("file_format", FORMATS)
@fuzzed(TRIALS // (len(FORMATS) * len(KINDS)))
@given(data=st.data())
def test_corrupted_values_give_an_answer_or_one_line(tmp_path, file_format, data):
    check(tmp_path / "a", file_format, with_other_values(data, file_format))


@pytest.mark.parametrize("file_format", OBJECTS)
@fuzzed(TRIALS // (len(FORMATS) * len(KINDS)))
@given(data=st.data())
def test_an_odd_object_never_costs_a_sound_one(tmp_path, file_format, data):
    sound = OBJECT[file_format]
    odd = with_nasty_values(data, sound) if file_format in JSON_FILES else nasty_xml(data, sound)
    if file_format == "exact" and isinstance(odd, dict):
        odd = odd | {"image": ROW["image"]}  # another number with this name is refused
    if file_format in JSON_FILES or not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", odd):  # which XML cannot hold
        file = check(tmp_path / "a", file_format, OBJECTS[file_format](sound, odd, sound))
        alone = check(tmp_path / "a", file_format, OBJECTS[file_format](sound))
        same = [a for a in file.annotations if a.polygon.equals(alone.annotations[0].polygon)]
        assert len(same) >= 2
        assert len(file.annotations) + sum(file.skipped.values()) >= 3
        assert len(file.annotations) <= 3


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    """A slide A1, the table of its region and the meanings of labels."""
    folder = tmp_path_factory.mktemp("tissue")
    Image.new("RGB", (64, 48), "pink").save(folder / "A1.tif")
    (folder / "regions.csv").write_text(
        "slide,x_level0_px,y_level0_px,width_level0_px,height_level0_px\nA1,0,0,64,48\n"
    )
    (folder / "LABELS.yaml").write_text("labels: {Tumor: HER2 3+, Unclassified: ignore}\n")
    return folder


@pytest.mark.parametrize("file_format", FORMATS)
@fuzzed(TRIALS // 100)
@given(data=st.data())
def test_an_import_of_corrupted_values_gives_a_cohort_or_one_line(tmp_path_factory, tissue, file_format, data):
    folder = tmp_path_factory.mktemp("import")
    file = folder / f"A1{ENDINGS[file_format][0]}"
    file.write_bytes(with_other_values(data, file_format))
    try:
        cohort = import_slides(
            tissue / "A1.tif", file, file_format=file_format, labels=tissue / "LABELS.yaml", mpp=0.5, mpp_level0=0.5,
            regions=tissue / "regions.csv", out=folder / "out",
        )  # fmt: skip
    except InputError as error:
        cohort, message = None, str(error)
    if cohort is None:
        assert "\n" not in message
        assert [path.name for path in folder.iterdir()] == [file.name]
        return
    report = json.loads((cohort.folder / "import.json").read_text())
    assert len(cohort.instances) <= report["annotations"]


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_cut_short_anywhere_gives_one_line(tmp_path, file_format):
    sample = SAMPLES[file_format]
    for end in range(0, len(sample) - 1, 1 + len(sample) // min(TRIALS, 1000)):
        assert check(tmp_path / "a", file_format, sample[:end]) is None
