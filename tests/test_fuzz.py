"""Damaged and hostile files: always the right answer or one line, in time, in little memory, inside the output folder.

COUNTERSTAIN_FUZZ sets how many inputs are tried over all kinds (160 by default, 2,000 before a release).
"""

import os
import shutil

import numpy as np
import pytest
from damage import answer, damage
from drawn_cohort import draw_cohort, draw_set
from drawn_results import draw_results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_study import SMALL

import counterstain as cs
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet

TRIALS = int(os.environ.get("COUNTERSTAIN_FUZZ", "160"))
KINDS = 6
fuzzed = settings(
    max_examples=max(1, TRIALS // KINDS),
    deadline=None,
    database=None,
    derandomize="COUNTERSTAIN_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


def draw_table(folder):
    """Four images, their masks in four formats, and the table that lists them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number, ending in enumerate(("png", "tif", "bmp", "tiff")):
        mask = np.zeros((32, 32), np.uint8)
        mask[4:20, 8:24] = 255
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.{ending}")
        Image.fromarray(mask).save(folder / f"{number}-mask.{ending}")
        rows.append(f"{number}.{ending},{number}-mask.{ending},p{number},HER2 {number}")
    (folder / "table.csv").write_text("\n".join(["image,label,patient,subtype", *rows]) + "\n")


def import_from(folder):
    return cs.import_table(folder / "table.csv", mpp=0.5, out=folder / "out", taxonomy="her2")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with one sound input of every kind."""
    folder = tmp_path_factory.mktemp("sound")
    cohort = draw_cohort(folder / "cohort", regions=1)
    draw_set(folder / "set", cohort, count=8)
    changes = {f"{part}": SMALL["recipe"][part] for part in ("spade", "segmenter")} | {"size_px": 32}
    cs.train("spade", cohort, out=folder / "spade", preset="demo", settings=changes)
    cs.segment(cohort, out=folder / "segmenter", preset="demo", settings=changes)
    draw_results(folder / "run", arms=("tumor", "subtype", "spade+100"), patients=3, methods=("spade",))
    draw_table(folder / "tissue")
    return folder


@pytest.fixture
def tried(sound, tmp_path):
    """Damage a copy of a sound input, ask a door for its answer, and see that nothing else was touched."""

    def tried(data, name, door, pattern="*"):
        place = tmp_path / "inside"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(sound / name, place / name)
        where = damage(data, place / name, pattern)
        found = answer(door, place / name)
        assert [path.name for path in tmp_path.iterdir()] == ["inside"]
        return found, where

    return tried


def tissue_of(folder):
    cohort = Cohort.open(folder)
    return [array for position in range(len(cohort)) for array in cohort.read(position)]


def patches_of(folder):
    found = PatchSet.open(folder)
    return [array for patch in found for array in (patch.image, patch.instances, patch.label_mask)]


def same(found, expected):
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


@fuzzed
@given(data=st.data())
def test_a_damaged_cohort_gives_the_pixels_that_were_written_or_one_line(sound, tried, data):
    found, where = tried(data, "cohort", tissue_of)
    assert found is None or same(found, tissue_of(sound / "cohort")), where


@fuzzed
@given(data=st.data())
def test_a_damaged_set_gives_the_patches_that_were_written_or_one_line(sound, tried, data):
    found, where = tried(data, "set", patches_of)
    assert found is None or same(found, patches_of(sound / "set")), where


def drawn_by(sound, folder):
    cohort = Cohort.open(sound / "cohort")
    generator = cs.load_generator(folder, method="spade", cohort=cohort)
    return [generator.draw(cohort.patch(0, 0, 0, 32)).image]


@fuzzed
@given(data=st.data())
def test_a_damaged_generator_draws_as_before_or_gives_one_line(sound, tried, data):
    found, where = tried(data, "spade", lambda folder: drawn_by(sound, folder), "model.*")
    assert found is None or same(found, drawn_by(sound, sound / "spade")), where


def scores_of(sound, folder):
    return [cs.evaluate(folder, sound / "cohort", split="val").to_numpy()]


@fuzzed
@given(data=st.data())
def test_a_damaged_segmenter_scores_as_before_or_gives_one_line(sound, tried, data):
    found, where = tried(data, "segmenter", lambda folder: scores_of(sound, folder), "model.*")
    assert found is None or same(found, scores_of(sound, sound / "segmenter")), where


@fuzzed
@given(data=st.data())
def test_damaged_results_give_a_report_or_one_line(tried, data):
    tried(data, "run", cs.report)


@fuzzed
@given(data=st.data())
def test_a_damaged_table_of_images_gives_a_cohort_or_one_line(tried, data):
    tried(data, "tissue", import_from)
