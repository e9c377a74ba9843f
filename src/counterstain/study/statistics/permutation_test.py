"""The permutation test of no difference between two arms: swap them within patients.

Shapes: R repeats, P patients, L labels (background and every subtype), B permutations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtr

from counterstain.seeding import numpy_generator
from counterstain.study.statistics.bootstrap import Measure

ALL_UP_TO = 12  # patients; all 2**12 permutations are tried, beyond that DRAWN of them
DRAWN = 5_000
SAME = 1e-9  # relative; sums in another order differ by less


def exchanges(patients: int, seed: int = 0) -> np.ndarray:
    """Return which patients' arms are swapped (-1) or not (1), (B, P); the first row swaps none.

    All permutations up to 12 patients, beyond that 5,000 random ones.
    """
    if patients <= ALL_UP_TO:
        bits = np.arange(2**patients)[:, None] >> np.arange(patients) & 1
        return 1 - 2 * bits
    drawn = 1 - 2 * numpy_generator(seed, "exchange").integers(0, 2, (DRAWN, patients))
    drawn[0] = 1
    return drawn


def smallest_p(patients: int) -> float:
    """Return the smallest possible p-value: swapping all patients is as extreme as swapping none."""
    return 2 / 2**patients if patients <= ALL_UP_TO else 1 / DRAWN


def exchanged_halves(pair: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Pool (2, R, P, L, 2) counts after each permutation: (2, B, R, L, 2), the reference first."""
    half = (pair[1] - pair[0]) / 2
    middle = pair.mean(axis=0).sum(axis=1)  # (R, L, 2)
    apart = np.einsum("bp,rpls->brls", signs.astype(float), half, optimize=True)
    return np.stack([middle - apart, middle + apart])


def exchange_p_value(exchanged: np.ndarray, measure: Measure, *, of_repeats: float) -> float:
    """Return the two-sided p-value of the mean difference between two arms.

    Without a difference, it is random which of a patient's two count tables belongs to which arm. All repeats of a
    patient are swapped together: they share the effect of a generator on this patient, so swapping them one by one
    would count one effect several times. A random effect of one training, however, shifts all patients alike, which
    swapping does not undo. So the repeats' own part of the variance is added to the distribution of the permuted
    differences as Student's t with R - 1 degrees of freedom. The p-value is never below that of the permutations alone.

    Parameters
    ----------
    exchanged : (2, B, R, L, 2) array
        Of :func:`exchanged_halves`; the first permutation is none.
    measure : callable
        (..., L, 2) counts -> (...) values.
    of_repeats : float
        The repeats' own part of the variance of the mean difference
        (:attr:`~counterstain.study.statistics.power.Components.own_of_repeats`).

    Returns
    -------
    float
        NaN if the measure has no value.
    """
    old, new = measure(exchanged).mean(axis=-1)  # (B,)
    difference = new - old
    if not np.isfinite(difference).all() or not np.isfinite(of_repeats):
        return float("nan")
    found = abs(difference[0]) * (1 - SAME)
    of_exchange = float(np.mean(np.abs(difference) >= found))
    repeats = exchanged.shape[2]
    if of_repeats <= 0 or repeats < 2:
        return of_exchange
    error = np.sqrt(of_repeats)
    above, below = (found - difference) / error, (-found - difference) / error
    return max(of_exchange, float(np.mean(stdtr(repeats - 1, -above) + stdtr(repeats - 1, below))))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return p-values corrected for their number (Holm, Scand. J. Stat. 6, 1979); NaN stay NaN and do not count."""
    p = np.asarray(p_values, float)
    corrected = np.full(p.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected
