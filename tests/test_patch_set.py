import pickle

import numpy as np
import pytest
from drawn_cohort import draw_cohort, draw_set

from counterstain.data.patch_set import PatchSet
from counterstain.errors import InputError


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches")
    return draw_set(folder / "set", draw_cohort(folder / "cohort", regions=1), count=70)


def sources(patches):
    return [patch.source for patch in patches]


def test_a_set_is_a_sequence_of_its_patches(patches):
    every = list(patches)
    assert len(every) == len(patches) == 70
    assert sources(every) == sources(patches[i] for i in range(70))
    assert patches[-1].source == patches[np.int64(69)].source == every[69].source
    for part in (slice(3), slice(-2, None), slice(60, 68, 3), slice(None, None, -30), slice(80, 90)):
        assert sources(patches[part]) == sources(every[part])
    for beyond in (70, -71):
        with pytest.raises(IndexError):
            patches[beyond]


def test_a_set_shows_what_it_is_and_is_opened_by_a_string(patches):
    opened = PatchSet.open(str(patches.folder))
    assert repr(opened) == f"PatchSet({patches.folder}: 70 patches of 48 px by oracle, her2, 0.5 um/px)"
    with pytest.raises(InputError, match="no such set"):
        PatchSet.open("nowhere")


def test_a_set_goes_to_another_process(patches):
    before = patches[0]
    assert np.array_equal(pickle.loads(pickle.dumps(patches))[0].image, before.image)
