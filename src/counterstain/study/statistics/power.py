"""Power: how large a study would have to be to see a difference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from counterstain.study.statistics.components import Components

POWER = 0.8
MOST = 1_000
"""Repeats or patients; whatever needs more cannot be had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What it takes to see a difference with a power of 80 %."""

    detectable: float
    """The smallest difference that a study of this size would see."""
    repeats: float
    """Repeats with the patients at hand; inf where no number is enough."""
    patients: float
    """Patients with the repeats at hand; inf where no number is enough."""


def need(difference: float, components: Components, critical: float, *, level: float = 0.95) -> Need:
    """Return what a study must be to see a difference; NaN where a source of spread cannot be seen.

    Parameters
    ----------
    difference : float
        The difference to be seen.
    components : Components
        Of the study at hand.
    critical : float
        See :func:`~counterstain.study.statistics.critical.critical_values`.
    level : float
        Of the interval that must leave nought out.
    """
    if components.num_patients < 2 or components.num_repeats < 2 or not np.isfinite(critical):
        return Need(detectable=float("nan"), repeats=float("nan"), patients=float("nan"))
    sizes = np.arange(2, MOST + 1)
    here = np.array([components.num_patients]), np.array([components.num_repeats])
    width, error = width_and_error(components, critical, *here, level=level)
    with_repeats = power_of(difference, *width_and_error(components, critical, here[0], sizes, level=level))
    with_patients = power_of(difference, *width_and_error(components, critical, sizes, here[1], level=level))
    return Need(
        detectable=float(width[0] + ndtri(POWER) * error[0]),
        repeats=_first(sizes, with_repeats >= POWER),
        patients=_first(sizes, with_patients >= POWER),
    )


def width_and_error(
    components: Components, critical: float, patients: np.ndarray, repeats: np.ndarray, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return the half width of the interval and the standard error that a study of another size would have.

    With a, b, c the variances by patients, repeats and both of the study at hand (P patients, R repeats), a study of P'
    and R' has a P/P', b R/R' and c PR/(P'R'). The critical value belongs to as many patients of equal weight as
    Student's t would need for it; they grow with P'.

    Parameters
    ----------
    components : Components
    critical : float
    patients, repeats : int array
        P' and R', 2 or more; they are broadcast.
    level : float
        Coverage of the interval.
    """
    fewer_patients, fewer_repeats = components.num_patients / patients, components.num_repeats / repeats
    both = components.both * fewer_patients * fewer_repeats
    of_patients = max(components.patients - components.both, 0.0) * fewer_patients + both
    of_repeats = components.of_repeats * fewer_repeats
    tail = (1 + level) / 2
    freedom = np.maximum((_freedom_of(critical, tail) + 1) / fewer_patients - 1, 0.5)
    width_squared = stdtrit(freedom, tail) ** 2 * of_patients + stdtrit(repeats - 1, tail) ** 2 * of_repeats
    return np.sqrt(width_squared), np.sqrt(of_patients + of_repeats)


def power_of(difference: float, width: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return the chance that an interval leaves nought out on the side of the difference, by the normal law."""
    with np.errstate(divide="ignore", invalid="ignore"):
        power: np.ndarray = ndtr((abs(difference) - width) / error)
    return np.nan_to_num(power)  # no spread and no difference


def _freedom_of(critical: float, tail: float) -> float:
    """Return the degrees of freedom of the Student's t that has this quantile; 1,000 where it is nearly normal."""
    low, high = 0.3, 1_000.0
    for _ in range(60):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if stdtr(middle, critical) < tail else (low, middle)
    return high


def _first(sizes: np.ndarray, enough: np.ndarray) -> float:
    return float(sizes[np.argmax(enough)]) if enough.any() else float("inf")
