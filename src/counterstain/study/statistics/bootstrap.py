"""Bootstrap intervals over patients and repeats together.

Shapes: R repeats, P patients, L labels (background and every subtype), B bootstrap draws.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri, stdtrit

from counterstain.seeding import numpy_generator
from counterstain.study.statistics.count_array import Measure

ENDS = ("low", "high", "relative_low", "relative_high")


def bootstrap_weights(seed: int, what: str, size: int, draws: int) -> np.ndarray:
    """Return how much each of ``size`` patients or repeats weighs in each draw, (B, size), each row adding up to 1.

    A draw takes n - 1 of n with replacement: with one less than there are, the spread of the draws is right also for
    few of them (Rao and Wu, J. Am. Stat. Assoc. 83, 1988).
    """
    taken = max(size - 1, 1)
    return numpy_generator(seed, "bootstrap", what).multinomial(taken, np.full(size, 1 / size), size=draws) / taken


def pooled_draws(pair: np.ndarray, of_patients: np.ndarray) -> np.ndarray:
    """Pool (2, R, P, L, 2) counts by (B, P) weights: (2, B, R, L, 2)."""
    drawn: np.ndarray = np.einsum("bp,arpls->abrls", of_patients, pair, optimize=True)
    return drawn


def bootstrap_interval(
    pair: np.ndarray,
    drawn: np.ndarray,
    of_repeats: np.ndarray,
    measure: Measure,
    *,
    own_of_repeats: float,
    level: float = 0.95,
) -> dict[str, float]:
    """Return the interval of a difference between two arms.

    A draw pools the pixels of its patients for every repeat of both arms, measures, and takes the mean over its
    repeats; arm and reference share patients and repeats. The percentiles of the draws are drawn out from the
    difference itself, as Student's t is wider than the normal distribution, each source of spread by its own quantile
    (:func:`student_width`).

    Parameters
    ----------
    pair : (2, R, P, L, 2) array
        Counts of the reference and of the arm.
    drawn : (2, B, R, L, 2) array
        Of :func:`pooled_draws`.
    of_repeats : (B, R) array
        Of :func:`bootstrap_weights`.
    measure : callable
        (..., L, 2) counts -> (...) values.
    own_of_repeats : float
        The repeats' own part of the variance of the mean difference
        (:attr:`~counterstain.study.statistics.components.Components.own_of_repeats`).
    level : float
        Coverage.

    Returns
    -------
    dict
        ``low`` and ``high`` of the difference, ``relative_low`` and ``relative_high`` of the difference as a share of
        the reference; ``undefined``, the share of draws without a value (no pixel of a subtype drawn), which are left
        out. NaN for one patient and one repeat, which tell nothing of any spread.
    """
    old, new = (measure(drawn) * of_repeats).sum(axis=-1)  # (B,)
    by_repeat = measure(pair.sum(axis=2))  # (2, R)
    old_found, new_found = by_repeat.mean(axis=-1)
    defined = np.isfinite(new - old)
    difference = (new - old)[defined]
    stretch = _stretch(difference, by_repeat[1] - by_repeat[0], pair.shape[2], own_of_repeats, level)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative, relative_found = difference / old[defined], (new_found - old_found) / old_found
    low, high = _stretched(difference, new_found - old_found, stretch, level)
    relative_low, relative_high = _stretched(relative, relative_found, stretch, level)
    return {
        "low": low,
        "high": high,
        "relative_low": max(relative_low, -1.0) if np.isfinite(relative_low) else relative_low,  # never negative
        "relative_high": relative_high,
        "undefined": float(1 - defined.mean()),
    }


def student_width(of_patients: float, of_repeats: float, patients: int, repeats: int, level: float) -> float:
    """Return half the width of an interval whose two sources of spread have quantiles of Student's t of their own.

    Their squares add up (Graybill and Wang, J. Am. Stat. Assoc. 75, 1980). With the degrees of freedom of the sum
    (Satterthwaite) it would be too short for 2 or 3 repeats, where a small variance may be a chance.
    """
    tail = (1 + level) / 2
    squares = stdtrit(max(patients - 1, 1), tail) ** 2 * of_patients
    return float(np.sqrt(squares + stdtrit(max(repeats - 1, 1), tail) ** 2 * of_repeats))


def _stretch(draws: np.ndarray, by_repeat: np.ndarray, patients: int, own_of_repeats: float, level: float) -> float:
    """Return how much wider an interval must be than the normal distribution makes it."""
    repeats = len(by_repeat)
    if not len(draws) or (patients < 2 and repeats < 2):
        return float("nan")
    total = float(draws.var())
    of_repeats = min(float(by_repeat.var(ddof=1)) / repeats, total) if repeats > 1 else 0.0
    of_patients = total - of_repeats if patients > 1 else 0.0
    width = student_width(of_patients, min(own_of_repeats, of_repeats), patients, repeats, level)
    return width / float(ndtri((1 + level) / 2) * np.sqrt(total)) if total > 0 else 1.0


def _stretched(draws: np.ndarray, found: float, stretch: float, level: float) -> tuple[float, float]:
    """Return the percentiles of the draws, drawn out from what was found."""
    finite = draws[np.isfinite(draws)]
    if not len(finite) or not np.isfinite(found) or not np.isfinite(stretch):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(found + stretch * (low - found)), float(found + stretch * (high - found))
