from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from drawn_results import DEMO_ARMS, HER2, draw_counts, results_of

from counterstain.errors import InputError
from counterstain.segmentation.counts import dice, recalls
from counterstain.study.statistics import bootstrap_differences, differences, measures_of, spread

MEASURES = {"dice": dice, "recall_HER2 0": lambda counts: recalls(counts)[..., 0]}


def results(**dice_by_arm):
    rows = [(arm, r, "test", value) for arm, values in dice_by_arm.items() for r, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["arm", "repeat", "split", "dice"])


def counts_on_test(arms=("subtype", "spade+100"), **kwargs):
    counts = draw_counts(arms, kwargs.pop("repeats", 3), **kwargs)
    return counts[counts["split"] == "test"]


def bootstrap(counts, draws=400, **kwargs):
    return bootstrap_differences(counts, "subtype", MEASURES, num_labels=HER2.num_labels, draws=draws, **kwargs)


def test_differences_are_paired_by_repeat():
    row = differences(results(subtype=[0.80, 0.90], spade=[0.81, 0.93]), "subtype").iloc[0]
    assert row["arm"] == "spade"
    assert row["n"] == 2
    assert row[["mean", "min", "max", "reference"]].tolist() == pytest.approx([0.02, 0.01, 0.03, 0.85])
    assert row["sd"] == pytest.approx(np.std([0.01, 0.03], ddof=1))
    assert row["relative"] == pytest.approx(0.02 / 0.85)


def test_a_repeat_that_one_arm_lacks_is_left_out_of_its_pairs():
    row = differences(results(subtype=[0.80, 0.90, 0.70], spade=[0.81, 0.93]), "subtype").iloc[0]
    assert row["n"] == 2
    assert row["reference"] == pytest.approx(0.85)


def test_one_repeat_has_a_difference_and_no_sd():
    row = differences(results(subtype=[0.8], spade=[0.7]), "subtype").iloc[0]
    assert row["mean"] == pytest.approx(-0.1)
    assert np.isnan(row["sd"])


def test_the_reference_alone_has_no_differences():
    assert differences(results(subtype=[0.8]), "subtype").empty


def test_a_missing_reference_is_named():
    with pytest.raises(InputError, match="reference arm 'subtype' has no results; found spade"):
        differences(results(spade=[0.8]), "subtype")


def test_spread_takes_every_column_but_the_keys_for_a_measure():
    table = results(subtype=[0.8, 0.9]).assign(extra=1.0)
    assert measures_of(table) == ["dice", "extra"]
    assert spread(table)["mean"].tolist() == pytest.approx([0.85, 1.0])


def test_an_interval_holds_the_difference_of_the_pooled_counts():
    counts = counts_on_test(gain={"spade+100": 0.1})
    intervals = bootstrap(counts).set_index("measure")
    found = differences(results_of(counts), "subtype").set_index("measure")["mean"]
    for measure in MEASURES:
        assert intervals.loc[measure, "low"] < found[measure] < intervals.loc[measure, "high"]
    assert intervals.loc["recall_HER2 0", "low"] > 0


def test_equal_arms_differ_by_exactly_nothing():
    counts = counts_on_test(("subtype",))
    twin = counts.assign(arm="twin")
    intervals = bootstrap(pd.concat([counts, twin]))
    assert (intervals[["low", "high"]].to_numpy() == 0).all()


def test_without_chance_the_interval_is_the_difference():
    """One patient and one repeat: every draw is the same."""
    counts = counts_on_test(patients=1, repeats=1)
    row = bootstrap(counts).set_index("measure").loc["dice"]
    expected = differences(results_of(counts), "subtype").set_index("measure").loc["dice", "mean"]
    assert row[["low", "high"]].tolist() == pytest.approx([expected, expected])


def test_intervals_depend_on_the_seed_alone():
    counts = counts_on_test()
    shuffled = counts.sample(frac=1, random_state=0)
    first = bootstrap(counts).sort_values("measure", ignore_index=True)
    pd.testing.assert_frame_equal(first, bootstrap(shuffled).sort_values("measure", ignore_index=True))
    assert bootstrap(counts, seed=1)["low"].tolist() != first["low"].tolist()


def test_draws_without_a_subtype_are_counted_and_left_out():
    counts = counts_on_test(patients=3).copy()
    pixels = ["predicted_background", "predicted_tumour"]
    counts.loc[(counts["subtype"] == 1) & (counts["patient"] != "test-patient0"), pixels] = 0
    row = bootstrap(counts, draws=4000).set_index("measure").loc["recall_HER2 0"]
    assert row["undefined"] == pytest.approx((2 / 3) ** 2, abs=0.03)  # two of three patients are drawn
    assert np.isfinite(row["low"])


def simulated(seed, effect, repeats=5, patients=8):
    """Draw a study whose arms differ by `effect` in recall, with chance by patient and by repeat."""
    draw = np.random.default_rng(seed)
    size, ease, taste = (
        draw.integers(20_000, 80_000, patients),
        draw.normal(0, 0.06, patients),
        draw.normal(0, 0.02, patients),
    )
    rows = []
    for arm, gain in (("subtype", 0), ("new", effect + taste)):
        for repeat in range(repeats):
            hit = (size * (0.75 + ease + gain + draw.normal(0, 0.015))).astype(int)
            rows += [(arm, repeat, f"p{p}", 1, size[p] - hit[p], hit[p]) for p in range(patients)]
    return pd.DataFrame(
        rows, columns=["arm", "repeat", "patient", "subtype", "predicted_background", "predicted_tumour"]
    )


@pytest.mark.parametrize(("repeats", "patients"), [(5, 8), (2, 4)])
def test_intervals_hold_the_true_effect_about_as_often_as_they_say(repeats, patients):
    """80 studies: 95 % of the intervals hold the effect, give or take 2.5 standard errors."""
    held = 0
    for seed in range(80):
        counts = simulated(seed, 0.03, repeats, patients)
        measures = {"recall": lambda table: recalls(table)[..., 0]}
        row = bootstrap_differences(counts, "subtype", measures, num_labels=2, draws=300, seed=seed).iloc[0]
        held += row["low"] <= 0.03 <= row["high"]
    assert held / 80 > 0.89


def test_arms_with_other_patients_are_refused():
    counts = counts_on_test()
    lacking = counts[(counts["arm"] != "spade+100") | (counts["patient"] != "test-patient2")]
    with pytest.raises(InputError, match=r"arm spade\+100, repeat 0 lacks patient test-patient2"):
        bootstrap(lacking)


def test_a_label_beyond_the_taxonomy_is_refused():
    counts = counts_on_test()
    with pytest.raises(InputError, match="label 9 found, the taxonomy has 0 to 5"):
        bootstrap(counts.assign(subtype=9))


def test_all_arms_share_their_patients_in_a_draw():
    """An arm's interval does not change when another arm joins the study."""
    few, many = (counts_on_test(arms, gain={}) for arms in (("subtype", "spade+100"), DEMO_ARMS))
    row = bootstrap(many).query("arm == 'spade+100'").reset_index(drop=True)
    pd.testing.assert_frame_equal(row, bootstrap(few))
