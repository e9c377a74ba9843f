import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from counterstain.cli import printing
from counterstain.data.cohort import Cohort

HELP = """
import sys, counterstain.cli
sys.argv = ["counterstain", "--help"]
try: counterstain.cli.main()
except SystemExit: pass
"""
IMPORT = """
import sys, counterstain
try: counterstain.import_slides(".", annotations=".", format="asap", labels="nowhere", mpp=1, out="nowhere")
except counterstain.CounterstainError: pass
"""


@pytest.mark.parametrize(
    ("what", "code", "heavy"),
    [
        ("help", HELP, {"torch", "numpy", "pandas", "pydantic", "rich"}),
        ("planning", "import sys, counterstain.study.estimate", {"torch", "diffusers"}),
        ("import", IMPORT, {"torch", "scipy.optimize"}),
    ],
)
def test_what_needs_no_heavy_library_loads_none(what, code, heavy):
    code += f"\nprint(*({heavy} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines()[-1] == "", what


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect", "nowhere"), "error: nowhere: no such cohort"),
        (("phantom", "--slidez", "3"), "No such option: --slidez"),
        (
            ("synthesize", "x", "--out", "y", "--method", "gan", "--count", "1"),
            "expected one of spade, diffusion, inpainting, oracle",
        ),
    ],
)
def test_bad_input_is_status_2(run, words, message):
    status, printed, error = run(*words)
    assert (status, printed) == (2, "")
    assert message in error


@pytest.mark.parametrize("typer_tells_it_by", ["exception", "status"])
def test_ctrl_c_says_how_to_go_on(run, monkeypatch, typer_tells_it_by):
    def stopped(**_):
        if typer_tells_it_by == "exception":
            raise KeyboardInterrupt
        return 130

    monkeypatch.setattr("counterstain.cli.app", stopped)
    monkeypatch.setattr("os._exit", sys.exit)
    status, _, error = run()
    assert status == 130
    assert "give the same command again to continue" in error


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
    assert "labels: Input should be 'mask', 'ids', 'instances' or 'planes' (got 'colours')" in error


def test_names_cannot_steer_the_terminal(run, table, tmp_path):
    table.write_text(table.read_text().replace(",a,", ",[red]a :tada:,"))
    status, printed, _ = run("import", "table", table, "--mpp", 0.25, "--out", tmp_path / "cohort")
    assert (status, printed.count("[red]a :tada:")) == (0, 2)
    status, _, error = run("import", "table", "no\x1b[2J\u202e.csv", "--mpp", 0.25, "--out", tmp_path / "c")
    assert status == 2
    assert error.startswith("error: no\\x1b[2J\\u202e.csv: no such file")


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    image = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb")
    shape = {"type": "Polygon", "coordinates": [[[50, 50], [150, 50], [150, 320], [50, 50]]]}
    feature = {"type": "Feature", "geometry": shape, "properties": {"classification": {"name": "HER2 3+"}}}
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return tmp_path / "a.tif"


def options(folder: Path, *more: object) -> list[object]:
    return [
        "--annotations", folder / "a.geojson", "--format", "qupath", "--labels", folder / "LABELS.yaml", "--mpp", 1,
        "--out", folder / "out", *more,
    ]  # fmt: skip


def test_a_draft_of_the_labels_leads_to_a_cohort(run, slide, tmp_path):
    status, draft, _ = run("import", "labels", tmp_path / "a.geojson", "--format", "qupath")
    assert status == 0
    (tmp_path / "LABELS.yaml").write_text(draft)
    more = options(tmp_path, "--mpp-level0", 0.5, "--region-size-um", 100)
    status, printed, _ = run("import", "slides", slide, *more)
    assert status == 0
    assert "1 annotations reach over the edge of their slide and were cut there" in printed
    assert f"next: counterstain split {tmp_path / 'out'}" in printed
    assert len(Cohort.open(tmp_path / "out")) == 1


def test_a_slide_without_a_resolution_is_one_line_and_status_2(run, slide, tmp_path):
    (tmp_path / "LABELS.yaml").write_text("labels: {HER2 3+: HER2 3+}\n")
    status, _, error = run("import", "slides", slide, *options(tmp_path))
    assert (status, error) == (2, f"error: {slide}: the file has no resolution; give it with --mpp-level0\n")
    assert not (tmp_path / "out").exists()


def test_files_of_other_formats_are_left_out_and_said(run, slide, tmp_path):
    (tmp_path / "b.xml").write_text("<Annotations/>")
    status, draft, warning = run("import", "labels", tmp_path, "--format", "qupath")
    assert (status, "HER2 3+:" in draft) == (0, True)
    assert warning == "warning: b.xml: another format, left out\n"


def test_a_format_that_is_unknown_or_not_the_files_is_one_line_and_status_2(run, tmp_path):
    (tmp_path / "a.xml").write_text("<Annotations/>")
    (tmp_path / "b.xml").write_text("<ASAP_Annotations/>")
    status, _, error = run("import", "labels", tmp_path, "--format", "aperio")
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: {tmp_path / 'b.xml'}: looks like asap, not aperio; give --format asap")
    status, _, error = run("import", "labels", tmp_path, "--format", "xml")
    assert (status, error) == (
        2,
        "error: --format xml: unknown; expected exact, qupath, asap, aperio, halo, sliderunner, coco, labelme\n",
    )


@pytest.mark.parametrize(("age_s", "said"), [(0, "trained"), (3600, "is trained already")])
def test_a_network_that_was_trained_before_is_not_called_trained_now(tmp_path, capsys, age_s, said):
    (tmp_path / "model.json").write_text("{}")
    then = time.time() - age_s
    os.utime(tmp_path / "model.json", (then, then))
    printing.segmenter(tmp_path, {"cohort": "cohort"})
    assert capsys.readouterr().out.startswith(f"{tmp_path}: {said}")
