"""The differences between the arms of a study and its reference arm: paired by repeat, with interval, test and power.

Shapes: A arms, R repeats, P patients, L labels (background and every subtype), B bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from counterstain.errors import InputError
from counterstain.study.statistics.power import components_of, need
from counterstain.study.statistics.significance import (
    ENDS,
    FEWEST_PATIENTS,
    Measure,
    bootstrap_interval,
    bootstrap_weights,
    exchange_p_value,
    exchanged_halves,
    exchanges,
    holm,
    pooled_draws,
)

KEYS = ["arm", "repeat", "split"]
CASE = ["arm", "split", "measure"]
EFFECT = [*CASE, "n", "reference", "value", "mean", "sd", "min", "max", "relative"]
SIZES = ("arm", "measure", "n", "patients")
TESTED = ("undefined", "p", "detectable", "needed_repeats", "needed_patients")


def measures_of(results: pd.DataFrame) -> list[str]:
    """Return the columns of a results table that are measures."""
    return [str(column) for column in results.columns if column not in KEYS]


def _long(results: pd.DataFrame) -> pd.DataFrame:
    return results.melt(id_vars=KEYS, value_vars=measures_of(results), var_name="measure")


def spread(results: pd.DataFrame) -> pd.DataFrame:
    """Return mean, sd (ddof 1), min, max and n over the repeats: a row per arm, split and measure."""
    return _spread(_long(results), "value")


def _spread(table: pd.DataFrame, column: str) -> pd.DataFrame:
    groups = table.groupby(CASE, sort=False)[column]
    return groups.agg(mean="mean", sd="std", min="min", max="max", n="count").reset_index()


def differences(results: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return the differences of every arm from the reference arm, paired by repeat.

    Parameters
    ----------
    results : DataFrame
        A row per arm, repeat and split; every other column is a measure.
    reference : str
        Name of the arm that the others are compared with.

    Returns
    -------
    DataFrame
        A row per arm, split and measure: ``n`` pairs; ``reference`` and ``value``, the two means over these pairs;
        ``mean``, ``sd`` (ddof 1; NaN for one pair), ``min`` and ``max`` of the differences; ``relative``, the mean
        difference as a fraction of ``reference``.

    Raises
    ------
    InputError
        The reference arm has no row.
    """
    _require_reference(results, reference)
    long = _long(results).dropna()
    of_reference = long.loc[long["arm"] == reference].drop(columns="arm").rename(columns={"value": "reference"})
    pairs = long.loc[long["arm"] != reference].merge(of_reference, on=["repeat", "split", "measure"])
    pairs["difference"] = pairs["value"] - pairs["reference"]
    means = pairs.groupby(CASE, sort=False)[["reference", "value"]].mean().reset_index()
    table = means.merge(_spread(pairs, "difference"), on=CASE)
    table["relative"] = table["mean"] / table["reference"].where(table["reference"] != 0)
    return table[EFFECT]


@dataclass(frozen=True, slots=True, kw_only=True)
class CountArray:
    """The count tables of a study as one array."""

    counts: np.ndarray  # (A, R, P, L, 2) int64 pixels
    present: np.ndarray  # (A, R) bool, whether that cell of the study has counts
    arms: tuple[str, ...]
    patients: tuple[str, ...]

    @classmethod
    def of(cls, table: pd.DataFrame, num_labels: int) -> CountArray:
        """Add up the slides of every patient.

        Parameters
        ----------
        table : DataFrame
            Columns arm, repeat, patient, subtype (label), predicted_background, predicted_tumour (pixels).
        num_labels : int
            L.

        Raises
        ------
        InputError
            A label is out of range, or a cell lacks a patient that another one has.
        """
        outside = table.loc[~table["subtype"].between(0, num_labels - 1), "subtype"]
        if len(outside):
            raise InputError(f"counts: label {outside.iloc[0]} found, the taxonomy has 0 to {num_labels - 1}")
        arm, arms = pd.factorize(table["arm"])
        repeat, repeats = pd.factorize(table["repeat"], sort=True)
        patient, patients = pd.factorize(table["patient"], sort=True)
        counts = np.zeros((len(arms), len(repeats), len(patients), num_labels, 2), np.int64)
        place = (arm, repeat, patient, table["subtype"].to_numpy(np.int64))
        np.add.at(counts, place, table[["predicted_background", "predicted_tumour"]].to_numpy(np.int64))
        seen = np.zeros(counts.shape[:3], bool)
        seen[place[:3]] = True
        present = np.asarray(seen.any(axis=2))
        for a, r, p in np.argwhere(present[..., None] & ~seen)[:1].tolist():
            raise InputError(
                f"counts: arm {arms[a]}, repeat {repeats[r]} has no counts for patient {patients[p]}, unlike other "
                "cells; evaluate all arms on the same patients"
            )
        return cls(counts=counts, present=present, arms=tuple(arms), patients=tuple(patients))

    def pair(self, reference: str, arm: str) -> np.ndarray:
        """Return the counts of two arms in the repeats that both have, (2, R, P, L, 2) float, the reference first."""
        rows = [self.arms.index(reference), self.arms.index(arm)]
        both: np.ndarray = self.counts[rows][:, self.present[rows].all(axis=0)].astype(float)
        return both


def effects_of(
    counts: pd.DataFrame,
    reference: str,
    measures: Mapping[str, Measure],
    *,
    num_labels: int,
    draws: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare every arm with the reference arm, from count tables.

    Parameters
    ----------
    counts : DataFrame
        The count tables of **one** split; see :meth:`CountArray.of`.
    reference : str
        Name of the arm that the others are compared with.
    measures : mapping
        Name -> function of (..., L, 2) counts.
    num_labels : int
        L.
    draws : int
        B.

    Returns
    -------
    DataFrame
        A row per arm and measure: ``n`` repeats, ``patients``; ``low``, ``high``, ``relative_low``, ``relative_high``
        and ``undefined`` (:func:`~counterstain.study.statistics.significance.bootstrap_interval`, 95 %); ``p``
        (:func:`~counterstain.study.statistics.significance.exchange_p_value`) and ``p_holm``, corrected for the
        number of arms within a measure; ``detectable``, ``needed_repeats`` and ``needed_patients``
        (:func:`~counterstain.study.statistics.power.need`). Fewer than three patients, and a subtype found in only one,
        have no interval. With one patient or one repeat, the test ignores the unknown variance of that source, with
        one repeat the interval as well.

    Raises
    ------
    InputError
        The reference arm has no counts, or cells of the study differ in their patients.
    """
    _require_reference(counts, reference)
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
            found = dict(zip(SIZES, (arm, name, pair.shape[1], patients), strict=True))
            rows.append(found | _effect(pair, drawn, of_repeats, exchanged, measure))
    table = pd.DataFrame(rows, columns=[*SIZES, *ENDS, *TESTED])
    table["p_holm"] = table.groupby("measure")["p"].transform(lambda p: holm(p.to_numpy(float)))
    return table


def _effect(
    pair: np.ndarray,  # (2, R, P, L, 2)
    drawn: np.ndarray,  # (2, B, R, L, 2)
    of_repeats: np.ndarray,  # (B, R)
    exchanged: np.ndarray,  # (2, permutations, R, L, 2)
    measure: Measure,
) -> dict[str, float]:
    components = components_of(pair, measure)
    interval = bootstrap_interval(pair, drawn, of_repeats, measure, own_of_repeats=components.own_of_repeats)
    if pair.shape[2] < FEWEST_PATIENTS or not np.isfinite(components.patients):  # NaN: only one patient counts
        interval |= dict.fromkeys(ENDS, float("nan"))
    old, new = measure(pair.sum(axis=2)).mean(axis=-1)
    p = exchange_p_value(exchanged, measure, of_repeats=components.own_of_repeats)
    return interval | {"p": p} | asdict(need(new - old, components, (interval["high"] - interval["low"]) / 2))


def _require_reference(table: pd.DataFrame, reference: str) -> None:
    arms = list(pd.unique(table["arm"]))
    if reference not in arms:
        raise InputError(f"reference arm {reference!r} has no results; found {', '.join(map(str, arms)) or 'none'}")
