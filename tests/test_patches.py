import numpy as np
import pytest

from counterstain.data.patches import Patch, Source, label_mask, turn, turn_back

TURNS = [(flipped, quarter_turns) for flipped in (False, True) for quarter_turns in range(-1, 5)]
SOURCE = Source(region="r", slide="s", patient="p", y_px=0, x_px=0)


@pytest.mark.parametrize(("flipped", "quarter_turns"), TURNS)
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 4, 2, 3)])
def test_turning_back_undoes_turning(flipped, quarter_turns, shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    turned = turn(array, flipped=flipped, quarter_turns=quarter_turns)
    np.testing.assert_array_equal(turn_back(turned, flipped=flipped, quarter_turns=quarter_turns), array)


@pytest.mark.parametrize(("flipped", "quarter_turns"), TURNS)
def test_turning_mirrors_first_and_then_turns_counter_clockwise(flipped, quarter_turns):
    array = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3)
    expected = np.rot90(array[:, ::-1] if flipped else array, quarter_turns)
    np.testing.assert_array_equal(turn(array, flipped=flipped, quarter_turns=quarter_turns), expected)


def test_a_turned_array_is_a_copy_without_gaps():
    array = np.zeros((4, 4, 3), np.uint8)
    for flipped, quarter_turns in TURNS:
        turned = turn(array, flipped=flipped, quarter_turns=quarter_turns)
        assert turned.flags.c_contiguous
        assert not np.shares_memory(turned, array)


def test_the_label_mask_is_a_lookup_of_the_instances():
    instances = np.array([[0, 7], [2, 70_000]], np.int32)
    assert label_mask(instances, {7: 3, 2: 255, 70_000: 1}).tolist() == [[0, 3], [255, 1]]


def test_a_patch_without_instances_has_an_empty_mask():
    assert not label_mask(np.zeros((2, 2), np.int32), {}).any()


def test_relabelling_changes_only_the_table():
    instances = np.array([[0, 1], [2, 2]], np.int32)
    patch = Patch(image=np.zeros((2, 2, 3), np.uint8), instances=instances, subtypes={1: 1, 2: 2}, source=SOURCE)
    new = patch.relabelled({1: 4, 2: 4})
    assert new.label_mask.tolist() == [[0, 4], [4, 4]]
    assert new.image is patch.image
    assert patch.areas_px == new.areas_px == {1: 1, 2: 2}
