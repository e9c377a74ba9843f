"""The differences between the arms of a study and its reference arm: paired by repeat, with interval, test and power.

Shapes: A arms, R repeats, P patients, L labels (background and every subtype), B bootstrap draws.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy.special import ndtr, ndtri

from counterstain.errors import InputError
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
    student_width,
)

KEYS = ["arm", "repeat", "split"]
CASE = ["arm", "split", "measure"]
EFFECT = [*CASE, "n", "reference", "value", "mean", "sd", "min", "max", "relative"]
SIZES = ("arm", "measure", "n", "patients")
TESTED = ("undefined", "p", "detectable", "needed_repeats", "needed_patients")
POWER = 0.8
MOST = 1_000  # repeats or patients; beyond that a study is taken as impossible


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

    ``results`` has a row per arm, repeat and split; every other column is a measure. Returns a row per arm, split and
    measure: ``n`` pairs; ``reference`` and ``value``, the two means over these pairs; ``mean``, ``sd`` (ddof 1; NaN for
    one pair), ``min`` and ``max`` of the differences; ``relative``, the mean difference as a fraction of ``reference``.

    Raises InputError where the reference arm has no row.
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
        """Add up the slides of every patient; ``num_labels`` is L.

        ``table`` has the columns arm, repeat, patient, subtype (label), predicted_background, predicted_tumour
        (pixels). Raises InputError where a label is out of range, or a cell lacks a patient that another one has.
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

    def twin(self, arm: str) -> str:
        """Return the first arm that has the very same counts; METHOD+auto has those of the amount that it chose."""
        own = self.counts[self.arms.index(arm)]
        return next(name for name, other in zip(self.arms, self.counts, strict=True) if np.array_equal(own, other))


def effects_of(
    counts: pd.DataFrame,
    reference: str,
    measures: Mapping[str, Measure],
    *,
    num_labels: int,
    draws: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare every arm with the reference arm, from the count tables of **one** split, see :meth:`CountArray.of`.

    ``measures`` are functions of (..., L, 2) counts by name, ``num_labels`` is L, ``draws`` B. Returns a row per arm
    and measure: ``n`` repeats, ``patients``; ``low``, ``high``, ``relative_low``, ``relative_high`` and ``undefined``
    (:func:`~counterstain.study.statistics.significance.bootstrap_interval`, 95 %); ``p``
    (:func:`~counterstain.study.statistics.significance.exchange_p_value`) and ``p_holm``, corrected for the number of
    arms within a measure, those with the same counts being one; ``detectable``, ``needed_repeats``, ``needed_patients``
    (:func:`~counterstain.study.statistics.arm_differences.need`). Fewer than three patients, and a subtype found in
    only one, have no interval. With one patient or one repeat, the test ignores the unknown variance of that source,
    with one repeat the interval as well.

    Raises InputError where the reference arm has no counts, or cells of the study differ in their patients.
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
    table["twin"] = [array.twin(arm) for arm in table["arm"]]
    once = table["p"].where(~table.duplicated(["measure", "twin"]))
    table["p_holm"] = once.groupby(table["measure"]).transform(lambda p: holm(p.to_numpy(float)))
    table["p_holm"] = table.groupby(["measure", "twin"])["p_holm"].transform("first")
    return table.drop(columns="twin")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """The variance of a mean difference, by source; NaN if it cannot be estimated (the residual: 0)."""

    patients: float  # variance over patients (jackknife): the patients' own part and the residual
    repeats: float  # variance over repeats: the repeats' own part and the residual
    both: float  # the residual (patients x repeats)
    num_patients: int
    num_repeats: int

    @property
    def own_of_patients(self) -> float:
        """The patients' part without the residual."""
        return max(self.patients - self.both, 0.0)

    @property
    def own_of_repeats(self) -> float:
        """The repeats' part without the residual; 0 for one repeat.

        With two repeats the residual is not subtracted: two values cannot distinguish so little from zero.
        """
        if self.num_repeats < 2:
            return 0.0
        return max(self.repeats - (self.both if self.num_repeats > 2 else 0.0), 0.0)

    def at(self, patients: int, repeats: int) -> tuple[float, float]:
        """Return the variance by patients, with the residual, and the repeats' own, in a study of another size."""
        fewer_patients, fewer_repeats = self.num_patients / patients, self.num_repeats / repeats
        both = self.both * fewer_patients * fewer_repeats
        return self.own_of_patients * fewer_patients + both, self.own_of_repeats * fewer_repeats


def components_of(pair: np.ndarray, measure: Measure) -> Components:
    """Split the variance of a mean difference, of (2, R, P, L, 2) counts, by a two-way analysis of pseudo-values.

    A pseudo-value of the jackknife, P m(all) - (P - 1) m(all but one), is the contribution of one patient to a measure
    that is not a mean (Tukey 1958; Arvesen, Ann. Math. Stat. 40, 1969). The table of their differences, repeats x
    patients, has one value per cell, so its rows, columns and residuals give three variances. That over patients is
    NaN if only one patient has what the measure needs.
    """
    repeats, patients = pair.shape[1:3]
    total = measure(pair.sum(axis=2))  # (2, R)
    found = total[1] - total[0]
    of_repeats = float(found.var(ddof=1)) / repeats if repeats > 1 else math.nan
    of_patients, both = math.nan, 0.0
    if patients > 1:
        without = measure(pair.sum(axis=2, keepdims=True) - pair)  # (2, R, P)
        pseudo = patients * total[..., None] - (patients - 1) * without
        table = pseudo[1] - pseudo[0]
        by_patient = table.mean(axis=0)
        residual = table - by_patient - table.mean(axis=1, keepdims=True) + table.mean()
        freedom = (patients - 1) * (repeats - 1)
        of_patients = float(by_patient.var(ddof=1)) / patients
        both = float((residual**2).sum()) / (freedom * patients * repeats) if freedom else 0.0
    return Components(patients=of_patients, repeats=of_repeats, both=both, num_patients=patients, num_repeats=repeats)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What it takes to detect a difference with a power of 80 %; NaN if unknown."""

    detectable: float  # the smallest difference that a study of this size detects
    needed_repeats: float  # repeats with these patients; inf if no number is enough
    needed_patients: float  # patients with these repeats; inf if no number is enough


def need(difference: float, components: Components, half_width: float) -> Need:
    """Return how large a study must be to detect a difference; NaN for one patient or repeat.

    ``components`` and ``half_width``, half the width of the interval, are those of the study at hand.
    """
    patients, repeats = components.num_patients, components.num_repeats
    error = standard_error(components, patients, repeats)
    if patients < 2 or repeats < 2 or not math.isfinite(error + half_width):
        return Need(detectable=math.nan, needed_repeats=math.nan, needed_patients=math.nan)

    def detects(patients: int, repeats: int) -> bool:
        return power(difference, components, half_width, patients, repeats) >= POWER

    return Need(
        detectable=half_width + float(ndtri(POWER)) * error,
        needed_repeats=_fewest(lambda number: detects(patients, number)),
        needed_patients=_fewest(lambda number: detects(number, repeats)),
    )


def power(difference: float, components: Components, half_width: float, patients: int, repeats: int) -> float:
    """Return the chance that a study of P' patients and R' repeats, 2 or more of each, detects a true difference.

    That is the chance that its interval excludes zero. The interval is rescaled from that of the study at hand
    (:func:`need`) by Student quantiles (:func:`~counterstain.study.statistics.significance.student_width`); the mean
    difference is normally distributed.
    """
    here, there = (components.num_patients, components.num_repeats), (patients, repeats)
    error = standard_error(components, *there)
    if error == 0:
        return float(difference != 0)
    width_here, width = (student_width(*components.at(*size), *size) for size in (here, there))
    return float(ndtr((abs(difference) - half_width * width / width_here) / error))


def standard_error(components: Components, patients: int, repeats: int) -> float:
    """Return the standard error of the mean difference in a study of P' patients and R' repeats.

    With a, b, c the variances by patients, repeats and both of the study at hand (P patients, R repeats) it is the root
    of a P/P' + b R/R' + c PR/(P'R').
    """
    return math.sqrt(sum(components.at(patients, repeats)))


def _fewest(enough: Callable[[int], bool]) -> float:
    """Return the smallest number from 2 on that is enough, as are all larger ones; inf beyond 1,000."""
    numbers = range(2, MOST + 1)
    place = bisect_left(numbers, True, key=enough)
    return float(numbers[place]) if place < len(numbers) else math.inf
