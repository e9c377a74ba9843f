import io
from types import MappingProxyType
from unittest.mock import Mock

import numpy as np
import pytest
from drawn_cohort import HER2
from PIL import Image

from counterstain.data.patches import Patch, Source, components, instance_boxes, label_mask, turn, turn_back
from counterstain.data.relabel import Instance, RelabelConfig, relabel
from counterstain.data.stains import STAIN_VECTORS, jitter_stains, macenko_vectors
from counterstain.errors import ConfigError, InputError, TaxonomyError
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


def instances(n=2000, seed=0, subtype=4):
    areas = np.random.default_rng(seed).lognormal(6, 1, n).astype(int) + 1
    return [Instance(patch=i // 4, instance=i % 4 + 1, subtype=subtype, area_px=int(a)) for i, a in enumerate(areas)]


def blockwise(members, config, size=50):
    labels = {}
    for block in range(0, len(members), size):
        labels |= relabel(members[block : block + size], config, HER2, 0, block // size)
    return labels


@pytest.mark.parametrize(
    ("target", "expected"), [("uniform", 0.2), ({"HER2 0": 3, "HER2 3+": 1}, [0.75, 0, 0, 0.25, 0])]
)
@pytest.mark.parametrize("balance", ["count", "area"])
def test_a_target_distribution_of_instances_or_areas_is_met(target, expected, balance):
    members = instances()
    weights = [i.area_px if balance == "area" else 1 for i in members]
    labels = blockwise(members, RelabelConfig(target=target, balance=balance))
    found = np.bincount(list(labels.values()), weights, minlength=6)[1:] / sum(weights)
    assert np.abs(found - expected).max() < 0.02


def test_every_instance_is_as_likely_to_get_a_subtype_as_the_target_says():
    few = instances(3)
    drawn = [relabel(few, RelabelConfig(), HER2, seed, 0)[0, 1] for seed in range(3000)]
    assert np.abs(np.bincount(drawn, minlength=6)[1:] / 3000 - 0.2).max() < 0.03


def test_kept_and_ignored_instances_keep_their_label_and_nothing_else_gets_it():
    members = [*instances(100), *(Instance(patch=99, instance=i, subtype=i, area_px=10) for i in (5, IGNORE))]
    labels = relabel(members, RelabelConfig(keep=("LCIS/DCIS",)), HER2, 0, 0)
    assert {key for key, label in labels.items() if label in {5, IGNORE}} == {(99, 5), (99, IGNORE)}


def test_labels_follow_from_seed_and_block_and_not_from_the_order_of_the_instances():
    members = instances(40)
    first, other_seed, other_block = (relabel(members, RelabelConfig(), HER2, *at) for at in ((0, 0), (1, 0), (0, 1)))
    assert relabel(members[::-1], RelabelConfig(), HER2, 0, 0) == first
    assert other_seed != first != other_block


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target": {"HER2 4": 1}}, TaxonomyError, "unknown subtype 'HER2 4'"),
        ({"keep": HER2.names}, ConfigError, "nothing is left to draw from"),
    ],
)
def test_a_target_that_the_taxonomy_cannot_meet_is_an_error(settings, error, message):
    with pytest.raises(error, match=message):
        RelabelConfig(**settings).shares(HER2)


@pytest.mark.parametrize("target", [{"HER2 0": 0.0}, {"HER2 0": -1.0}])
def test_a_target_without_a_share_is_refused(target):
    with pytest.raises(ValueError, match=r"above 0|greater than or equal to 0"):
        RelabelConfig(target=target)


def unit(name):
    return np.array(STAIN_VECTORS[name]) / np.linalg.norm(STAIN_VECTORS[name])


def stained(*, blue=0.5, brown=0.5, size_px=64, noise=0.0):
    """Haematoxylin in varying amounts on the left, DAB on the right."""
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0.5, 1.0, (size_px, size_px, 1))
    left = np.arange(size_px)[None, :, None] < size_px // 2
    density = 2 * amounts * np.where(left, blue * unit("haematoxylin"), brown * unit("dab"))
    return np.rint(255 * np.exp(-density) + noise * rng.standard_normal(density.shape)).clip(0, 255).astype(np.uint8)


def density(image):
    return -np.log(np.maximum(image, 1) / 255)


def jittered(image, stains, sd, seed=0):
    return jitter_stains(image, stains, sd, np.random.default_rng(seed))


@pytest.mark.parametrize("stains", ["channels", "dab", "eosin", "macenko"])
def test_jitter_follows_from_its_generator_and_its_spread_alone(stains):
    image = stained()
    once, again, other = (jittered(image, stains, 0.1, seed) for seed in (0, 0, 1))
    assert once.dtype == np.uint8
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)
    assert np.array_equal(jittered(image, stains, 0.0), image)


def test_jitter_of_stains_keeps_the_hue_of_a_pure_stain():
    image = stained(brown=0.0)  # pure haematoxylin on white
    factors = Mock(**{"standard_normal.return_value": np.array([[2.5, 0.0], [0.0, 0.0]])})
    changed = density(jitter_stains(image, "dab", 0.2, factors))[:, :32].reshape(-1, 3)
    along = changed @ unit("haematoxylin")
    assert np.abs(changed - along[:, None] * unit("haematoxylin")).max() < 0.02
    assert along.mean() == pytest.approx(1.5 * (density(image)[:, :32] @ unit("haematoxylin")).mean(), rel=0.02)


def test_the_colours_of_two_stains_are_read_off_an_image():
    found = macenko_vectors(stained(noise=1.0))
    assert found[0] @ unit("haematoxylin") > 0.995
    assert found[1] @ unit("dab") > 0.995


@pytest.mark.parametrize("image", [np.full((32, 32, 3), 250, np.uint8), stained(brown=0.0)[:, :32]])
def test_images_without_two_stains_are_jittered_by_channel(image):
    assert macenko_vectors(image) is None
    assert np.array_equal(jittered(image, "macenko", 0.1), jittered(image, "channels", 0.1))
