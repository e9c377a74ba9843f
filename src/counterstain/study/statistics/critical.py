"""How many standard errors over patients an interval must reach when few patients carry a measure.

Shapes: P patients, L labels (background and every subtype), B simulated studies.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from counterstain.seeding import numpy_generator
from counterstain.study.statistics.count_array import Measure

SIMULATED = 4_000
CHUNK = 500  # simulated studies at once; bounds the memory
SMALL = 1e-4  # change of a rate: small enough that every measure is linear in it


def critical_values(
    counts: np.ndarray, measures: Mapping[str, Measure], *, seed: int = 0, level: float = 0.95
) -> dict[str, float]:
    """Return, by measure, the quantile of |error| / standard error over patients.

    With P patients of equal weight it would be Student's t with P - 1 degrees of freedom. But a subtype's pixels may
    come from two patients of eight, and the jackknife's standard error is then worth as much as two values are. So the
    quantile is simulated: every patient keeps its pixels, its rates get independent errors of equal size, and the error
    of the measure is divided by its jackknife standard error. The same thought gives the degrees of freedom of Bell and
    McCaffrey (Survey Methodology 28, 2002), whose t is too short where they are about one.

    Parameters
    ----------
    counts : (P, L, 2) array
        Pixels by patient, of the reference arm.
    measures : mapping
        Name -> function of (..., L, 2) counts.
    seed : int
        Of the simulated errors.
    level : float
        Coverage.

    Returns
    -------
    dict
        NaN for a measure that needs what only one patient has (a subtype of one patient).
    """
    patients = len(counts)
    if patients < 2:
        return dict.fromkeys(measures, float("nan"))
    rng = numpy_generator(seed, "critical value")
    pixels = counts.sum(axis=-1)  # (P, L)
    ratios: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    for start in range(0, SIMULATED, CHUNK):
        size = min(CHUNK, SIMULATED - start)
        moved = SMALL * pixels * rng.standard_normal((size, *pixels.shape))
        simulated = counts + np.stack([-moved, moved], axis=-1)  # (B, P, L, 2)
        whole = simulated.sum(axis=1)
        without = whole[:, None] - simulated
        for name, measure in measures.items():
            error = measure(whole) - measure(counts.sum(axis=0))
            left_out = measure(without) - measure(counts.sum(axis=0) - counts)  # (B, P); of unequal patients alone: 0
            spread = (patients - 1) / patients * ((left_out - left_out.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
            ratios[name].append(_ratio(np.abs(error), np.sqrt(spread)))
    return {name: float(np.quantile(np.concatenate(found), level)) for name, found in ratios.items()}


def _ratio(error: np.ndarray, standard_error: np.ndarray) -> np.ndarray:
    """Divide; NaN where there is no standard error."""
    found: np.ndarray = np.full(error.shape, np.nan)
    np.divide(error, standard_error, out=found, where=standard_error > 0)
    return found
