import io
from types import MappingProxyType

import numpy as np
import pytest
from drawn_cohort import HER2
from PIL import Image

from counterstain.data.patches import Patch, Source, components, instance_boxes, label_mask, turn, turn_back
from counterstain.errors import InputError
from counterstain.taxonomy import IGNORE, colours

TURNS = [(flipped, quarter_turns) for flipped in (False, True) for quarter_turns in range(-1, 5)]
SOURCE = Source(region="r", slide="s", patient="p", y_px=0, x_px=0)


@pytest.mark.parametrize(("flipped", "quarter_turns"), TURNS)
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 4, 2, 3)])
def test_arrays_are_copied_mirrored_and_then_turned_counter_clockwise_and_back(flipped, quarter_turns, shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    turned = turn(array, flipped=flipped, quarter_turns=quarter_turns)
    np.testing.assert_array_equal(turned, np.rot90(array[:, ::-1] if flipped else array, quarter_turns))
    assert turned.flags.c_contiguous
    assert not np.shares_memory(turned, array)
    np.testing.assert_array_equal(turn_back(turned, flipped=flipped, quarter_turns=quarter_turns), array)


def test_the_label_mask_is_a_lookup_of_the_instances():
    instances = np.array([[0, 7], [2, 70_000]], np.int32)
    assert label_mask(instances, {7: 3, 2: 255, 70_000: 1}).tolist() == [[0, 3], [255, 1]]
    assert not label_mask(np.zeros((2, 2), np.int32), {}).any()


def drawn(subtypes=MappingProxyType({1: 1, 2: 2, 3: 2}), taxonomy=HER2):
    image, instances = np.zeros((2, 2, 3), np.uint8), np.array([[0, 1], [2, 3]], np.int32)
    return Patch(image=image, instances=instances, subtypes=dict(subtypes), source=SOURCE, taxonomy=taxonomy)


def test_relabelling_instances_or_subtypes_changes_only_the_table():
    patch = drawn()
    new = patch.relabelled({1: 4, 2: "HER2 0"})
    assert new.label_mask.tolist() == [[0, 4], [1, 2]]
    assert new.image is patch.image
    assert patch.areas_px == new.areas_px == {1: 1, 2: 1, 3: 1}
    assert patch.relabelled({"HER2 0": "HER2 1+", "HER2 1+": "HER2 0"}).subtypes == {1: 2, 2: 1, 3: 1}
    assert patch.subtypes == {1: 1, 2: 2, 3: 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({7: 1, 1: 1, 9: 1}, r"unknown instances \[7, 9\]; r shows \[1, 2, 3\]"),
        ({1: "HER2 4+"}, r"unknown subtype 'HER2 4\+'; her2 has HER2 0"),
        *(({1: subtype}, f"unknown subtype {subtype}; her2 has HER2 0") for subtype in (6, 0, -1)),
    ],
)
def test_relabelling_what_is_unknown_names_it(changes, message):
    with pytest.raises(InputError, match=message):
        drawn().relabelled(changes)


@pytest.mark.parametrize("subtype", ["HER2 0", 0, 256])
def test_a_patch_without_a_taxonomy_takes_ids_alone(subtype):
    patch = drawn(taxonomy=None)
    assert patch.relabelled({1: 255}).subtypes == {1: 255, 2: 2, 3: 2}
    with pytest.raises(InputError, match="this patch has no taxonomy, give ids"):
        patch.relabelled({1: subtype})


@pytest.mark.parametrize(("taxonomy", "colour"), [(HER2, HER2.subtypes[1].colour), (None, colours(2)[1])])
def test_a_notebook_shows_the_image_beside_the_mask_in_the_colours_of_the_subtypes(taxonomy, colour):
    shown = np.asarray(Image.open(io.BytesIO(drawn({1: 1, 2: 2, 3: 255}, taxonomy)._repr_png_())))
    assert shown.shape[0] == 2
    assert not shown[:, :2].any()
    assert "#" + bytes(shown[1, -2].tolist()).hex() == colour
    assert shown[0, -2].tolist() == [255] * 3  # background
    assert shown[1, -1].tolist() == [128] * 3  # ignored


def test_patches_and_their_sources_are_shown_in_a_line():
    assert repr(drawn()) == "Patch(2 x 2 px of region r: 1 HER2 0, 2 HER2 1+)"
    assert repr(drawn({}, None)) == "Patch(2 x 2 px of region r: background)"
    assert repr(SOURCE) == "Source(region r of slide s, patient p, at y=0, x=0)"


def test_pixels_of_a_label_that_touch_at_a_corner_are_one_instance():
    found = components(np.array([[2, 1, 0, 1], [2, 0, 1, 0]], np.uint8))
    assert found.instances.tolist() == [[2, 1, 0, 1], [2, 0, 1, 0]]
    assert found.labels == {1: 1, 2: 2}


def test_small_components_become_background_and_are_counted_unless_they_are_to_be_ignored():
    found = components(np.array([[1, 0, 2, 2, 0, 1], [0, 0, 2, 2, 0, 1]], np.uint8), min_area_px=3)
    assert found.labels == {1: 2}
    assert (found.dropped, found.dropped_px) == (2, 3)
    assert found.instances.tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]]
    assert components(np.array([[IGNORE, 0, 1]], np.uint8), min_area_px=9).labels == {1: IGNORE}


@pytest.mark.parametrize("factor", [1, 1_000_003])
@pytest.mark.parametrize("bands", [[], [5, 6]])
def test_boxes_and_areas_equal_those_counted_by_hand(factor, bands):
    instances = np.random.default_rng(0).integers(0, 9, (12, 15)).astype(np.int32) * factor
    boxes = {i: (area, box) for i, area, box in instance_boxes(np.split(instances, bands))}
    assert set(boxes) == set(np.unique(instances).tolist()) - {0}
    for i, (area, box) in boxes.items():
        y, x = np.nonzero(instances == i)
        assert (area, box) == (len(y), (y.min(), x.min(), y.max() + 1, x.max() + 1))


def test_maps_of_instances_may_be_empty_but_not_negative():
    assert list(instance_boxes([components(np.zeros((3, 3), np.uint8)).instances])) == []
    with pytest.raises(InputError, match="instance id -1: ids are 1, 2, 3"):
        list(instance_boxes([np.array([[-1, 0]], np.int32)]))
