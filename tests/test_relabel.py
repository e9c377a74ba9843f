import numpy as np
import pytest
from drawn_cohort import HER2

from counterstain.data.relabel import Instance, RelabelConfig, relabel
from counterstain.errors import ConfigError, TaxonomyError
from counterstain.taxonomy import IGNORE


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
