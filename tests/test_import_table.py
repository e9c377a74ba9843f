import json
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from counterstain.data.cohort import CohortWriter
from counterstain.data.split import SplitConfig, split_cohort
from counterstain.errors import ConfigError, CounterstainWarning, InputError, MismatchError, TaxonomyError
from counterstain.io import import_images as module
from counterstain.io.import_images import import_table
from counterstain.io.pixel_readers import read_image
from counterstain.taxonomy import IGNORE, Taxonomy

HER2 = Taxonomy.named("her2")
EBHI_SEG = Path(__file__).parents[2] / "shared" / "data" / "ebhi_seg"
HEADER = "image,label,subtype,patient"


def boxes(*corners, value=255, shape=(16, 20)):
    """Draw a label image of 5 x 5 boxes."""
    label = np.zeros(shape, np.uint8)
    for y, x in corners:
        label[y : y + 5, x : x + 5] = value
    return label


def draw(folder, name, label, image_shape=None):
    rng = np.random.default_rng([*str(folder / name).encode()])
    image = rng.integers(0, 256, (*(image_shape or label.shape), 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / f"{name}.png")
    Image.fromarray(label).save(folder / f"{name}-label.png")


def table(folder, *rows, header=HEADER):
    path = folder / "tissue.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def imported(folder, *rows, header=HEADER, mpp=1, **options):
    return import_table(table(folder, *rows, header=header), mpp=mpp, out=folder / "out", **options)


def report_of(cohort):
    return json.loads((cohort.folder / "import.json").read_text())


def row(name, *values):
    return ",".join([f"{name}.png", f"{name}-label.png", *values])


@pytest.fixture
def pairs(tmp_path):
    """Three images of two patients."""
    draw(tmp_path, "a", boxes((0, 0), (8, 8)))
    draw(tmp_path, "b", boxes((4, 4)))
    draw(tmp_path, "c", boxes((2, 2), (2, 10)))
    return tmp_path


ROWS = (row("a", "Polyp", "p1"), row("b", "Normal", "p1"), row("c", "Normal", "p2"))


def test_masks_become_instances_of_the_rows_subtype(pairs):
    cohort = import_table(str(table(pairs, *ROWS)), mpp=0.25, out=str(pairs / "out"), tissue_class="lesion")
    assert cohort.taxonomy.names == ("Normal", "Polyp")
    assert (cohort.taxonomy.name, cohort.taxonomy.tissue_class, cohort.mpp) == ("tissue", "lesion", 0.25)
    assert cohort.regions["region"].tolist() == ["a", "b", "c"]
    assert cohort.regions["slide"].tolist() == ["p1", "p1", "p2"]
    assert cohort.instances[["subtype", "area_px"]].to_numpy().tolist() == [[2, 25], [2, 25], [1, 25], [1, 25], [1, 25]]
    np.testing.assert_array_equal(cohort.read(1)[0], read_image(pairs / "b.png"))
    assert cohort.regions["split"].isna().all()


def test_the_report_counts_what_was_imported(pairs):
    draw(pairs, "b", boxes((4, 4), (4, 8)))
    cohort = imported(pairs, *ROWS, min_area_px=26)
    report = report_of(cohort)
    assert (report["regions"], report["patients"], report["regions_without_instance"]) == (3, 2, 2)
    assert (report["dropped_components"], report["dropped_px"]) == (4, 100)
    assert not (cohort.folder / "notes").exists()


def test_soft_masks_are_cut_at_the_threshold(tmp_path):
    draw(tmp_path, "a", np.array([[0, 127, 128, 255]], np.uint8))
    path = table(tmp_path, row("a", "x", "p1"))
    for threshold, area in ((127, 2), (200, 1)):
        cohort = import_table(path, mpp=1, out=tmp_path / str(threshold), threshold=threshold)
        assert cohort.instances["area_px"].tolist() == [area]


def test_each_mask_is_read_as_0_and_1_or_as_0_and_255_and_the_report_says_how_many_were(pairs):
    draw(pairs, "a", boxes((0, 0), value=1))
    draw(pairs, "c", boxes())
    cohort = imported(pairs, *ROWS)
    assert cohort.instances["region"].tolist() == ["a", "b"]
    assert report_of(cohort)["masks"] == {"of 0 and 1": 1, "of 0 and 255": 1, "without tissue": 1}


def test_values_mean_what_the_user_says(tmp_path):
    draw(tmp_path, "a", np.maximum(boxes((0, 0), value=2), boxes((8, 8), value=9)))
    cohort = imported(tmp_path, ROWS[0], mask_values="0=background,1-5=tissue,9=ignore")
    assert cohort.instances["subtype"].tolist() == [1, IGNORE]
    colours = np.zeros((16, 20, 3), np.uint8)
    colours[:5] = 255, 0, 0
    Image.fromarray(colours).save(tmp_path / "a-label.png")
    table(tmp_path, row("a", "p"), header="image,label,patient")
    options = {"labels": "ids", "taxonomy": HER2}
    with pytest.raises(InputError, match=r"has colours, #000000 \(68.8%\), #ff0000 .*Do not convert it to grey"):
        import_table(tmp_path / "tissue.csv", mpp=1, out=tmp_path / "colours", **options)
    by_colour = "#000000=background,#ff0000=HER2 3+"
    again = import_table(tmp_path / "tissue.csv", mpp=1, out=tmp_path / "colours", mask_values=by_colour, **options)
    assert again.instances[["subtype", "area_px"]].to_numpy().tolist() == [[4, 100]]


def test_numbers_of_palettes_that_differ_are_refused_and_their_colours_read(pairs):
    for name, palette in (("a", [0] * 3 + [255] * 3), ("b", [255] * 3 + [0] * 3)):
        label = Image.fromarray(np.asarray(Image.open(pairs / f"{name}-label.png")) // 255 ^ (name == "b"), "P")
        label.putpalette(palette)
        label.save(pairs / f"{name}-label.png")
    with pytest.raises(InputError, match=r"b-label.png: draws 0 as #ffffff but a-label.png as #000000"):
        imported(pairs, *ROWS[:2], mask_values="0=background,1=tissue")
    assert not (pairs / "out").exists()
    cohort = imported(pairs, *ROWS, mask_values="#000000=background,#ffffff=tissue")
    assert cohort.instances["area_px"].tolist() == [25] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mask_values": "0=background,255=tumour"},
            "255=tumour: unknown meaning; expected background, ignore, tissue",
        ),
        ({"mask_values": "white=tissue"}, "'white' is no value; expected 255, 1-254 or #ff0000"),
        ({"mask_values": "0-9=background,9=tissue"}, "9 is there twice"),
        ({"mask_values": "0=background,#ffffff=tissue"}, "numbers and colours together"),
        (
            {"mask_values": "0=background"},
            r"a-label\.png: --mask-values does not say what 255 means, which covers 15.6%",
        ),
        ({"mask_values": "0=background,255=tissue", "threshold": 9}, "--threshold: not together with --mask-values"),
    ],
)
def test_meanings_that_do_not_fit_are_named(pairs, options, message):
    with pytest.raises((InputError, ConfigError), match=message):
        imported(pairs, *ROWS, **options)
    assert not (pairs / "out").exists()


def test_subtypes_are_put_together_by_a_merge_of_the_taxonomy(tmp_path):
    draw(tmp_path, "a", np.maximum(boxes((0, 0), value=1), boxes((8, 8), value=4)))
    options = {"header": "image,label,patient", "labels": "ids", "taxonomy": HER2}
    cohort = imported(tmp_path, row("a", "p1"), merge="stained", **options)
    assert cohort.taxonomy.names == ("non-stained", "stained", "LCIS/DCIS")
    assert cohort.instances["subtype"].tolist() == [1, 2]
    with pytest.raises(InputError, match="unknown merge 'brown'; her2 has stained"):
        imported(tmp_path, row("a", "p1"), merge="brown", **options)


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (100, {}, r"two values, 0 and 1 or 0 and 255; found 0 \(92.2%\), 100 \(7.8%\)\. Say .* --mask-values"),
        (0, {}, "no label image has a pixel of a subtype"),
        (255, {"min_area_px": 26}, "all 1 components are smaller than 26 px; give a lower --min-area-px"),
    ],
)
def test_an_import_without_any_instance_is_an_error_and_leaves_nothing(tmp_path, value, options, message):
    draw(tmp_path, "a", boxes((0, 0), value=value))
    with pytest.raises(InputError, match=message):
        imported(tmp_path, ROWS[0], **options)
    assert not (tmp_path / "out").exists()


def test_label_images_may_hold_the_ids_of_the_taxonomy(tmp_path):
    label = np.maximum(np.maximum(boxes((0, 0), value=1), boxes((0, 5), value=5)), boxes((8, 8), value=IGNORE))
    draw(tmp_path, "a", label)
    cohort = imported(tmp_path, row("a", "p1"), header="image,label,patient", taxonomy=HER2, labels="ids")
    assert cohort.instances["subtype"].tolist() == [1, 5, IGNORE]
    np.testing.assert_array_equal(cohort.patch(0, 0, 0, 16).label_mask, label[:, :16])


def test_masks_that_are_called_ids_are_not_all_ignored(tmp_path):
    draw(tmp_path, "a", boxes((0, 0)))
    with pytest.raises(
        InputError, match=r"hold nothing but 0 and 255 \(ignore\); if they are masks, give --labels mask"
    ):
        imported(tmp_path, row("a", "p1"), header="image,label,patient", taxonomy=HER2, labels="ids")


def test_shrunk_images_are_averages_and_labels_go_by_majority(tmp_path):
    label = np.zeros((17, 20), np.uint8)
    label[:5, :8] = 255
    draw(tmp_path, "a", label)
    cohort = imported(tmp_path, row("a", "Polyp", "p"), mpp=0.25, shrink=2)
    assert cohort.mpp == 0.5
    pixels = read_image(tmp_path / "a.png")[:16].reshape(8, 2, 10, 2, 3)
    image, instances = cohort.read(0)
    np.testing.assert_array_equal(image, (pixels.mean((1, 3)) + 0.5).astype(np.uint8))
    expected = np.zeros((8, 10), bool)
    expected[:2, :4] = True  # of the third row half is lesion: a tie goes to background
    np.testing.assert_array_equal(instances > 0, expected)


def test_ids_are_shrunk_to_the_commonest_of_a_block(tmp_path):
    draw(tmp_path, "a", np.array([[1, 1, 2, 3], [1, 255, 3, 3]], np.uint8).repeat(4, 0).repeat(4, 1))
    cohort = imported(tmp_path, row("a", "p"), header="image,label,patient", labels="ids", taxonomy=HER2, shrink=8)
    assert sorted(cohort.instances["subtype"]) == [1, 3]


def test_optional_columns_are_taken_over(pairs):
    values = [["s1", "train", "x", "r1"], ["s2", "train", "", "r2"], ["s3", "test", "y", "r3"]]
    rows = [",".join([first, *more]) for first, more in zip(ROWS, values, strict=True)]
    regions = imported(pairs, *rows, header=f"{HEADER},slide,part,score,region").regions
    found = regions[["slide", "split", "score", "region"]].fillna("")
    assert found.to_numpy().tolist() == values


@pytest.mark.parametrize("line", ["sep=,", '"sep=,"'])
def test_the_line_in_which_excel_names_the_separator_is_passed_over(pairs, line):
    cohort = imported(pairs, HEADER, *ROWS, header=line)
    assert cohort.regions["region"].tolist() == ["a", "b", "c"]


def test_the_score_is_the_patients_commonest_subtype(pairs):
    draw(pairs, "d", boxes())
    cohort = imported(pairs, *ROWS, row("d", "Polyp", "p1"))
    assert dict(zip(cohort.regions["patient"], cohort.regions["score"], strict=True)) == {"p1": "Polyp", "p2": "Normal"}


def test_images_of_the_same_name_in_two_folders_are_told_apart(tmp_path):
    for place, folder in enumerate("xy"):
        (tmp_path / folder).mkdir()
        draw(tmp_path / folder, "a", boxes((place, 0)))
    cohort = imported(tmp_path, *(f"{f}/a.png,{f}/a-label.png,s,p{f}" for f in "xy"))
    assert cohort.regions["region"].tolist() == ["x/a", "y/a"]


def test_a_table_saved_by_a_spreadsheet_with_other_columns_is_read(pairs):
    path = table(pairs, *(line.replace(",", ", ") for line in ROWS), header="file,mask,kind,case")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    columns = {"image": "file", "label": "mask", "subtype": "kind", "patient": "case"}
    assert len(import_table(path, mpp=1, out=pairs / "out", columns=columns)) == 3


def test_a_slide_too_large_for_the_memory_becomes_several_packs(pairs, monkeypatch):
    monkeypatch.setattr(module, "PACK_BYTES", 16 * 20 * 7)
    cohort = imported(pairs, *ROWS)
    assert cohort.regions["pack"].nunique() == 3
    np.testing.assert_array_equal(cohort.read(1)[0], read_image(pairs / "b.png"))


BAD_ROWS = {
    "missing image": (["z,Polyp,p1"], r"row 2: .*z\.png: no such file"),
    "unknown part": (["a,Polyp,p1,training"], r"row 2: unknown part 'training'; expected train, val, test"),
    "part in capitals": (["a,Polyp,p1,Train", "b,Polyp,p1,TEST"], "p1 is in two parts, train .row 2. and test .row 3"),
    "two parts": (
        ["a,Polyp,p1,train", "b,Polyp,p1,test"],
        r"patient p1 is in two parts, train \(row 2\) and test \(row 3\); move all rows",
    ),
    "region twice": (
        ["a,Polyp,p1,val", "b,Polyp,p1,val", "a,Polyp,p1,val"],
        "region 'a' is in row 2 and row 4; remove",
    ),
    "empty patient": (["a,Polyp,,val"], "row 2: column 'patient' is empty"),
    "empty part": (["a,Polyp,p1,val", "b,Polyp,p2,"], "row 3: column 'part' is empty"),
    "a comma at the end": (["a,Polyp,p1,val,", "b,Polyp,p1,val,"], "row 2: more values than the header has columns"),
    "no row": ([], "the table has a header but no row"),
    "two spellings": (["a,X,p,", "b,N,p,", "c,n ,p2,"], "subtype 'N' in row 3 is 'n' in row 4; use one spelling"),
    "a misspelt subtype": (
        ["a,adenoma,p,", "b,adenom,p2,"],
        "subtype 'adenoma' in row 2 is 'adenom' in row 3; .*--tax",
    ),
    "a number twice": (["a,1,p,", "b,1.0,p2,"], "subtype '1' in row 2 is '1.0' in row 3; use one spelling"),
    "background": (["a,background,p,"], "column 'subtype': 'background' cannot be the name of a subtype"),
    "an escape": (["a,X\x1b[2J,p,"], r"row 2: column 'subtype' holds a control character \('\\x1b'\); remove it"),
    "another computer": ([r"C:\tissue\a,X,p,"], "row 2: .* is a path of a Windows computer; give paths relative"),
    "no label": (["a.png,a.png,X,p,"], "row 2: a.png is the image and its label; name the two files"),
    "blank rows": (["", "", "z,X,p,"], r"row 4: z\.png: no such file"),
    "a lost patient": (["a,X,nan,"], "row 2: column 'patient' is 'nan', which programs write for a missing or"),
    "a quote": (['a,"X,p,'], r"not a CSV table \(line 2: unexpected end of data\)"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_rejected_before_anything_is_written(pairs, case):
    rows, message = BAD_ROWS[case]
    lines = [row(*line.split(",")) if line and ".png" not in line else line for line in rows]
    with pytest.raises(InputError, match=message):
        imported(pairs, *lines, header=f"{HEADER},part")
    assert not (pairs / "out").exists()


BAD_TABLES = {
    "no column": ("image,label,kind,patient", {}, r"no column 'subtype'; found image, .* name .* --subtype-column"),
    "semicolons": ("image;label;subtype;patient", {}, "separated by semicolons; save it with commas"),
    "tabs": (HEADER.replace(",", "\t"), {}, "separated by tabs; save it with commas"),
    "a column twice": (f"{HEADER},label", {}, "row 1: two columns are called 'label'; rename one, or remove it"),
    "another case": (f"{HEADER},Part", {}, "row 1: column 'Part' is spelt 'part'; rename it or give --part-column"),
    "no such column": (HEADER, {"columns": {"slide": "case"}}, r"no column 'case' \(--slide-column\)"),
    "unknown subtype": (HEADER, {"taxonomy": HER2}, r"row 2: unknown subtype 'Polyp'; her2 has HER2 0, HER2 1\+"),
    "ids alone": (HEADER, {"labels": "ids"}, "need a taxonomy that names the ids; give one with --taxonomy"),
    "too small": (HEADER, {"shrink": 17}, r"a-label.png: 20 x 16 px cannot be shrunk 17 times"),
    "no mpp": (HEADER, {"mpp": 0}, r"import of .*tissue\.csv: mpp: Input should be"),
    "mpp of nothing": (HEADER, {"mpp": float("nan")}, r"import of .*tissue\.csv: mpp: Input should be"),
}


def test_names_without_end_are_cut_in_messages(pairs):
    name = "x" * 5000
    for options in ({"mask_values": f"255={name}"}, {"columns": {"slide": name}}, {"merge": name, "taxonomy": HER2}):
        with pytest.raises(InputError, match="xxx…xxx") as error:
            imported(pairs, *(line.replace("Polyp", "HER2 0").replace("Normal", "HER2 0") for line in ROWS), **options)
        assert len(str(error.value)) < 600
    with pytest.raises(InputError, match=r"row 2: column 'subtype' holds more than 300 characters; shorten it"):
        imported(pairs, row("a", name, "p1"))


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_or_option_is_rejected_with_what_was_found(pairs, case):
    header, options, message = BAD_TABLES[case]
    rows = [line.replace(",", ";") for line in ROWS] if ";" in header else ROWS
    with pytest.raises((InputError, TaxonomyError, ConfigError), match=message):
        imported(pairs, *rows, header=header, **options)


@pytest.mark.parametrize(
    ("first", "second"),
    [("1", "01"), ("P1", "p1"), ("P 1", "P1"), ("P\u00a01", "P1"), ("P\u200b1", "P1"), ("\uff11", "1"), ("7", "7.0"),
     ("P\u20131", "P-1"), ("P\u22121", "P-1"), ("P-01", "P1"),
     (unicodedata.normalize("NFC", "Mü"), unicodedata.normalize("NFD", "Mü"))],
)  # fmt: skip
def test_spellings_of_one_patient_are_asked_about(pairs, first, second):
    with pytest.raises(InputError, match=r"patient '.*' in row 2 is '.*' in row 4; use one spelling"):
        imported(pairs, row("a", "x", first), row("b", "x", "other"), row("c", "x", second))


def test_paths_of_windows_and_other_unicode_forms_are_found(tmp_path):
    folder = tmp_path / unicodedata.normalize("NFD", "Bläschen")
    folder.mkdir()
    draw(folder, "a", boxes((0, 0)))
    cohort = imported(tmp_path, "Bläschen\\a.png,Bläschen\\a-label.png,x,p1")
    assert cohort.regions["region"].tolist() == ["a"]


def test_one_image_under_one_patient_is_counted(pairs):
    Image.open(pairs / "a.png").save(pairs / "b.png", compress_level=0)
    assert report_of(imported(pairs, *ROWS[:2]))["repeated_images"] == 1


SAME = "row 3: {} of patient p2 is the same image as a.png of patient p1 in row 2"


@pytest.mark.parametrize("name", ["c.png", "c.tif"])  # the same bytes, the same pixels
def test_one_image_in_two_parts_is_refused_whatever_its_file(pairs, name):
    Image.open(pairs / "a.png").save(pairs / name)
    rows = [row("a", "x", "p1", "train"), f"{name},c-label.png,x,p2,test"]
    with pytest.raises(InputError, match=SAME.format(name)):
        imported(pairs, *rows, header=f"{HEADER},part")
    assert not (pairs / "out").exists()


def test_patients_with_one_image_are_said_and_never_divided(pairs):
    Image.open(pairs / "a.png").save(pairs / "c.png")
    with pytest.warns(CounterstainWarning, match=SAME.format("c.png")):
        cohort = imported(pairs, row("a", "x", "p1"), row("c", "x", "p2"))
    with pytest.raises(InputError, match="patients p1 and p2 have the same image but would be in"):
        split_cohort(cohort, SplitConfig(train=1, val=1, test=0))


def test_images_without_tissue_may_repeat(pairs):
    drawing = np.full((16, 20, 3), 255, np.uint8)
    drawing[3:9, 3:9] = 90, 40, 130
    for name in "ac":
        Image.fromarray(drawing).save(pairs / f"{name}.png")
    assert report_of(imported(pairs, *ROWS))["repeated_images"] == 0


def test_one_label_of_two_images_is_said_and_refused_in_two_parts(pairs):
    shutil.copy(pairs / "a-label.png", pairs / "copy.png")
    said = "row 3: copy.png of b.png is the same as a-label.png of a.png in row 2; give each image its own label"
    with pytest.warns(CounterstainWarning, match=said):
        imported(pairs, row("a", "x", "p1"), "b.png,copy.png,x,p2")
    with pytest.raises(InputError, match=r"row 3: a-label\.png of b\.png is the same"):
        imported(pairs, row("a", "x", "p1", "val"), "b.png,a-label.png,x,p2,test", header=f"{HEADER},part")


def test_one_empty_label_may_serve_many_images(pairs):
    Image.new("L", (20, 16)).save(pairs / "none.png")
    cohort = imported(pairs, row("a", "x", "p1"), "b.png,none.png,x,p2", "c.png,none.png,x,p3")
    assert report_of(cohort)["regions_without_instance"] == 2


def test_a_slide_of_two_patients_is_an_error(pairs):
    rows = [row("a", "x", "p1", "s1"), row("b", "x", "p2", "s1")]
    with pytest.raises(InputError, match=r"slide s1 has two values of patient, p1 \(row 2\) and p2 \(row 3\)"):
        imported(pairs, *rows, header=f"{HEADER},slide")


def test_image_and_label_of_different_size_are_an_error(pairs):
    draw(pairs, "b", boxes((0, 0)), image_shape=(8, 10))
    with pytest.raises(InputError, match=r"row 3: b\.png is 8 x 10 px but its label b-label\.png is 16 x 20 px"):
        imported(pairs, *ROWS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tissue.csv", b"", "the table is empty"),
        ("tissue.csv", b"a,b\n\xff,1\n", r"not UTF-8 \(byte 4\)"),
        ("tissue.csv", "a,b\n1,2\n".encode("utf-16"), "holds NUL bytes, as UTF-16"),
        ("tissue.csv", b"PK\x03\x04", "a workbook of a spreadsheet"),
        ("none.csv", b"", r"none\.csv: no such file; expected a CSV table"),
    ],
)
def test_a_file_that_is_no_table_is_an_error(tmp_path, name, content, message):
    (tmp_path / "tissue.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        import_table(tmp_path / name, mpp=1, out=tmp_path / "out")


def test_an_unknown_id_or_an_image_cut_off_is_named_and_nothing_is_left(pairs):
    for place, name in enumerate("ab"):
        draw(pairs, name, boxes((place, 0), value=1))
    draw(pairs, "c", boxes((3, 7), value=9))
    with pytest.raises(TaxonomyError, match=r"c-label\.png: unknown id 9 at row 3, column 7 \(25 pixels .* 1 HER2 0"):
        imported(pairs, *ROWS, taxonomy=HER2, labels="ids")
    draw(pairs, "c", boxes())
    (pairs / "c.png").write_bytes((pairs / "c.png").read_bytes()[:-200])
    with pytest.raises(InputError, match=r"c\.png: damaged or cut off"):
        imported(pairs, *ROWS)
    assert not (pairs / "out").exists()


def test_a_folder_of_somebody_else_is_left_as_it_is(pairs):
    with pytest.raises(MismatchError, match="was not made by counterstain"):
        import_table(table(pairs, *ROWS), mpp=1, out=pairs)
    assert (pairs / "a.png").exists()


def test_another_table_or_changed_files_may_not_be_imported_into_the_same_folder(pairs):
    before = imported(pairs, *ROWS).fingerprint
    with pytest.raises(MismatchError, match=r"another run \(cohort: source\.files is another"):
        imported(pairs, *ROWS[:2])
    Image.fromarray(np.full((16, 20, 3), 9, np.uint8)).save(pairs / "b.png")
    with pytest.raises(MismatchError, match=r"another run \(cohort: source\.files is another"):
        imported(pairs, *ROWS)
    assert import_table(table(pairs, *ROWS), mpp=1, out=pairs / "again").fingerprint != before


def test_the_same_import_again_keeps_the_split(pairs):
    imported(pairs, *ROWS).write_split({"p1": "train", "p2": "test"})
    assert imported(pairs, *ROWS).patients("test") == ["p2"]


KILLED = """
import os, signal, sys
from pathlib import Path
from counterstain.data.cohort import CohortWriter
from counterstain.io.pixel_readers import read_image
from counterstain.io.import_images import import_table
add = CohortWriter.add
def killed(writer, name, regions, part=0):
    if name == "p2":
        os.kill(os.getpid(), signal.SIGKILL)
    add(writer, name, regions, part)
CohortWriter.add = killed
import_table(Path(sys.argv[1]) / "tissue.csv", mpp=1, out=Path(sys.argv[1]) / "killed")
"""


def test_a_killed_import_goes_on_and_ends_the_same(pairs, monkeypatch):
    path = table(pairs, *ROWS)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(pairs)], check=False)
    assert killed.returncode == -signal.SIGKILL
    whole = import_table(path, mpp=1, out=pairs / "whole")
    added = []
    add = CohortWriter.add
    monkeypatch.setattr(
        CohortWriter, "add", lambda writer, name, *known: added.append(name) or add(writer, name, *known)
    )
    resumed = import_table(path, mpp=1, out=pairs / "killed")
    assert added == ["p2"]
    assert resumed.fingerprint == whole.fingerprint
    assert (resumed.folder / "import.json").read_bytes() == (whole.folder / "import.json").read_bytes()
    assert {path.name for path in resumed.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}


@pytest.mark.skipif(not EBHI_SEG.exists(), reason="the shared data folder is not there")
def test_real_tissue_is_imported(tmp_path):
    lines = (EBHI_SEG / "table.csv").read_text().splitlines()
    folder = EBHI_SEG.resolve()
    rows = [f"{folder}/{a},{folder}/{b},{c}" for a, b, c in (line.split(",", 2) for line in lines[1::60])]
    cohort = imported(tmp_path, *rows, header=lines[0])
    assert len(cohort) == len(rows)
    share = cohort.instances["area_px"].sum() / (224 * 224 * len(rows))
    assert 0.4 < share < 0.8


@pytest.mark.parametrize("names", [("S1-11", "S11-1"), ("B19-1234", "B191-234"), ("1 01", "101"), ("1_12", "11_2")])
def test_names_that_differ_in_where_their_numbers_are_divided_are_two(pairs, names):
    cohort = imported(pairs, row("a", "x", names[0]), row("c", "x", names[1]))
    assert set(cohort.regions["patient"]) == set(names)


@pytest.mark.parametrize("patient", ["NA", "None", "-", "?", "######"])
def test_what_stands_for_a_missing_patient_is_no_patient(pairs, patient):
    with pytest.raises(InputError, match=r"row 2: column 'patient' is .*, which programs write for a missing"):
        imported(pairs, row("a", "x", patient))


@pytest.mark.parametrize(("name", "part"), [("split", "test"), ("Set", "test"), ("fold", "validation")])
def test_parts_in_a_column_of_another_name_are_asked_about(pairs, name, part):
    rows = [row("a", "x", "p1", "train"), row("c", "x", "p2", part)]
    with pytest.raises(InputError, match=f"column '{name}' holds .*train.*, which are parts"):
        imported(pairs, *rows, header=f"{HEADER},{name}")
