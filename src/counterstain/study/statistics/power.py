"""Power: where the variance of a difference comes from, and how large a study must be to detect it.

Shapes: R repeats, P patients, L labels (background and every subtype).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from counterstain.study.statistics.significance import Measure, student_width

POWER = 0.8
MOST = 1_000  # repeats or patients; beyond that a study is taken as impossible


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """The variance of a mean difference, by source; NaN if it cannot be estimated (the residual: 0)."""

    patients: float
    """Variance over patients (jackknife): the patients' own part and the residual."""
    repeats: float
    """Variance over repeats: the repeats' own part and the residual."""
    both: float
    """The residual (patients x repeats)."""
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

    detectable: float
    """The smallest difference that a study of this size detects."""
    needed_repeats: float
    """Repeats with these patients; inf if no number is enough."""
    needed_patients: float
    """Patients with these repeats; inf if no number is enough."""


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
