import numpy as np
import pytest

from counterstain.data.patches import components, instance_boxes
from counterstain.errors import InputError
from counterstain.taxonomy import IGNORE


def test_pixels_that_touch_at_a_corner_are_one_instance():
    found = components(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], np.uint8))
    assert found.labels == {1: 1}
    assert found.instances.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_neighbours_of_different_labels_are_different_instances():
    found = components(np.array([[2, 1, 0, 1]], np.uint8))
    assert found.instances.tolist() == [[3, 1, 0, 2]]
    assert found.labels == {1: 1, 2: 1, 3: 2}


def test_small_components_become_background_and_are_counted():
    found = components(np.array([[1, 0, 2, 2, 0, 1], [0, 0, 2, 2, 0, 1]], np.uint8), min_area_px=3)
    assert found.labels == {1: 2}
    assert (found.dropped, found.dropped_px) == (2, 3)
    assert found.instances.tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]]


def test_what_is_to_be_ignored_is_never_dropped():
    assert components(np.array([[IGNORE, 0, 1]], np.uint8), min_area_px=9).labels == {1: IGNORE}


def test_an_empty_label_image_has_no_instances():
    found = components(np.zeros((3, 3), np.uint8))
    assert found.labels == {}
    assert list(instance_boxes(found.instances)) == []


@pytest.mark.parametrize("factor", [1, 1_000_003])
def test_boxes_and_areas_equal_those_counted_by_hand(factor):
    instances = np.random.default_rng(0).integers(0, 9, (12, 15)).astype(np.int32) * factor
    boxes = {i: (area, box) for i, area, box in instance_boxes(instances)}
    assert set(boxes) == set(np.unique(instances).tolist()) - {0}
    for i, (area, box) in boxes.items():
        y, x = np.nonzero(instances == i)
        assert (area, box) == (len(y), (y.min(), x.min(), y.max() + 1, x.max() + 1))


def test_a_negative_id_is_an_error():
    with pytest.raises(InputError, match="instance id -1: ids are 1, 2, 3"):
        list(instance_boxes(np.array([[-1, 0]], np.int32)))
