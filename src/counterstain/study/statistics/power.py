"""Power: how large a study would have to be to see a difference."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from scipy.special import ndtr, ndtri

from counterstain.study.statistics.bootstrap import student_width
from counterstain.study.statistics.variance_components import Components

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


def need(difference: float, components: Components, half_width: float, *, level: float = 0.95) -> Need:
    """Return what a study must be to see a difference; NaN where a source of spread cannot be seen.

    Parameters
    ----------
    difference : float
        The difference to be seen.
    components : Components
        Of the study at hand.
    half_width : float
        Half the width of its interval.
    level : float
        Of the interval that must leave nought out.
    """
    patients, repeats = components.num_patients, components.num_repeats
    error = standard_error(components, patients, repeats)
    if patients < 2 or repeats < 2 or not math.isfinite(error + half_width):
        return Need(detectable=math.nan, repeats=math.nan, patients=math.nan)

    def seen(patients: int, repeats: int) -> bool:
        return power(difference, components, half_width, patients, repeats, level=level) >= POWER

    return Need(
        detectable=half_width + float(ndtri(POWER)) * error,
        repeats=_fewest(lambda number: seen(patients, number)),
        patients=_fewest(lambda number: seen(number, repeats)),
    )


def power(
    difference: float,
    components: Components,
    half_width: float,
    patients: int,
    repeats: int,
    *,
    level: float = 0.95,
) -> float:
    """Return the chance that a study of another size sees a difference: that its interval leaves nought out.

    Its interval is as much wider or narrower than that of the study at hand as Student's t makes it
    (:func:`~counterstain.study.statistics.bootstrap.student_width`); the mean difference follows the normal law.

    Parameters
    ----------
    difference : float
        The true difference.
    components, half_width
        See :func:`need`.
    patients, repeats : int
        P' and R', 2 or more.
    level : float
        Coverage of the interval.
    """
    here, there = (components.num_patients, components.num_repeats), (patients, repeats)
    error = standard_error(components, *there)
    if error == 0:
        return float(difference != 0)
    width_here, width = (student_width(*_parts(components, *size), *size, level) for size in (here, there))
    return float(ndtr((abs(difference) - half_width * width / width_here) / error))


def standard_error(components: Components, patients: int, repeats: int) -> float:
    """Return the standard error of the mean difference in a study of P' patients and R' repeats.

    With a, b, c the variances by patients, repeats and both of the study at hand (P patients, R repeats) it is the root
    of a P/P' + b R/R' + c PR/(P'R').
    """
    return math.sqrt(sum(_parts(components, patients, repeats)))


def _parts(components: Components, patients: int, repeats: int) -> tuple[float, float]:
    """Return the variance by patients, with what is left over, and the repeats' own, in a study of another size."""
    fewer_patients, fewer_repeats = components.num_patients / patients, components.num_repeats / repeats
    both = components.both * fewer_patients * fewer_repeats
    return components.own_of_patients * fewer_patients + both, components.own_of_repeats * fewer_repeats


def _fewest(enough: Callable[[int], bool]) -> float:
    """Return the smallest number from 2 on that is enough, all larger ones being so as well; inf beyond 1,000."""
    numbers = range(2, MOST + 1)
    place = bisect_left(numbers, True, key=enough)
    return float(numbers[place]) if place < len(numbers) else math.inf
