import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from counterstain.data.cohort import Cohort


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
        "error: --format xml: unknown; expected exact, qupath, asap, aperio, halo, sliderunner\n",
    )
