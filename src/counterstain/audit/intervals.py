"""Intervals around distances between clouds of images, over the patients that the images come from.

Patches of one patient are alike, so patients, not patches, are what another study would draw anew. An interval is made
by leaving out one patient after the other (the jackknife for groups of unequal size, Busing et al. 1999).

Shapes: n, m = number of images, d = number of features, g = groups of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from counterstain.data.patches import Patch

Distance = Callable[[np.ndarray, np.ndarray], float]
FEWEST_PATIENTS = 6  # with fewer the interval is taken over regions, and only holds for these patients


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure with the interval that holds it in 95 % of repetitions; NaN where there are too few groups."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The features of images with the group that each image comes from."""

    features: np.ndarray  # (n, d)
    groups: np.ndarray  # (n,) names

    def without(self, group: str) -> np.ndarray:
        """Return the features of all other groups."""
        return np.asarray(self.features[self.groups != group])


def jackknife(distance: Distance, real: Sample, drawn: Sample, *, least: float = -np.inf) -> Interval:
    """Put a 95 % interval around a distance, for as many images of as many groups.

    Parameters
    ----------
    distance : callable
        (n, d), (m, d) -> float.
    real, drawn : Sample
        A group in both is left out of both at once: images drawn for the masks of a patient go with that patient.
    least : float
        The distance is never below.

    Notes
    -----
    With h = 1 / share of the images in a group, its pseudo-value is h·θ - (h - 1)·θ₋, free of errors that fall as 1/n;
    their spread, weighted by 1/(h - 1), is the variance. Samples without a common group count as independent, and their
    variances add up; samples with a common group are of the same patients, and all groups of both count alike.
    Quantiles are Student's with Welch's degrees of freedom. Where both clouds come from one distribution, the distance
    is a sum of squares, and the interval is wider than it had to be.
    """
    value = distance(real.features, drawn.features)
    of_real, of_drawn = set(real.groups.tolist()), set(drawn.groups.tolist())
    strata = [of_real, of_drawn] if of_real.isdisjoint(of_drawn) else [of_real | of_drawn]
    parts = [_variance(distance, value, real, drawn, sorted(groups)) for groups in strata]
    total = sum(variance for variance, _ in parts)
    if not np.isfinite(total):
        return Interval(value=value, low=float("nan"), high=float("nan"))
    freedom = total**2 / sum(v**2 / (g - 1) for v, g in parts) if total > 0 else 1.0
    reach = float(stats.t.ppf(0.975, freedom) * np.sqrt(total))
    return Interval(value=value, low=max(least, value - reach), high=value + reach)


def groups_of(*samples: Sequence[Patch]) -> list[np.ndarray]:
    """Return what the images of each sample are grouped by: patients, or regions where a sample has few patients."""
    patients = [np.array([patch.source.patient for patch in patches]) for patches in samples]
    if all(len(np.unique(names)) >= FEWEST_PATIENTS for names in patients):
        return patients
    return [np.array([patch.source.region for patch in patches]) for patches in samples]


def _variance(
    distance: Distance, value: float, real: Sample, drawn: Sample, groups: Sequence[str]
) -> tuple[float, int]:
    """Return the variance that comes from drawing these groups anew, and their number."""
    if len(groups) < 2:
        return float("nan"), len(groups)
    shares = np.array([_share(group, real, drawn) for group in groups])
    left_out = np.array([distance(real.without(group), drawn.without(group)) for group in groups])
    pseudo = value / shares - (1 / shares - 1) * left_out
    return float(np.mean((pseudo - pseudo.mean()) ** 2 / (1 / shares - 1))), len(groups)


def _share(group: str, real: Sample, drawn: Sample) -> float:
    """Return the share of the images that a group has, averaged over the samples that it is in."""
    shares = [float((sample.groups == group).mean()) for sample in (real, drawn)]
    return float(np.mean([share for share in shares if share > 0]))
