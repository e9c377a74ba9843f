"""How far two clouds of features are apart, and how much of one the other covers.

Shapes: n, m = number of images, d = number of features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

from counterstain.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

    precision: float
    """Share of drawn images inside the neighbourhood of a real one."""
    recall: float
    """Share of real images inside the neighbourhood of a drawn one."""
    density: float
    """Real neighbourhoods that hold a drawn image, on average, divided by k; not bounded by 1."""
    coverage: float
    """Share of real images whose neighbourhood holds a drawn one."""


def frechet_distance(real: np.ndarray, drawn: np.ndarray) -> float:
    """Squared Fréchet distance of the normal distributions with the samples' means and covariances.

    Parameters
    ----------
    real : (n, d) array
    drawn : (m, d) array

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


def coverage(real: np.ndarray, drawn: np.ndarray, neighbours: int = 5) -> Coverage:
    """Measure how drawn and real images lie in each other's neighbourhoods.

    Parameters
    ----------
    neighbours : int
        k: a neighbourhood reaches to the k-th nearest image of the same kind.
    """
    _check(real, drawn)
    if min(len(real), len(drawn)) <= neighbours:
        raise InputError(f"{min(len(real), len(drawn))} images: more than {neighbours} of each kind are needed")
    between = cdist(real, drawn)
    reach_real, reach_drawn = _reach(real, neighbours), _reach(drawn, neighbours)
    inside_real = between <= reach_real[:, None]
    return Coverage(
        precision=float(inside_real.any(0).mean()),
        recall=float((between <= reach_drawn[None, :]).any(1).mean()),
        density=float(inside_real.sum(0).mean() / neighbours),
        coverage=float(inside_real.any(1).mean()),
    )


def nearest(queries: np.ndarray, pool: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest member of ``pool`` (m, d) for each of ``queries`` (n, d): distances (n,) and numbers (n,)."""
    distances = cdist(queries, pool)
    found = distances.argmin(1)
    return distances[np.arange(len(queries)), found], found


def _reach(features: np.ndarray, neighbours: int) -> np.ndarray:
    """Return the distance of each image, (n,), to its k-th nearest fellow."""
    return np.asarray(np.partition(cdist(features, features), neighbours, axis=1)[:, neighbours])


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
