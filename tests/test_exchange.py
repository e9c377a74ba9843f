from __future__ import annotations

import itertools

import numpy as np
import pytest

from counterstain.segmentation.counts import dice, recalls
from counterstain.study.statistics.arm_differences import components_of
from counterstain.study.statistics.significance import (
    exchange_p_value,
    exchanged_halves,
    exchanges,
    holm,
    smallest_p,
)


def recall(counts):
    return recalls(counts)[..., 0]


def pair_of(rates, pixels=10_000):
    """Recalls of one subtype, (2, R, P), to counts, (2, R, P, 2, 2)."""
    hit = np.asarray(rates, float) * pixels
    tumour = np.stack([pixels - hit, hit], axis=-1)
    return np.stack([np.full_like(tumour, 1_000.0), tumour], axis=-2)


def p_value(pair, measure=recall):
    exchanged = exchanged_halves(pair, exchanges(pair.shape[2]))
    return exchange_p_value(exchanged, measure, of_repeats=components_of(pair, measure).own_of_repeats)


def steady(gain, repeats=3):
    """Arms that differ by the same in every repeat."""
    return pair_of([[np.full(len(gain), 0.5)] * repeats, [0.5 + np.asarray(gain)] * repeats])


def test_without_spread_of_repeats_it_is_the_exact_test_of_signs():
    gain = np.array([0.01, 0.03, -0.02, 0.05, 0.04])
    signed = [abs(np.dot(signs, gain)) for signs in itertools.product((1, -1), repeat=5)]
    assert p_value(steady(gain)) == pytest.approx(np.mean(np.array(signed) >= gain.sum() - 1e-12))


def test_the_smallest_p_value_is_that_of_two_exchanges():
    assert p_value(steady(np.full(8, 0.1))) == smallest_p(8) == 2 / 256


def test_many_patients_are_exchanged_at_random_and_always_the_same():
    signs = exchanges(20)
    assert signs.shape == (5_000, 20)
    assert (signs[0] == 1).all()
    assert (exchanges(20) == signs).all()


def test_an_exchange_takes_all_repeats_of_a_patient_together():
    rng = np.random.default_rng(0)
    pair = rng.integers(100, 1_000, (2, 3, 4, 2, 2)).astype(float)
    second = next(row for row, signs in enumerate(exchanges(4)) if (signs == [1, -1, 1, 1]).all())
    swapped = pair.copy()
    swapped[:, :, 1] = pair[::-1, :, 1]
    assert dice(exchanged_halves(pair, exchanges(4))[:, second]) == pytest.approx(dice(swapped.sum(axis=2)))


def test_a_chance_of_the_training_is_no_effect():
    """Every patient agrees, but the repeats do not: exchange alone would say p = 1/128."""
    by_repeat = np.array([0.2, -0.05, 0.1, -0.1, 0.05])
    rates = np.full((2, 5, 8), 0.5)
    rates[1] += by_repeat[:, None]
    assert p_value(pair_of(rates)) > 0.3


def test_a_measure_without_value_has_no_p_value():
    pair = steady(np.zeros(4))
    pair[..., 1, :] = 0
    assert np.isnan(p_value(pair))


def test_holm_multiplies_by_the_number_of_hypotheses_left():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0]


def test_holm_leaves_out_what_was_not_tested():
    corrected = holm([0.01, float("nan"), 0.03])
    assert corrected[[0, 2]] == pytest.approx([0.02, 0.03])
    assert np.isnan(corrected[1])
