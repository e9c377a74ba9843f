"""Bootstrap intervals over patients and repeats together.

Shapes: R repeats, P patients, L labels (background and every subtype), B bootstrap draws.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri

from counterstain.seeding import numpy_generator
from counterstain.study.statistics.count_array import Measure

INTERVAL = ("low", "high", "relative_low", "relative_high", "undefined")


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
    half_width: float,
    level: float = 0.95,
) -> dict[str, float]:
    """Return the interval of a difference between two arms.

    A draw pools the pixels of its patients for every repeat of both arms, measures, and takes the mean over its
    repeats; arm and reference share patients and repeats. The draws give the interval its shape. Its width comes from
    the analysis of variance, as with few patients or repeats the spread of draws is uncertain itself: the percentiles
    are drawn out from the difference by the ratio of ``half_width`` to what the normal distribution would give the
    draws' standard deviation.

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
    half_width : float
        See :meth:`~counterstain.study.statistics.components.Components.half_width`.
    level : float
        Coverage.

    Returns
    -------
    dict
        ``low`` and ``high`` of the difference, ``relative_low`` and ``relative_high`` of the difference as a share of
        the reference; ``undefined``, the share of draws without a value (no pixel of a subtype drawn), which are left
        out. NaN where ``half_width`` is.
    """
    old, new = (measure(drawn) * of_repeats).sum(axis=-1)  # (B,)
    old_found, new_found = measure(pair.sum(axis=2)).mean(axis=-1)
    defined = np.isfinite(new - old)
    difference = (new - old)[defined]
    stretch = _stretch(difference, half_width, level)
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


def _stretch(draws: np.ndarray, half_width: float, level: float) -> float:
    """Return how much wider an interval is than the draws say."""
    spread = float(draws.std()) if len(draws) else 0.0
    if spread == 0:
        return 1.0 if np.isfinite(half_width) else float("nan")
    return float(half_width / (ndtri((1 + level) / 2) * spread))


def _stretched(draws: np.ndarray, found: float, stretch: float, level: float) -> tuple[float, float]:
    """Return the percentiles of the draws, drawn out from what was found."""
    finite = draws[np.isfinite(draws)]
    if not len(finite) or not np.isfinite(found) or not np.isfinite(stretch):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(found + stretch * (low - found)), float(found + stretch * (high - found))
