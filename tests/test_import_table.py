import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from counterstain.data.cohort import CohortWriter
from counterstain.errors import ConfigError, InputError, MismatchError, TaxonomyError
from counterstain.io import import_table as module
from counterstain.io.import_table import import_table
from counterstain.io.pixel_readers import read_image
from counterstain.taxonomy import IGNORE, Taxonomy

HER2 = Taxonomy.named("her2")
EBHI_SEG = Path(__file__).parents[1] / ".." / "shared" / "data" / "ebhi_seg"
HEADER = "image,label,subtype,patient"


def boxes(*corners, value=255, shape=(16, 20)):
    """Draw a label image of 5 x 5 boxes."""
    label = np.zeros(shape, np.uint8)
    for y, x in corners:
        label[y : y + 5, x : x + 5] = value
    return label


def draw(folder, name, label, image_shape=None):
    rng = np.random.default_rng(len(name))
    image = rng.integers(0, 256, (*(image_shape or label.shape), 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / f"{name}.png")
    Image.fromarray(label).save(folder / f"{name}-label.png")


def table(folder, *rows, header=HEADER):
    path = folder / "tissue.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


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
    cohort = import_table(table(pairs, *ROWS), mpp=0.25, out=pairs / "out", min_area_px=26)
    report = json.loads((cohort.folder / "import.json").read_text())
    assert (report["regions"], report["patients"], report["regions_without_instance"]) == (3, 2, 2)
    assert (report["dropped_components"], report["dropped_px"]) == (4, 100)
    assert not (cohort.folder / "notes").exists()


def test_soft_masks_are_cut_at_the_threshold(tmp_path):
    draw(tmp_path, "a", np.array([[0, 127, 128, 255]], np.uint8))
    path = table(tmp_path, row("a", "x", "p1"))
    assert import_table(path, mpp=1, out=tmp_path / "127").instances["area_px"].tolist() == [2]
    assert import_table(path, mpp=1, out=tmp_path / "200", threshold=200).instances["area_px"].tolist() == [1]


def test_masks_of_0_and_1_are_recognised_and_reported(pairs):
    for name, corners in (("a", [(0, 0)]), ("b", [])):
        draw(pairs, name, boxes(*corners, value=1))
    cohort = import_table(table(pairs, *ROWS[:2]), mpp=1, out=pairs / "out")
    assert cohort.instances["area_px"].tolist() == [25]
    assert json.loads((cohort.folder / "import.json").read_text())["masks_of_0_and_1"] is True


def test_a_dim_mask_among_bright_ones_is_no_mask_of_0_and_1(pairs):
    draw(pairs, "b", boxes((0, 0), value=1))
    cohort = import_table(table(pairs, *ROWS), mpp=1, out=pairs / "out")
    assert "b" not in set(cohort.instances["region"])


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (100, {}, "hold values up to 100, none above the threshold of 127; give a lower --threshold"),
        (0, {}, "no label image has a pixel of a subtype"),
        (255, {"min_area_px": 26}, "all 1 components are smaller than 26 px; give a lower --min-area-px"),
    ],
)
def test_an_import_without_any_instance_is_an_error_and_leaves_nothing(tmp_path, value, options, message):
    draw(tmp_path, "a", boxes((0, 0), value=value))
    with pytest.raises(InputError, match=message):
        import_table(table(tmp_path, ROWS[0]), mpp=0.25, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_subtype_that_is_spelt_in_two_ways_is_an_error(pairs):
    other = row("c", "normal ", "p2")
    with pytest.raises(InputError, match="subtype 'Normal' in row 3 is 'normal' in row 4; use one spelling"):
        import_table(table(pairs, *ROWS[:2], other), mpp=0.25, out=pairs / "out")


def test_label_images_may_hold_the_ids_of_the_taxonomy(tmp_path):
    label = np.maximum(np.maximum(boxes((0, 0), value=1), boxes((0, 5), value=5)), boxes((8, 8), value=IGNORE))
    draw(tmp_path, "a", label)
    path = table(tmp_path, "a.png,a-label.png,p1", header="image,label,patient")
    cohort = import_table(path, mpp=1, out=tmp_path / "out", taxonomy=HER2, labels="ids")
    assert cohort.instances["subtype"].tolist() == [1, 5, IGNORE]
    np.testing.assert_array_equal(cohort.patch(0, 0, 0, 16).label_mask, label[:, :16])


def test_shrunk_images_are_averages_and_labels_go_by_majority(tmp_path):
    label = np.zeros((17, 20), np.uint8)
    label[:5, :8] = 255
    draw(tmp_path, "a", label)
    cohort = import_table(table(tmp_path, row("a", "Polyp", "p")), mpp=0.25, out=tmp_path / "out", shrink=2)
    assert cohort.mpp == 0.5
    pixels = read_image(tmp_path / "a.png")[:16].reshape(8, 2, 10, 2, 3)
    image, instances = cohort.read(0)
    np.testing.assert_array_equal(image, (pixels.mean((1, 3)) + 0.5).astype(np.uint8))
    expected = np.zeros((8, 10), bool)
    expected[:2, :4] = True  # of the third row half is lesion: a tie goes to background
    np.testing.assert_array_equal(instances > 0, expected)


def test_ids_are_shrunk_to_the_commonest_of_a_block(tmp_path):
    draw(tmp_path, "a", np.array([[1, 1, 2, 3], [1, 255, 3, 3]], np.uint8).repeat(4, 0).repeat(4, 1))
    path = table(tmp_path, "a.png,a-label.png,p", header="image,label,patient")
    cohort = import_table(path, mpp=1, out=tmp_path / "out", labels="ids", taxonomy=HER2, shrink=8)
    assert sorted(cohort.instances["subtype"]) == [1, 3]


def test_images_smaller_than_the_factor_are_an_error(pairs):
    with pytest.raises(InputError, match=r"a-label.png: 20 x 16 px cannot be shrunk 17 times"):
        import_table(table(pairs, ROWS[0]), mpp=1, out=pairs / "out", shrink=17)


def test_optional_columns_are_taken_over(pairs):
    path = table(
        pairs,
        row("a", "Polyp", "p1", "s1", "train", "x", "r1"),
        row("b", "Normal", "p1", "s2", "train", "", "r2"),
        row("c", "Normal", "p2", "s3", "test", "y", "r3"),
        header=f"{HEADER},slide,part,score,region",
    )
    regions = import_table(path, mpp=1, out=pairs / "out").regions
    assert regions["region"].tolist() == ["r1", "r2", "r3"]
    assert regions["slide"].tolist() == ["s1", "s2", "s3"]
    assert regions["split"].tolist() == ["train", "train", "test"]
    assert regions["score"].isna().tolist() == [False, True, False]


def test_the_score_is_the_patients_commonest_subtype(pairs):
    draw(pairs, "d", boxes())
    cohort = import_table(table(pairs, *ROWS, row("d", "Polyp", "p1")), mpp=1, out=pairs / "out")
    assert dict(zip(cohort.regions["patient"], cohort.regions["score"], strict=True)) == {"p1": "Polyp", "p2": "Normal"}


def test_columns_may_have_other_names(pairs):
    path = table(pairs, *ROWS, header="file,mask,kind,case")
    columns = {"image": "file", "label": "mask", "subtype": "kind", "patient": "case"}
    assert len(import_table(path, mpp=1, out=pairs / "out", columns=columns)) == 3


def test_images_of_the_same_name_in_two_folders_are_told_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        draw(tmp_path / folder, "a", boxes((0, 0)))
    path = table(tmp_path, *(f"{f}/a.png,{f}/a-label.png,s,p{f}" for f in "xy"))
    assert import_table(path, mpp=1, out=tmp_path / "out").regions["region"].tolist() == ["x/a", "y/a"]


def test_a_table_saved_by_a_spreadsheet_is_read(pairs):
    path = table(pairs, *(line.replace(",", ", ") for line in ROWS))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(import_table(path, mpp=1, out=pairs / "out")) == 3


def test_a_slide_too_large_for_the_memory_becomes_several_packs(pairs, monkeypatch):
    monkeypatch.setattr(module, "PACK_BYTES", 16 * 20 * 7)
    cohort = import_table(table(pairs, *ROWS), mpp=1, out=pairs / "out")
    assert cohort.regions["pack"].nunique() == 3
    np.testing.assert_array_equal(cohort.read(1)[0], read_image(pairs / "b.png"))


BAD_ROWS = {
    "missing image": ([row("z", "Polyp", "p1")], r"row 2: .*z\.png: no such file"),
    "unknown part": (
        [row("a", "Polyp", "p1", "training")],
        r"row 2: unknown part 'training'; expected train, val, test",
    ),
    "two parts": (
        [row("a", "Polyp", "p1", "train"), row("b", "Polyp", "p1", "test")],
        r"patient p1 is in two parts, train \(row 2\) and test \(row 3\); move all rows",
    ),
    "region twice": (
        [row("a", "Polyp", "p1", "val"), row("b", "Polyp", "p1", "val"), row("a", "Polyp", "p1", "val")],
        r"region 'a' is in rows 2 and 4; remove one",
    ),
    "empty patient": ([row("a", "Polyp", "", "val")], "row 2: column 'patient' is empty"),
    "empty part": (
        [row("a", "Polyp", "p1", "val"), row("b", "Polyp", "p2", "")],
        "row 3: column 'part' is empty",
    ),
    "a comma at the end": (
        [row("a", "Polyp", "p1", "val", ""), row("b", "Polyp", "p1", "val", "")],
        r"tissue\.csv row 2: more values than the header has columns; remove commas at the ends",
    ),
    "no row": ([], "the table has a header but no row"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_met_before_anything_is_written(pairs, case):
    rows, message = BAD_ROWS[case]
    with pytest.raises(InputError, match=message):
        import_table(table(pairs, *rows, header=f"{HEADER},part"), mpp=1, out=pairs / "out")
    assert not (pairs / "out").exists()


def test_a_slide_of_two_patients_is_an_error(pairs):
    rows = [row("a", "x", "p1", "s1"), row("b", "x", "p2", "s1")]
    with pytest.raises(InputError, match=r"slide s1 has two values of patient, p1 \(row 2\) and p2 \(row 3\)"):
        import_table(table(pairs, *rows, header=f"{HEADER},slide"), mpp=1, out=pairs / "out")


def test_a_missing_column_is_told_those_that_are_there(pairs):
    path = table(pairs, *ROWS, header="image,label,kind,patient")
    with pytest.raises(
        InputError, match=r"no column 'subtype'; found image, label, kind, patient; name .* --subtype-column"
    ):
        import_table(path, mpp=1, out=pairs / "out")


def test_a_table_with_semicolons_is_told_so(pairs):
    path = table(pairs, "a.png;a-label.png;Polyp;p1", header="image;label;subtype;patient")
    with pytest.raises(InputError, match="separated by semicolons; save it with commas"):
        import_table(path, mpp=1, out=pairs / "out")


def test_a_column_that_was_named_must_be_there(pairs):
    with pytest.raises(InputError, match=r"no column 'case' \(--slide-column\)"):
        import_table(table(pairs, *ROWS), mpp=1, out=pairs / "out", columns={"slide": "case"})


def test_an_unknown_subtype_is_told_the_known_ones(pairs):
    with pytest.raises(TaxonomyError, match=r"row 2: unknown subtype 'Polyp'; her2 has HER2 0, HER2 1\+"):
        import_table(table(pairs, *ROWS), mpp=1, out=pairs / "out", taxonomy=HER2)


def test_image_and_label_of_different_size_are_an_error(pairs):
    draw(pairs, "b", boxes((0, 0)), image_shape=(8, 10))
    with pytest.raises(InputError, match=r"row 3: b\.png is 8 x 10 px but its label b-label\.png is 16 x 20 px"):
        import_table(table(pairs, *ROWS), mpp=1, out=pairs / "out")


@pytest.mark.parametrize("mpp", [0, -0.25, float("nan"), float("inf"), 1000])
def test_an_impossible_mpp_is_an_error(pairs, mpp):
    with pytest.raises(ConfigError, match=r"import of .*tissue\.csv: mpp: Input should be"):
        import_table(table(pairs, *ROWS), mpp=mpp, out=pairs / "out")


@pytest.mark.parametrize(("content", "message"), [(b"", "the table is empty"), (b"a,b\n\xff,1\n", "not UTF-8")])
def test_a_file_that_is_no_table_is_an_error(tmp_path, content, message):
    (tmp_path / "tissue.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        import_table(tmp_path / "tissue.csv", mpp=1, out=tmp_path / "out")


def test_a_missing_table_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv: no such file; expected a CSV table"):
        import_table(tmp_path / "none.csv", mpp=1, out=tmp_path / "out")


def test_ids_without_a_taxonomy_are_an_error(pairs):
    with pytest.raises(InputError, match="need a taxonomy that names the ids; give one with --taxonomy"):
        import_table(table(pairs, *ROWS), mpp=1, out=pairs / "out", labels="ids")


def test_an_unknown_id_is_named_with_its_place_and_nothing_is_left(pairs):
    for name in "abc":
        draw(pairs, name, boxes((0, 0), value=1))
    draw(pairs, "c", boxes((3, 7), value=9))
    with pytest.raises(TaxonomyError, match=r"c-label\.png: unknown id 9 at row 3, column 7 \(25 pixels .* 1 HER2 0"):
        import_table(table(pairs, *ROWS), mpp=1, out=pairs / "out", taxonomy=HER2, labels="ids")
    assert not (pairs / "out").exists()


def test_an_image_that_is_cut_off_is_named_and_nothing_is_left(pairs):
    (pairs / "c.png").write_bytes((pairs / "c.png").read_bytes()[:-200])
    with pytest.raises(InputError, match=r"c\.png: damaged or cut off"):
        import_table(table(pairs, *ROWS), mpp=1, out=pairs / "out")
    assert not (pairs / "out").exists()


def test_a_folder_of_somebody_else_is_left_as_it_is(pairs):
    with pytest.raises(MismatchError, match="was not made by counterstain"):
        import_table(table(pairs, *ROWS), mpp=1, out=pairs)
    assert (pairs / "a.png").exists()


def test_another_table_may_not_be_imported_into_the_same_folder(pairs):
    import_table(table(pairs, *ROWS), mpp=1, out=pairs / "out")
    with pytest.raises(MismatchError, match=r"another run \(cohort: source\.files was"):
        import_table(table(pairs, *ROWS[:2]), mpp=1, out=pairs / "out")


def test_files_that_changed_under_the_same_table_are_another_import(pairs):
    path = table(pairs, *ROWS)
    before = import_table(path, mpp=1, out=pairs / "out").fingerprint
    Image.fromarray(np.full((16, 20, 3), 9, np.uint8)).save(pairs / "b.png")
    with pytest.raises(MismatchError, match=r"another run \(cohort: source\.files was"):
        import_table(path, mpp=1, out=pairs / "out")
    assert import_table(path, mpp=1, out=pairs / "again").fingerprint != before


def test_the_same_import_again_keeps_the_split(pairs):
    path = table(pairs, *ROWS)
    import_table(path, mpp=1, out=pairs / "out").write_split({"p1": "train", "p2": "test"})
    assert import_table(path, mpp=1, out=pairs / "out").patients("test") == ["p2"]


KILLED = """
import os, signal, sys
from pathlib import Path
from counterstain.data.cohort import CohortWriter
from counterstain.io.pixel_readers import read_image
from counterstain.io.import_table import import_table
add = CohortWriter.add
def killed(writer, name, regions):
    if name == "p2":
        os.kill(os.getpid(), signal.SIGKILL)
    add(writer, name, regions)
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
        CohortWriter, "add", lambda writer, name, regions: added.append(name) or add(writer, name, regions)
    )
    resumed = import_table(path, mpp=1, out=pairs / "killed")
    assert added == ["p2"]
    assert resumed.fingerprint == whole.fingerprint
    assert (resumed.folder / "import.json").read_bytes() == (whole.folder / "import.json").read_bytes()
    assert {path.name for path in resumed.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}


@pytest.mark.skipif(not EBHI_SEG.exists(), reason="the shared data folder is not there")
def test_real_tissue_is_imported(tmp_path):
    lines = (EBHI_SEG / "table.csv").read_text().splitlines()
    rows = [
        f"{EBHI_SEG.resolve()}/{a},{EBHI_SEG.resolve()}/{b},{c}" for a, b, c in (r.split(",", 2) for r in lines[1::60])
    ]
    cohort = import_table(table(tmp_path, *rows, header=lines[0]), mpp=0.25, out=tmp_path / "out")
    assert len(cohort) == len(rows)
    share = cohort.instances["area_px"].sum() / (224 * 224 * len(rows))
    assert 0.4 < share < 0.8
