"""Fidelity: how far the features of drawn images are from those of real ones, with intervals over patients.

Shapes: n, m = number of images, d = number of features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from scipy.spatial.distance import cdist

from counterstain.audit.judge import Judge, describe, image_batches
from counterstain.data.patches import Patch
from counterstain.errors import ConfigError, InputError
from counterstain.segmentation.timm_networks import feature_network

JUDGE, TIMM = "judge", "timm:"
NEIGHBOURS = 5
FEWEST_PATIENTS = 6  # with fewer the interval is taken over regions, and only holds for these patients

Features = Callable[[Sequence[Patch]], np.ndarray]
Distance = Callable[[np.ndarray, np.ndarray], float]


def frechet_distance(real: np.ndarray, drawn: np.ndarray) -> float:
    """Squared Fréchet distance of the normal distributions with the means and covariances of (n, d) and (m, d) samples.

    Notes
    -----
    Heusel et al. 2017, equation 6. It falls as samples grow, so compare figures of equal n and m only. With centred
    samples X and Y the trace of the root of the product of both covariances is the nuclear norm of
    X Yᵀ / √((n - 1)(m - 1)); it is found in whichever of the spaces of images and features is smaller.
    """
    _check(real, drawn)
    shift = real.mean(0) - drawn.mean(0)
    x = (real - real.mean(0)) / np.sqrt(len(real) - 1)
    y = (drawn - drawn.mean(0)) / np.sqrt(len(drawn) - 1)
    return float((shift**2).sum() + (x**2).sum() + (y**2).sum() - 2 * _nuclear_norm(x, y))


def kernel_distance(real: np.ndarray, drawn: np.ndarray) -> float:
    """Squared maximum mean discrepancy, unbiased, with the kernel (x·y / d + 1)³ (Bińkowski et al. 2018).

    Unbiased: 0 on average for two samples of one distribution, and therefore sometimes below 0.
    """
    _check(real, drawn)
    n, m, d = len(real), len(drawn), real.shape[1]

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray((x @ y.T / d + 1) ** 3)

    among_real, among_drawn = kernel(real, real), kernel(drawn, drawn)
    within = (among_real.sum() - np.trace(among_real)) / (n * (n - 1))
    within += (among_drawn.sum() - np.trace(among_drawn)) / (m * (m - 1))
    return float(within - 2 * kernel(real, drawn).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

    precision: float  # share of drawn images inside the neighbourhood of a real one
    recall: float  # share of real images inside the neighbourhood of a drawn one
    density: float  # real neighbourhoods that hold a drawn image, on average, divided by k; not bounded by 1
    coverage: float  # share of real images whose neighbourhood holds a drawn one


def coverage(real: np.ndarray, drawn: np.ndarray, neighbours: int = NEIGHBOURS) -> Coverage:
    """Measure how drawn and real images, (m, d) and (n, d), lie in each other's neighbourhoods.

    A neighbourhood reaches to the k-th nearest image of the same kind; ``neighbours`` is k.
    """
    _check(real, drawn)
    if min(len(real), len(drawn)) <= neighbours:
        raise InputError(f"{min(len(real), len(drawn))} images: more than {neighbours} of each kind are needed")
    between = cdist(real, drawn)
    reach_real, reach_drawn = (
        np.partition(cdist(features, features), neighbours, axis=1)[:, neighbours] for features in (real, drawn)
    )
    inside_real = between <= reach_real[:, None]
    return Coverage(
        precision=float(inside_real.any(0).mean()),
        recall=float((between <= reach_drawn[None, :]).any(1).mean()),
        density=float(inside_real.sum(0).mean() / neighbours),
        coverage=float(inside_real.any(1).mean()),
    )


def nearest(drawn: np.ndarray, real: np.ndarray) -> pd.DataFrame:
    """Return a row per drawn image, the nearest to a real one first: ``image``, ``training_patch``, ``distance``."""
    between = cdist(drawn, real)
    found, distances = between.argmin(1), between.min(1)
    order = np.argsort(distances, kind="stable")
    return pd.DataFrame({"image": order, "training_patch": found[order], "distance": distances[order]})


def _nuclear_norm(x: np.ndarray, y: np.ndarray) -> float:
    """Return the sum of the singular values of x yᵀ, for x (n, d) and y (m, d)."""
    if min(len(x), len(y)) <= x.shape[1]:
        return float(np.linalg.svd(x @ y.T, compute_uv=False).sum())
    values, vectors = np.linalg.eigh(x.T @ x)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return float(np.sqrt(np.clip(np.linalg.eigvalsh(root @ (y.T @ y) @ root), 0, None)).sum())


def _check(real: np.ndarray, drawn: np.ndarray) -> None:
    if real.ndim != 2 or drawn.ndim != 2 or real.shape[1] != drawn.shape[1]:
        raise ValueError(f"expected (n, d) and (m, d), got {real.shape} and {drawn.shape}")
    if min(len(real), len(drawn)) < 2:
        raise InputError("at least two images of each kind are needed")


# Features: the judge's, or those of a network of timm.


def features_of(name: str, weights: Path | None, judge: Judge, batch_size: int) -> Features:
    """Return the function patches -> features (n, d) float64.

    ``name`` is ``judge``, or ``timm:`` and a network of timm with the file of its weights, a folder as timm saves it,
    or ``hf-hub:OWNER/NAME``. Raises ConfigError without such a network or its file, InputError where the file does not
    fit.
    """
    if name == JUDGE:
        if weights is not None:
            raise ConfigError(f"weights {weights}: the judge's features need no file; give features timm:NAME as well")
        return lambda patches: describe(judge, patches, batch_size)
    return network_features(timm_name(name), weights, judge.device, batch_size)


def network_features(name: str, weights: Path | None, device: torch.device, batch_size: int) -> Features:
    """Return what a network of timm makes of patches, as :func:`features_of`."""
    network, prepare = feature_network(name, weights, device)

    @torch.no_grad()
    def describe_by_network(patches: Sequence[Patch]) -> np.ndarray:
        parts = [network(prepare(images)) for images, _ in image_batches(patches, batch_size, device)]
        return np.concatenate([part.double().cpu().numpy() for part in parts])

    return describe_by_network


def timm_name(features: str) -> str:
    """Return which network of timm features are of; ConfigError where they are of none."""
    if not features.startswith(TIMM):
        raise ConfigError(f"features {features}: expected judge or timm:NAME, for example timm:resnet50")
    return features.removeprefix(TIMM)


# Intervals around distances between clouds of images, over the patients that the images come from.
#
# Patches of one patient are alike, so patients, not patches, are what another study would draw anew. An interval is
# made by leaving out one patient after the other (the jackknife for groups of unequal size, Busing et al. 1999).


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
    """Put a 95 % interval around a distance (never below ``least``), for as many images of as many groups.

    A group in both samples is left out of both at once: images drawn for the masks of a patient go with that patient.

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
    of_group = np.array([[(sample.groups == group).mean() for sample in (real, drawn)] for group in groups])
    shares = np.array([row[row > 0].mean() for row in of_group])  # over the samples that a group is in
    left_out = np.array([distance(real.without(group), drawn.without(group)) for group in groups])
    pseudo = value / shares - (1 / shares - 1) * left_out
    return float(np.mean((pseudo - pseudo.mean()) ** 2 / (1 / shares - 1))), len(groups)
