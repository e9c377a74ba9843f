"""Real exports of each format; they are not part of the repository."""

from pathlib import Path

import numpy as np
import pytest

from counterstain.io.annotations import read_annotations
from counterstain.io.regions import place, rasterise
from counterstain.io.slides import Box

FOLDER = Path(__file__).parents[2] / "shared" / "data" / "annotations"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the real annotation files are not here (../shared/data)")


@pytest.mark.parametrize(
    ("name", "file_format", "labels", "repaired"),
    [
        ("TCGA-EJ-5519.aperio.xml", "aperio", {"CaP": 1, "layer 3": 1, "layer 4": 1}, 2),
        ("TCGA-EJ-5519.qupath-0.2.json", "qupath", {"Tumor": 1, "Other": 1, "Negative": 1}, 0),
        ("dlup.qupath-0.5.geojson", "qupath", {"UT": 1, "I": 2}, 0),
        ("camelyon16_tumor_009.asap.xml", "asap", {"metastasis": 6}, 3),
    ],
)
def test_every_file_is_read(name, file_format, labels, repaired):
    file = read_annotations(FOLDER / name, file_format)
    assert (file.labels, file.repaired, file.skipped) == (labels, repaired, {})


def test_two_formats_of_one_slide_give_the_same_instances():
    aperio = {a.label: a for a in read_annotations(FOLDER / "TCGA-EJ-5519.aperio.xml", "aperio").annotations}
    qupath = {a.label: a for a in read_annotations(FOLDER / "TCGA-EJ-5519.qupath-0.2.json", "qupath").annotations}
    for layer, name in (("CaP", "Tumor"), ("layer 3", "Negative"), ("layer 4", "Other")):
        one, other = aperio[layer], qupath[name]
        assert one.polygon.intersection(other.polygon).area > 0.9999 * one.polygon.union(other.polygon).area
        x0, y0, x1, y1 = one.polygon.bounds
        box = Box(int(x0) - 1, int(y0) - 1, int(x1 - x0) + 3, int(y1 - y0) + 3)
        scale = (x1 - x0) / 500
        shape = (int(box.height / scale) + 1, 502)
        masks = [rasterise([(1, place([a.polygon], box, scale).polygons[0])], shape) == 1 for a in (one, other)]
        assert np.sum(masks[0] & masks[1]) > 0.99 * np.sum(masks[0] | masks[1])
