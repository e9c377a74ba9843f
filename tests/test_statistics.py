from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from drawn_results import DEMO_ARMS, HER2, draw_counts, results_of
from scipy.stats import nct as noncentral
from scipy.stats import t as student

from counterstain.errors import InputError
from counterstain.segmentation.counts import dice, recalls
from counterstain.study.statistics.arm_differences import (
    Components,
    components_of,
    differences,
    effects_of,
    need,
    power,
    standard_error,
)
from counterstain.study.statistics.significance import holm

MEASURES = {"dice": dice, "recall_HER2 0": lambda counts: recalls(counts)[..., 0]}


def results(**dice_by_arm):
    rows = [(arm, r, "test", value) for arm, values in dice_by_arm.items() for r, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["arm", "repeat", "split", "dice"])


def counts_on_test(arms=("subtype", "spade+100"), **kwargs):
    counts = draw_counts(arms, kwargs.pop("repeats", 3), **kwargs)
    return counts[counts["split"] == "test"]


def effects(counts, draws=400, **kwargs):
    return effects_of(counts, "subtype", MEASURES, num_labels=HER2.num_labels, draws=draws, **kwargs)


def test_differences_are_paired_by_repeat():
    row = differences(results(subtype=[0.80, 0.90], spade=[0.81, 0.93]), "subtype").iloc[0]
    assert row["arm"] == "spade"
    assert row["n"] == 2
    assert row[["mean", "min", "max", "reference"]].tolist() == pytest.approx([0.02, 0.01, 0.03, 0.85])
    assert row["sd"] == pytest.approx(np.std([0.01, 0.03], ddof=1))
    assert row["relative"] == pytest.approx(0.02 / 0.85)


def test_repeats_without_a_pair_have_no_difference_and_a_missing_reference_is_named():
    row = differences(results(subtype=[0.80, 0.90, 0.70], spade=[0.81]), "subtype").iloc[0]
    assert (row["n"], row["reference"], row["mean"]) == pytest.approx((1, 0.80, 0.01))
    assert np.isnan(row["sd"])
    assert differences(results(subtype=[0.8]), "subtype").empty
    with pytest.raises(InputError, match="reference arm 'subtype' has no results; found spade"):
        differences(results(spade=[0.8]), "subtype")


def test_an_interval_holds_the_difference_of_the_pooled_counts():
    counts = counts_on_test(gain={"spade+100": 0.1})
    intervals = effects(counts).set_index("measure")
    found = differences(results_of(counts), "subtype").set_index("measure")["mean"]
    for measure in MEASURES:
        assert intervals.loc[measure, "low"] < found[measure] < intervals.loc[measure, "high"]
    assert intervals.loc["recall_HER2 0", "low"] > 0


def test_equal_arms_differ_by_exactly_nothing():
    counts = counts_on_test(("subtype",))
    found = effects(pd.concat([counts, counts.assign(arm="twin")]))
    assert (found[["low", "high"]].to_numpy() == 0).all()
    assert (found["p"] == 1).all()


@pytest.mark.parametrize(("patients", "repeats"), [(1, 1), (1, 4), (2, 4)])
def test_fewer_than_three_patients_have_no_interval(patients, repeats):
    row = effects(counts_on_test(patients=patients, repeats=repeats)).set_index("measure").loc["dice"]
    assert row[["low", "high", "relative_low", "detectable", "needed_repeats"]].isna().all()
    assert row["p"] >= 2 / 2**patients


def test_one_repeat_gives_an_interval_over_patients():
    row = effects(counts_on_test(patients=6, repeats=1)).set_index("measure").loc["dice"]
    assert row["low"] < row["high"]


def test_no_interval_goes_beyond_the_largest_difference():
    counts = pd.DataFrame(
        [
            (arm, repeat, "test", f"p{p}", 1, 100 - found, found)
            for arm, shares in {"subtype": (5, 95, 5), "tumor": (95, 5, 95)}.items()
            for repeat in range(2)
            for p, found in enumerate(shares)
        ],
        columns=["arm", "repeat", "split", "patient", "subtype", "predicted_background", "predicted_tumour"],
    )
    found = effects_of(counts, "subtype", {"recall": lambda t: t[..., 1, 1] / t[..., 1, :].sum(-1)}, num_labels=2)
    assert found[["low", "high"]].to_numpy().tolist() == [[-1, 1]]


def test_intervals_depend_on_the_seed_alone():
    counts = counts_on_test()
    shuffled = counts.sample(frac=1, random_state=0)
    first = effects(counts).sort_values("measure", ignore_index=True)
    pd.testing.assert_frame_equal(first, effects(shuffled).sort_values("measure", ignore_index=True))
    assert effects(counts, seed=1)["low"].tolist() != first["low"].tolist()


def keep_subtype_1_of(counts, patients):
    pixels = ["predicted_background", "predicted_tumour"]
    taken = (counts["subtype"] == 1) & ~counts["patient"].isin(patients)
    return counts.assign(**{column: counts[column].where(~taken, 0) for column in pixels})


def test_draws_without_a_subtype_are_left_out_and_one_patient_with_it_has_no_interval():
    counts = keep_subtype_1_of(counts_on_test(patients=4), ["test-patient0", "test-patient1"])
    row = effects(counts, draws=4000).set_index("measure").loc["recall_HER2 0"]
    assert row["undefined"] == pytest.approx(1 / 8, abs=0.03)  # three patients are drawn, each of the other two
    assert np.isfinite(row["low"])
    of_one = effects(keep_subtype_1_of(counts, ["test-patient0"])).set_index("measure")["low"]
    assert np.isfinite(of_one).to_dict() == {"dice": True, "recall_HER2 0": False}


def test_p_values_are_corrected_within_a_measure():
    found = effects(counts_on_test(DEMO_ARMS, repeats=2))
    for _, of_measure in found.groupby("measure"):
        assert of_measure["p_holm"].tolist() == pytest.approx(holm(of_measure["p"]).tolist())


def test_arms_with_the_same_counts_are_one_in_corrections():
    counts = counts_on_test(DEMO_ARMS, repeats=2)
    again = counts[counts["arm"] == DEMO_ARMS[-1]].assign(arm="spade+auto")
    alone, found = effects(counts), effects(pd.concat([counts, again], ignore_index=True))
    of_others = found[found["arm"] != "spade+auto"].reset_index(drop=True)
    pd.testing.assert_series_equal(of_others["p_holm"], alone["p_holm"])
    auto, same = (found[found["arm"] == arm]["p_holm"].tolist() for arm in ("spade+auto", DEMO_ARMS[-1]))
    assert auto == same


def test_arms_with_other_patients_and_unknown_labels_are_refused():
    counts = counts_on_test()
    lacking = counts[(counts["arm"] != "spade+100") | (counts["patient"] != "test-patient2")]
    with pytest.raises(InputError, match=r"arm spade\+100, repeat 0 has no counts for patient test-patient2"):
        effects(lacking)
    with pytest.raises(InputError, match="label 9 found, the taxonomy has 0 to 5"):
        effects(counts.assign(subtype=9))


def test_all_arms_share_their_patients_in_a_draw():
    """An arm's interval does not change when another arm joins the study; only its corrected p-value does."""
    few, many = (counts_on_test(arms, gain={}) for arms in (("subtype", "spade+100"), DEMO_ARMS))
    row = effects(many).query("arm == 'spade+100'").reset_index(drop=True)
    pd.testing.assert_frame_equal(row.drop(columns="p_holm"), effects(few).drop(columns="p_holm"))


T7 = student.ppf(0.975, 7)
HALF_WIDTH = 0.033


def recall(counts):
    return recalls(counts)[..., 0]


def components(patients=1e-4, repeats=1e-4, both=0.0, num_patients=8, num_repeats=5):
    return Components(patients=patients, repeats=repeats, both=both, num_patients=num_patients, num_repeats=num_repeats)


def patients_of(pixels):
    """(P, 2, 2) counts of patients with so many pixels of one subtype, half of them found."""
    half = np.asarray(pixels, float) / 2
    tumour = np.stack([half, half], axis=-1)
    return np.stack([np.full_like(tumour, 100.0), tumour], axis=-2)


def test_variances_of_a_mean_of_equal_patients_are_those_of_the_textbook():
    """Patients with equal pixels: recall is a mean, its pseudo-values are the patients' recalls."""
    rng = np.random.default_rng(0)
    a, b, e = rng.normal(0, 0.05, 8), rng.normal(0, 0.03, (5, 1)), rng.normal(0, 0.01, (5, 8))
    rates = np.stack([np.full((5, 8), 0.5), 0.55 + a + b + e])
    counts = np.stack([1 - rates, rates], axis=-1)[..., None, :] * 1e4
    found = components_of(np.concatenate([counts, counts], axis=-2), recall)
    table = rates[1] - rates[0]
    assert found.patients == pytest.approx(table.mean(axis=0).var(ddof=1) / 8)
    assert found.repeats == pytest.approx(table.mean(axis=1).var(ddof=1) / 5)
    left = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    assert found.both == pytest.approx((left**2).sum() / (7 * 4) / 40)


def test_more_patients_and_repeats_shrink_each_its_own_part():
    spread = components(patients=4e-4, repeats=9e-4)
    assert standard_error(spread, 8, 5) ** 2 == pytest.approx(13e-4)
    assert standard_error(spread, 16, 5) ** 2 == pytest.approx(11e-4)
    assert standard_error(spread, 8, 15) ** 2 == pytest.approx(7e-4)


def test_what_one_patient_alone_has_shows_no_spread_over_patients():
    counts = np.stack([patients_of([1_000] + [0] * 7)] * 6).reshape(2, 3, 8, 2, 2)
    assert np.isnan(components_of(counts, recall).patients)


def test_the_power_is_that_of_the_test_of_student_where_patients_alone_differ():
    spread = components(patients=1e-4, repeats=0.0)
    exact = noncentral.sf(T7, 7, 3.0)
    assert power(0.03, spread, T7 * 0.01, 8, 5) == pytest.approx(exact, abs=0.03)


def test_the_numbers_needed_have_the_power_they_promise_and_one_less_does_not():
    spread = components(both=2e-5)
    needed = need(0.05, spread, HALF_WIDTH)
    repeats, patients = int(needed.needed_repeats), int(needed.needed_patients)
    for before, after in (((8, repeats - 1), (8, repeats)), ((patients - 1, 5), (patients, 5))):
        assert power(0.05, spread, HALF_WIDTH, *before) < 0.8
        assert power(0.05, spread, HALF_WIDTH, *after) >= 0.8


def test_what_is_detectable_here_needs_no_more_repeats_or_patients():
    detectable = need(0.01, components(), HALF_WIDTH).detectable
    again = need(detectable * 1.0001, components(), HALF_WIDTH)
    assert (again.needed_repeats, again.needed_patients) == (5, 8)


def test_no_number_of_repeats_makes_up_for_few_patients_and_one_repeat_tells_nothing():
    needed = need(0.015, components(repeats=1e-6), T7 * 0.01)
    assert needed.needed_repeats == float("inf")
    assert 8 < needed.needed_patients < 100
    needed = need(0.05, components(repeats=float("nan"), num_repeats=1), HALF_WIDTH)
    assert np.isnan([needed.detectable, needed.needed_repeats, needed.needed_patients]).all()
