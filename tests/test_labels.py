import unicodedata
from pathlib import Path

import pytest
import shapely
import yaml

from counterstain.errors import ConfigError, InputError
from counterstain.io.annotations import read_all
from counterstain.io.annotations.outlines import Annotation, AnnotationFile
from counterstain.io.labels import LabelMap, count_labels, draft_labels, taxonomy_of, taxonomy_of_labels
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy

HER2 = Taxonomy.named("her2")


def annotated(*labels):
    box = shapely.box(0, 0, 1, 1)
    rows = tuple(Annotation(id=str(i), label=label, polygon=box) for i, label in enumerate(labels))
    return AnnotationFile(path=Path("a.json"), annotations=rows)


def load(tmp_path, text):
    path = tmp_path / "LABELS.yaml"
    path.write_text(text)
    return LabelMap.load(path)


def test_labels_become_subtypes_background_or_ignore(tmp_path):
    labels = load(tmp_path, "labels: {a: HER2 1+, b: background, c: ignore}\nregions: [ROI]")
    found = count_labels([annotated("a", "b", "c", "ROI"), annotated("a")])
    assert found == {"a": 2, "b": 1, "c": 1, "ROI": 1}
    assert labels.resolve(found, HER2, "L") == {"a": 2, "b": BACKGROUND, "c": IGNORE}


def test_a_label_without_meaning_lists_all_labels_with_their_counts():
    found = count_labels([annotated("a", "b", "b", "c")])
    message = (
        r"L\.yaml: no meaning for label 'a' and 1 more; found in the annotations: 'b' \(2\), 'a' \(1\), 'c' \(1\); "
        "add a line for each, 'counterstain import labels' writes a draft"
    )
    with pytest.raises(InputError, match=message):
        LabelMap(labels={"b": "HER2 0"}).resolve(found, HER2, "L.yaml")


def test_hundreds_of_labels_do_not_flood_the_message():
    with pytest.raises(InputError, match="and 960 more labels") as caught:
        LabelMap().resolve({f"label {i}": 1 for i in range(1000)}, HER2, "L.yaml")
    assert len(str(caught.value)) < 2000


def test_a_meaning_that_the_taxonomy_does_not_know_is_named():
    with pytest.raises(InputError, match=r"label 'a' becomes 'HER2 4\+', which is none of the subtypes of her2 \(HER2"):
        LabelMap(labels={"a": "HER2 4+"}).resolve({}, HER2, "L.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labels: {no: background}", "YAML reads the label False as something other than text; put it in quotes"),
        ("labels: {3: background}", "YAML reads the label 3"),
        ("labels: {a: 0}", "YAML reads 0, the meaning of 'a'"),
        ("labels:\n  a:", "label 'a' has no meaning yet; write a subtype, background or ignore"),
        ("labels: {ROI: ignore}\nregions: [ROI]", "'ROI' is in labels and in regions; keep one of the two"),
        ("label: {a: b}", "label: unknown key; did you mean labels"),
        ("labels: [a]", "labels: expected a mapping"),
        ("regions: ROI", "regions: expected a list"),
    ],
)
def test_faults_of_the_file_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_draft_lists_the_labels_and_reads_back_once_filled_in(tmp_path):
    files = [annotated("a: b", "no", "roi", "HER2 0", "a: b"), annotated("a: b", "# x", "'q\"")]
    draft = draft_labels(files, HER2)
    assert "'a: b':  # 3 annotations in 2 files" in draft
    assert "HER2 0: HER2 0  # 1 annotation in 1 file" in draft
    with pytest.raises(ConfigError, match="'a: b' has no meaning yet"):
        load(tmp_path, draft)
    filled = load(tmp_path, draft.replace(":  #", ": ignore  #"))
    assert set(filled.labels) == {"a: b", "no", "HER2 0", "# x", "'q\""}
    assert filled.regions == ("roi",)
    assert filled.resolve(count_labels(files), HER2, "L")["no"] == IGNORE
    assert yaml.safe_load(draft_labels([annotated()])) == {"labels": {}, "regions": []}


@pytest.mark.parametrize(
    ("meanings", "message"),
    [
        ({"a": "Carcinoma", "b": "carcinoma"}, "'Carcinoma' and 'carcinoma' are probably one name; use one spelling"),
        ({"a": "polyp", "b": "backgroud"}, "'background' and 'backgroud' are probably one name"),
        ({"a": "squamous cells", "b": "squamuos cells"}, "list both in a file and give --taxonomy FILE"),
        ({"a": "in situ", "b": "in-situ"}, "'in situ' and 'in-situ' are probably one name"),
        ({"a": "tum\x1bour"}, "cannot be the name of a subtype"),
    ],
)
def test_meanings_that_are_probably_one_name_are_asked_about(meanings, message):
    with pytest.raises(ConfigError, match=message):
        taxonomy_of(list(meanings.values()), "t", "LABELS.yaml")


@pytest.mark.parametrize(
    "names", [["LCIS", "DCIS"], ["grade 1", "grade 2"], ["typical", "atypical"], ["type a", "type b"]]
)
def test_names_that_differ_by_a_grade_a_prefix_or_a_short_word_are_two(names):
    assert taxonomy_of(names, "t", "L").names == tuple(names)


def test_a_misspelt_meaning_is_told_the_known_one():
    with pytest.raises(InputError, match=r"becomes 'ignored', .* background or ignore; did you mean 'ignore'\?"):
        LabelMap(labels={"a": "ignored"}).resolve({}, HER2, "L.yaml")


def test_a_draft_speaks_of_her2_only_where_labels_do():
    draft = draft_labels([annotated("polyp", "Polyp ", "adenoma")])
    assert "HER2" not in draft
    assert "polyp:  # 1 annotation in 1 file, like 'Polyp '" in draft
    assert "adenoma:  # 1 annotation in 1 file\n" in draft
    assert "her2 2+: HER2 2+  #" in draft_labels([annotated("her2 2+", "adenoma")])


def test_labels_mean_the_same_in_every_unicode_form_and_spacing():
    composed, decomposed = (unicodedata.normalize(form, "Tumör A") for form in ("NFC", "NFD"))
    written = LabelMap(labels={decomposed.replace(" ", "  "): "HER2 0"})
    assert written.resolve({composed: 1}, HER2, "L.yaml") == {composed: 1}


@pytest.mark.parametrize("name", ["none", "bg", "NA"])
def test_a_word_for_no_subtype_is_not_the_name_of_one(name):
    with pytest.raises(ConfigError, match="says that there is no subtype; write background or ignore"):
        taxonomy_of([name, "HER2 0"], "mine", "L.yaml")


# Colours of classes


QUPATH = """{{"type": "FeatureCollection", "features": [{{"type": "Feature", "id": "{name}", "geometry":
{{"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 0]]]}},
"properties": {{"objectType": "annotation", "classification": {{"name": "{name}", {colour}}}}}}}]}}"""


@pytest.mark.parametrize("colour", ['"color": [12, 34, 255]', f'"colorRGB": {0xFF0C22FF - 2**32}'])
def test_colours_of_qupath_classes_go_through_the_draft_into_the_taxonomy(tmp_path, colour):
    (tmp_path / "a.geojson").write_text(QUPATH.format(name="Adenoma", colour=colour))
    (tmp_path / "b.geojson").write_text(QUPATH.format(name="Polyp", colour='"color": [1, 2, 3]'))
    draft = draft_labels(read_all(tmp_path, "qupath"))
    assert yaml.safe_load(draft)["colours"] == {"Adenoma": "#0c22ff", "Polyp": "#010203"}
    labels = load(
        tmp_path, draft.replace("  Adenoma:", "  Adenoma: adenoma", 1).replace("  Polyp:", "  Polyp: other", 1)
    )
    found = {s.name: s.colour for s in taxonomy_of_labels(labels, tmp_path / "L.yaml").subtypes}
    assert found == {"adenoma": "#0c22ff", "other": "#010203"}


def test_her2_subtypes_take_the_colours_of_their_first_label_and_else_keep_their_own(tmp_path):
    labels = load(
        tmp_path,
        "labels: {a: HER2 0, b: HER2 0, c: HER2 3+, d: ignore}\n"
        "colours: {b: '#111111', a: '#222222', d: '#333333', elsewhere: '#444444'}",
    )
    taxonomy = taxonomy_of_labels(labels, tmp_path / "L.yaml")
    assert [s.colour for s in taxonomy.subtypes] == ["#111111", *(s.colour for s in HER2.subtypes[1:])]
    assert taxonomy.palette[1].tolist() == [0x11] * 3
    assert taxonomy.names == HER2.names
    assert taxonomy.merges == HER2.merges


@pytest.mark.parametrize("colour", ["300, 0, 0", "0, 0", '"red", 0, 0', "0.5, 0, 0"])
def test_what_is_no_colour_is_passed_over(tmp_path, colour):
    (tmp_path / "a.geojson").write_text(QUPATH.format(name="a", colour=f'"color": [{colour}]'))
    assert "colours" not in draft_labels(read_all(tmp_path, "qupath"))


def test_a_colour_in_another_notation_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"LABELS.yaml: colours.a: .*#\[0-9a-fA-F\]"):
        load(tmp_path, "labels: {a: x}\ncolours: {a: red}")
