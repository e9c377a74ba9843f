"""Damaged folders of cohorts, synthetic sets and results: what was written or one line, in time, in little memory.

COUNTERSTAIN_FUZZ sets how many are tried over all kinds (150 by default, 560 before a release).
"""

import os
import shutil

import pytest
from damage import answer, damage, fuzzed
from drawn_cohort import draw_cohort, draw_set
from drawn_results import draw_results
from hypothesis import Phase, given
from hypothesis import strategies as st

import counterstain as cs
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet

TRIALS = int(os.environ.get("COUNTERSTAIN_FUZZ", "150"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with one sound input of every kind."""
    folder = tmp_path_factory.mktemp("sound")
    cohort = draw_cohort(folder / "cohort", regions=1)
    draw_set(folder / "set", cohort, count=2)
    draw_results(folder / "run", arms=("tumor", "subtype", "spade+100"), patients=3, methods=("spade",))
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


def contents_of_cohort(folder):
    """What a study sees of a cohort."""
    found = Cohort.open(folder)
    known = [found.taxonomy, found.mpp, found.source, found.regions.to_csv(), found.instances.to_csv()]
    pixels = [array.tobytes() for position in range(len(found)) for array in found.read(position)]
    return [repr(known), *pixels, found.patch(0, 0, 0, 32).label_mask.tobytes()]


def contents_of_set(folder):
    """What a study sees of a synthetic set."""
    found = PatchSet.open(folder)
    tables = [found.header, *(table.to_csv() for table in (found.patches, found.instances, found.judged))]
    return [repr(tables), *(patch.image.tobytes() + patch.label_mask.tobytes() for patch in found)]


@pytest.mark.parametrize(("name", "door"), [("cohort", contents_of_cohort), ("set", contents_of_set)])
@fuzzed(TRIALS * 7 // 16, phases=[Phase.generate])
@given(data=st.data())
def test_damaged_tissue_is_what_was_written_or_one_line(sound, tried, name, door, data):
    found, where = tried(data, name, door)
    assert found is None or found == door(sound / name), where


@fuzzed(TRIALS // 8, phases=[Phase.generate])  # each draws all figures
@given(data=st.data())
def test_damaged_results_give_a_report_or_one_line(tried, data):
    tried(data, "run", cs.report)
