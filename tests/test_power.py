from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from counterstain.segmentation.counts import recalls
from counterstain.study.statistics.components import Components, components_of
from counterstain.study.statistics.critical import critical_values
from counterstain.study.statistics.power import need, power_of, width_and_error

T7 = student.ppf(0.975, 7)


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


def test_each_source_widens_the_interval_by_its_own_quantile():
    assert components(repeats=0).half_width(T7, 0.95) == pytest.approx(T7 * 0.01)
    assert components(patients=0).half_width(T7, 0.95) == pytest.approx(student.ppf(0.975, 4) * 0.01)


def test_patients_of_equal_weight_need_the_quantile_of_student():
    found = critical_values(patients_of([1_000] * 8), {"recall": recall})["recall"]
    assert found == pytest.approx(T7, rel=0.05)


def test_a_measure_that_two_of_eight_patients_carry_needs_a_larger_one():
    found = critical_values(patients_of([1_000] * 2 + [10] * 6), {"recall": recall})["recall"]
    assert found > 2 * T7


def test_what_one_patient_alone_has_cannot_be_told():
    found = critical_values(patients_of([1_000] + [0] * 7), {"recall": recall})["recall"]
    assert np.isnan(found)


def test_the_numbers_needed_have_the_power_they_promise_and_one_less_does_not():
    spread = components(both=2e-5)
    needed = need(0.04, spread, T7)
    for patients, repeats in ((8, int(needed.repeats)), (int(needed.patients), 5)):
        sizes = np.array([patients - (patients != 8), patients]), np.array([repeats - (repeats != 5), repeats])
        before, after = power_of(0.04, *width_and_error(spread, T7, *sizes))
        assert before < 0.8 <= after


def test_what_is_detectable_here_needs_no_more_repeats_or_patients():
    detectable = need(0.01, components(), T7).detectable
    again = need(detectable * 1.0001, components(), T7)
    assert (again.repeats, again.patients) == (5, 8)


def test_no_number_of_repeats_makes_up_for_few_patients():
    needed = need(0.015, components(repeats=1e-6), T7)
    assert needed.repeats == float("inf")
    assert 8 < needed.patients < 100


def test_one_repeat_tells_nothing_of_power():
    needed = need(0.05, components(repeats=float("nan"), num_repeats=1), T7)
    assert np.isnan([needed.detectable, needed.repeats, needed.patients]).all()
