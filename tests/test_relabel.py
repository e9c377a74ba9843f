import numpy as np
import pytest
from drawn_cohort import HER2

from counterstain.data.relabel import Instance, RelabelConfig, relabel
from counterstain.errors import ConfigError, TaxonomyError
from counterstain.taxonomy import IGNORE


def instances(n=2000, seed=0, subtype=4):
    areas = np.random.default_rng(seed).lognormal(6, 1, n).astype(int) + 1
    return [Instance(patch=i // 4, instance=i % 4 + 1, subtype=subtype, area_px=int(a)) for i, a in enumerate(areas)]


def shares(labels, weights=None):
    values = np.array(list(labels.values()))
    return np.bincount(values, weights, minlength=6)[1:6] / (len(values) if weights is None else weights.sum())


def blockwise(members, config, size=50):
    labels = {}
    for block in range(0, len(members), size):
        labels |= relabel(members[block : block + size], config, HER2, 0, block // size)
    return labels


def test_relabelled_instances_are_balanced_by_count():
    labels = blockwise(instances(), RelabelConfig())
    assert np.abs(shares(labels) - 0.2).max() < 0.02


def test_a_target_distribution_is_met():
    target = {"HER2 0": 3, "HER2 3+": 1}
    labels = blockwise(instances(), RelabelConfig(target=target))
    assert np.abs(shares(labels) - [0.75, 0, 0, 0.25, 0]).max() < 0.02


def test_balance_by_area_balances_areas():
    members = instances()
    areas = np.array([i.area_px for i in members], float)
    by_area = blockwise(members, RelabelConfig(balance="area"))
    assert np.abs(shares(by_area, areas) - 0.2).max() < 0.02


def test_every_instance_is_as_likely_to_get_a_subtype_as_the_target_says():
    few = instances(3)
    drawn = [relabel(few, RelabelConfig(), HER2, seed, 0)[0, 1] for seed in range(3000)]
    assert np.abs(np.bincount(drawn, minlength=6)[1:] / 3000 - 0.2).max() < 0.03


def test_kept_subtypes_keep_their_label_and_nothing_else_gets_it():
    members = [*instances(100), Instance(patch=99, instance=9, subtype=5, area_px=10)]
    labels = relabel(members, RelabelConfig(keep=("LCIS/DCIS",)), HER2, 0, 0)
    assert labels[99, 9] == 5
    assert sum(value == 5 for value in labels.values()) == 1


def test_ignored_instances_stay_ignored():
    members = [Instance(patch=0, instance=1, subtype=IGNORE, area_px=10)]
    assert relabel(members, RelabelConfig(), HER2, 0, 0) == {(0, 1): IGNORE}


def test_labels_do_not_depend_on_the_order_of_the_instances():
    members = instances(40)
    assert relabel(members, RelabelConfig(), HER2, 7, 3) == relabel(members[::-1], RelabelConfig(), HER2, 7, 3)


def test_other_seeds_and_blocks_give_other_labels():
    members = instances(40)
    drawn = [relabel(members, RelabelConfig(), HER2, seed, block) for seed, block in ((0, 0), (1, 0), (0, 1))]
    assert drawn[0] != drawn[1]
    assert drawn[0] != drawn[2]


def test_an_unknown_subtype_in_the_target_is_named():
    with pytest.raises(TaxonomyError, match="unknown subtype 'HER2 4'"):
        RelabelConfig(target={"HER2 4": 1}).shares(HER2)


def test_keeping_every_subtype_leaves_nothing_to_draw():
    with pytest.raises(ConfigError, match="nothing is left to draw from"):
        RelabelConfig(keep=HER2.names).shares(HER2)


@pytest.mark.parametrize("target", [{"HER2 0": 0.0}, {"HER2 0": -1.0}])
def test_a_target_without_a_share_is_refused(target):
    with pytest.raises(ValueError, match=r"above 0|greater than or equal to 0"):
        RelabelConfig(target=target)
