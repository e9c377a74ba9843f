"""What count tables say of the difference between every arm and the reference arm: interval, test and power."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from counterstain.study.statistics.bootstrap import ENDS, bootstrap_interval, bootstrap_weights, pooled_draws
from counterstain.study.statistics.components import components_of
from counterstain.study.statistics.count_array import CountArray, Measure, require_reference
from counterstain.study.statistics.exchange import exchange_p_value, exchanged_halves, exchanges, holm
from counterstain.study.statistics.power import need

SIZES = ("arm", "measure", "n", "patients")
TESTED = ("p", "p_holm", "detectable", "needed_repeats", "needed_patients")


def effects_of(
    counts: pd.DataFrame,
    reference: str,
    measures: Mapping[str, Measure],
    *,
    num_labels: int,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Hold every arm against the reference arm.

    Parameters
    ----------
    counts : DataFrame
        The count tables of **one** split; see :meth:`CountArray.of`.
    reference : str
        Name of the arm that the others are held against.
    measures : mapping
        Name -> function of (..., L, 2) counts.
    num_labels : int
        L: background and every subtype.
    draws : int
        Bootstrap draws.
    seed : int
        All that is drawn depends on it and on nothing else.
    level : float
        Coverage of the intervals.

    Returns
    -------
    DataFrame
        A row per arm and measure: ``n`` repeats, ``patients``; ``low`` and ``high`` of the difference,
        ``relative_low`` and ``relative_high`` of the difference as a share of the reference, ``undefined``
        (:func:`~counterstain.study.statistics.bootstrap.bootstrap_interval`); ``p``
        (:func:`~counterstain.study.statistics.exchange.exchange_p_value`) and ``p_holm``, corrected for the number of
        arms, within a measure; ``detectable``, ``needed_repeats`` and ``needed_patients``
        (:func:`~counterstain.study.statistics.power.need`). One patient or one repeat tells nothing of its own spread,
        which is then left out of interval and test; a subtype of one patient has no interval.

    Raises
    ------
    InputError
        The reference arm has no counts, or cells of the study differ in their patients.
    """
    require_reference(counts, reference)
    array = CountArray.of(counts, num_labels)
    patients = len(array.patients)
    of_patients = bootstrap_weights(seed, "patients", patients, draws)
    signs = exchanges(patients, seed)
    rows = []
    for arm in array.arms:
        pair = array.pair(reference, arm)
        if arm == reference or not pair.shape[1]:
            continue
        of_repeats = bootstrap_weights(seed, "repeats", pair.shape[1], draws)
        drawn, exchanged = pooled_draws(pair, of_patients), exchanged_halves(pair, signs)
        for name, measure in measures.items():
            row = {"arm": arm, "measure": name, "n": pair.shape[1], "patients": patients}
            row |= _effect(pair, drawn, of_repeats, exchanged, measure, level=level)
            rows.append(row)
    table = pd.DataFrame(rows, columns=[*SIZES, *ENDS, "undefined", *TESTED])
    table["p_holm"] = table.groupby("measure")["p"].transform(lambda p: holm(p.to_numpy(float)))
    return table


def _effect(
    pair: np.ndarray,
    drawn: np.ndarray,
    of_repeats: np.ndarray,
    exchanged: np.ndarray,
    measure: Measure,
    *,
    level: float,
) -> dict[str, float]:
    """Return interval, p-value and power of one arm in one measure; shapes as in the functions that are called."""
    components = components_of(pair, measure)
    of_its_own = components.own_of_repeats
    interval = bootstrap_interval(pair, drawn, of_repeats, measure, own_of_repeats=of_its_own, level=level)
    if pair.shape[2] > 1 and not np.isfinite(components.patients):  # one patient alone decides: its spread is unseen
        interval |= dict.fromkeys(ENDS, float("nan"))
    old, new = measure(pair.sum(axis=2)).mean(axis=-1)
    needed = need(new - old, components, (interval["high"] - interval["low"]) / 2, level=level)
    return {
        **interval,
        "p": exchange_p_value(exchanged, measure, of_repeats=of_its_own),
        "detectable": needed.detectable,
        "needed_repeats": needed.repeats,
        "needed_patients": needed.patients,
    }
