"""Bootstrap intervals over patients and repeats together.

Shapes: A arms, R repeats, P patients, L labels (background and every subtype), B bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit

from counterstain.errors import InputError
from counterstain.seeding import numpy_generator

Measure = Callable[[np.ndarray], np.ndarray]
"""(..., L, 2) counts -> (...) values; undefined values are NaN."""
LEVEL = 0.95
"""Coverage of all intervals."""
ENDS = ("low", "high", "relative_low", "relative_high")


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
            Background and every subtype.

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


def bootstrap_weights(seed: int, what: str, size: int, draws: int) -> np.ndarray:
    """Return the weight of each of ``size`` patients or repeats in each draw, (B, size), each row adding up to 1.

    A draw takes n - 1 of n with replacement, which makes the variance of the draws unbiased also for small n (Rao and
    Wu, J. Am. Stat. Assoc. 83, 1988).
    """
    taken = max(size - 1, 1)
    return numpy_generator(seed, "bootstrap", what).multinomial(taken, np.full(size, 1 / size), size=draws) / taken


def pooled_draws(pair: np.ndarray, of_patients: np.ndarray) -> np.ndarray:
    """Pool (2, R, P, L, 2) counts by (B, P) weights: (2, B, R, L, 2)."""
    drawn: np.ndarray = np.einsum("bp,arpls->abrls", of_patients, pair, optimize=True)
    return drawn


def bootstrap_interval(
    pair: np.ndarray, drawn: np.ndarray, of_repeats: np.ndarray, measure: Measure, *, own_of_repeats: float
) -> dict[str, float]:
    """Return the 95 % interval of the difference between two arms.

    A draw pools the pixels of its patients for every repeat of both arms, measures, and takes the mean over its
    repeats; arm and reference share patients and repeats. The percentiles of the draws are then moved away from the
    observed difference by the ratio of Student's to normal quantiles, separately for patients and repeats
    (:func:`student_width`).

    Parameters
    ----------
    pair : (2, R, P, L, 2) array
        Counts of the reference and of the arm.
    drawn : (2, B, R, L, 2) array
        Of :func:`pooled_draws`.
    of_repeats : (B, R) array
        Weights of :func:`bootstrap_weights`.
    measure : callable
        (..., L, 2) counts -> (...) values.
    own_of_repeats : float
        The repeats' own part of the variance of the mean difference
        (:attr:`~counterstain.study.statistics.power.Components.own_of_repeats`).

    Returns
    -------
    dict
        ``low`` and ``high`` of the difference, ``relative_low`` and ``relative_high`` of the difference as a fraction
        of the reference; ``undefined``, the fraction of draws without a value (a subtype without pixels), which are
        excluded. NaN for one patient and one repeat, whose variance is unknown.
    """
    old, new = (measure(drawn) * of_repeats).sum(axis=-1)  # (B,)
    by_repeat = measure(pair.sum(axis=2))  # (2, R)
    old_found, new_found = by_repeat.mean(axis=-1)
    defined = np.isfinite(new - old)
    difference = (new - old)[defined]
    stretch = _stretch(difference, by_repeat[1] - by_repeat[0], pair.shape[2], own_of_repeats)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative, relative_found = difference / old[defined], (new_found - old_found) / old_found
    low, high = _stretched(difference, new_found - old_found, stretch)
    relative_low, relative_high = _stretched(relative, relative_found, stretch)
    return {
        "low": low,
        "high": high,
        "relative_low": max(relative_low, -1.0) if np.isfinite(relative_low) else relative_low,  # never negative
        "relative_high": relative_high,
        "undefined": float(1 - defined.mean()),
    }


def student_width(of_patients: float, of_repeats: float, patients: int, repeats: int) -> float:
    """Return half the width of an interval with two sources of variance, each with its own Student quantile.

    The squares add up (Graybill and Wang, J. Am. Stat. Assoc. 75, 1980). With the degrees of freedom of the sum
    (Satterthwaite) the interval would be too short for 2 or 3 repeats, whose variance may be small by chance.
    """
    tail = (1 + LEVEL) / 2
    squares = stdtrit(max(patients - 1, 1), tail) ** 2 * of_patients
    return float(np.sqrt(squares + stdtrit(max(repeats - 1, 1), tail) ** 2 * of_repeats))


def _stretch(draws: np.ndarray, by_repeat: np.ndarray, patients: int, own_of_repeats: float) -> float:
    """Return how much wider an interval must be than the normal distribution makes it."""
    repeats = len(by_repeat)
    if not len(draws) or (patients < 2 and repeats < 2):
        return float("nan")
    total = float(draws.var())
    of_repeats = min(float(by_repeat.var(ddof=1)) / repeats, total) if repeats > 1 else 0.0
    of_patients = total - of_repeats if patients > 1 else 0.0
    width = student_width(of_patients, min(own_of_repeats, of_repeats), patients, repeats)
    return width / float(ndtri((1 + LEVEL) / 2) * np.sqrt(total)) if total > 0 else 1.0


def _stretched(draws: np.ndarray, found: float, stretch: float) -> tuple[float, float]:
    """Return the percentiles of the draws, moved away from the observed value."""
    finite = draws[np.isfinite(draws)]
    if not len(finite) or not np.isfinite(found) or not np.isfinite(stretch):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(found + stretch * (low - found)), float(found + stretch * (high - found))
