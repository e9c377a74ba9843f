from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import nct as noncentral
from scipy.stats import t as student

from counterstain.segmentation.counts import recalls
from counterstain.study.statistics.power import Components, components_of, need, power, standard_error

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
