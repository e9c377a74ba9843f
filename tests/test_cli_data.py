import numpy as np
import pytest
from PIL import Image

from counterstain.data.cohort import Cohort


@pytest.fixture
def table(tmp_path):
    """Ten patients with an image each; subtype b is in two of them."""
    rows = ["image,label,subtype,patient"]
    for i in range(10):
        label = np.zeros((12, 12), np.uint8)
        label[2:8, 2:8] = 255
        Image.fromarray(label).save(tmp_path / f"label{i}.png")
        Image.new("RGB", (12, 12), (200, 100, 10 * i)).save(tmp_path / f"image{i}.png")
        rows.append(f"image{i}.png,label{i}.png,{'b' if i < 2 else 'a'},p{i}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    return tmp_path / "table.csv"


def test_a_table_becomes_a_split_and_inspected_cohort(run, table, tmp_path):
    out = tmp_path / "cohort"
    status, printed, _ = run("import", "table", table, "--mpp", 0.25, "--out", out, "--tissue-class", "lesion")
    assert status == 0
    assert f"next: counterstain split {out}" in printed
    assert "masks: 10 of 0 and 255" in printed
    assert "share of tissue in the regions that show it: a 25.0%, b 25.0%" in printed
    status, printed, warned = run("split", out, "--train", 6, "--val", 2, "--test", 2)
    assert status == 0
    assert "train          6" in printed
    assert "has no b" in warned
    status, printed, warned = run("inspect", out)
    assert status == 0
    assert "lesion" in printed
    assert "warning: split" in warned
    assert (out / "composition.svg").read_text().startswith("<?xml")
    assert run("inspect", out, "--out", tmp_path / "figures" / "a.png")[0] == 0
    with Image.open(tmp_path / "figures" / "a.png") as figure:
        assert figure.width > 300
    assert Cohort.open(out).taxonomy.tissue_class == "lesion"


def test_bad_input_is_one_line_and_status_2(run, table, tmp_path):
    (tmp_path / "image3.png").unlink()
    status, printed, error = run("import", "table", table, "--mpp", 0.25, "--out", tmp_path / "cohort")
    assert (status, printed) == (2, "")
    assert error.count("\n") == 1
    assert error.startswith(f"error: {table} row 5: ")
    assert not (tmp_path / "cohort").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("split", "COHORT", "--train", -1), "split: train: Input should be greater than or equal to 0 (got -1.0)"),
        (("split", "COHORT", "--train", 8), "8 + 0.2 + 0.2 = 8.4: expected shares that sum to 1"),
        (("split", "COHORT", "--train", 8, "--val", 8, "--test", 8), "8 + 8 + 8 = 24 patients, but the cohort has 10"),
        (("inspect", "COHORT", "--out", "a.bmp"), "a.bmp: unknown kind of figure '.bmp'; expected .svg, .png or .pdf"),
        (("split", "nowhere"), "nowhere: no such cohort"),
        (("inspect", "nowhere"), "nowhere: no such cohort"),
    ],
)
def test_what_does_not_fit_is_one_line_and_status_2(run, table, tmp_path, words, message):
    run("import", "table", table, "--mpp", 0.25, "--out", tmp_path / "cohort")
    status, _, error = run(*(tmp_path / "cohort" if word == "COHORT" else word for word in words))
    assert status == 2
    assert error.startswith(f"error: {message}")


def test_an_unknown_kind_of_labels_is_told_the_known_ones(run, table, tmp_path):
    status, _, error = run("import", "table", table, "--mpp", 1, "--out", tmp_path / "c", "--labels", "colours")
    assert status == 2
    assert "labels: Input should be 'mask' or 'ids' (got 'colours')" in error


def test_names_cannot_steer_the_terminal(run, table, tmp_path):
    table.write_text(table.read_text().replace(",a,", ",[red]a :tada:,"))
    status, printed, _ = run("import", "table", table, "--mpp", 0.25, "--out", tmp_path / "cohort")
    assert (status, printed.count("[red]a :tada:")) == (0, 2)
    status, _, error = run("import", "table", "no\x1b[2J\u202e.csv", "--mpp", 0.25, "--out", tmp_path / "c")
    assert status == 2
    assert error.startswith("error: no\\x1b[2J\\u202e.csv: no such file")
