"""Values of a study's arms over repeats, and their differences to the reference arm."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from counterstain.study.statistics.bootstrap import (
    ENDS,
    CountArray,
    Measure,
    bootstrap_interval,
    bootstrap_weights,
    pooled_draws,
    require_reference,
)
from counterstain.study.statistics.permutation_test import exchange_p_value, exchanged_halves, exchanges, holm
from counterstain.study.statistics.power import need
from counterstain.study.statistics.variance_components import components_of

KEYS = ("arm", "repeat", "split")
EFFECT = ["arm", "split", "measure", "n", "reference", "value", "mean", "sd", "min", "max", "relative"]


def measures_of(results: pd.DataFrame) -> list[str]:
    """Return the columns of a results table that are measures."""
    return [str(column) for column in results.columns if column not in KEYS]


def spread(results: pd.DataFrame) -> pd.DataFrame:
    """Return mean, sd (ddof 1), min, max and n over the repeats: a row per arm, split and measure."""
    long = results.melt(id_vars=list(KEYS), value_vars=measures_of(results), var_name="measure")
    groups = long.groupby(["arm", "split", "measure"], sort=False)["value"]
    return groups.agg(mean="mean", sd="std", min="min", max="max", n="count").reset_index()


def differences(results: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return the differences of every arm to the reference arm, paired by repeat.

    Parameters
    ----------
    results : DataFrame
        A row per arm, repeat and split; every other column is a measure.
    reference : str
        Name of the arm that the others are held against.

    Returns
    -------
    DataFrame
        A row per arm, split and measure: ``n`` pairs; ``reference`` and ``value``, the two means over these pairs;
        ``mean``, ``sd`` (ddof 1; NaN for one pair), ``min`` and ``max`` of the differences; ``relative``, the mean
        difference as a share of ``reference``.

    Raises
    ------
    InputError
        The reference arm has no row.
    """
    require_reference(results, reference)
    long = results.melt(id_vars=list(KEYS), value_vars=measures_of(results), var_name="measure").dropna()
    of_reference = long.loc[long["arm"] == reference].drop(columns="arm").rename(columns={"value": "reference"})
    pairs = long.loc[long["arm"] != reference].merge(of_reference, on=["repeat", "split", "measure"])
    pairs["difference"] = pairs["value"] - pairs["reference"]
    groups = pairs.groupby(["arm", "split", "measure"], sort=False)
    table = groups.agg(
        n=("difference", "size"),
        reference=("reference", "mean"),
        value=("value", "mean"),
        mean=("difference", "mean"),
        sd=("difference", "std"),
        min=("difference", "min"),
        max=("difference", "max"),
    ).reset_index()
    table["relative"] = table["mean"] / table["reference"].where(table["reference"] != 0)
    return table[EFFECT]


# What count tables say of the difference between every arm and the reference arm: interval, test and power.

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
        (:func:`~counterstain.study.statistics.permutation_test.exchange_p_value`) and ``p_holm``, corrected for the
        number of arms, within a measure; ``detectable``, ``needed_repeats`` and ``needed_patients``
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
