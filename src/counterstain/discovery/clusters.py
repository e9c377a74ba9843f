"""Clusters of described parts: slides made comparable, a mixture of normal distributions, how many there are.

Everything is fitted on the parts of the fitting patients; other parts are only transformed and assigned.

Shapes: n = parts, d = features, k = clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import StandardScaler

from counterstain.seeding import derive, numpy_generator

NUMBERS = range(2, 9)  # of clusters, that are tried
STABLE = 0.8  # adjusted Rand index from which a number of clusters is stable
RESAMPLES, STARTS = 20, 3
SHRINKAGE = 5  # slides: as many make a coefficient half as large as it would be by least squares
COMPONENTS = 16  # of a network's features
LARGEST = 4.0  # standard deviations; what lies farther out is taken for this


def without_slide_effects(values: np.ndarray, slides: np.ndarray, tissue: pd.DataFrame, fitting: np.ndarray) -> Any:
    """Take off what goes with a slide's non-tumour tissue: values (n, d) and a row of ``tissue`` (d) for each slide.

    For each feature, the means of the tumour of slides are regressed on the same feature of their other tissue, with a
    coefficient between 0 (nothing in common) and 1 (all of it is the slide's staining), smaller where slides are few.
    """
    known = tissue.fillna(tissue.mean()).fillna(0.0)
    means = pd.DataFrame(values[fitting]).groupby(slides[fitting]).mean()
    x = known.loc[means.index].to_numpy()
    scaler, slopes = StandardScaler().fit(x), []
    for feature, tumour in zip(scaler.transform(x).T, means.to_numpy().T, strict=True):
        slopes.append(Ridge(SHRINKAGE).fit(feature[:, None], tumour).coef_[0])
    coefficients = np.clip(slopes / scaler.scale_, 0, 1)
    return values - coefficients * (known.loc[slides].to_numpy() - scaler.mean_)


def scaled(values: np.ndarray, fitting: np.ndarray, *, network: bool) -> np.ndarray:
    """Bring features, (n, d), to mean 0 and standard deviation 1; of a network's, the first components are taken."""
    if network:
        components = PCA(min(COMPONENTS, *values[fitting].shape), random_state=0).fit(values[fitting])
        values = components.transform(values)
    return np.asarray(StandardScaler().fit(values[fitting]).transform(values).clip(-LARGEST, LARGEST))


def mixture(points: np.ndarray, k: int, seed: int) -> GaussianMixture:
    """Fit k normal distributions of one covariance to points, (n, d)."""
    start = derive(seed, "mixture", k) % 2**32
    return GaussianMixture(k, covariance_type="tied", n_init=STARTS, reg_covar=1e-2, random_state=start).fit(points)


def stability(points: np.ndarray, patients: np.ndarray, k: int, seed: int) -> float:
    """Return how well clusters agree with those of resampled patients: the mean adjusted Rand index, 1 = the same."""
    known = mixture(points, k, seed).predict(points)
    names, members = np.unique(patients, return_inverse=True)
    of_patient = [np.flatnonzero(members == i) for i in range(len(names))]
    found = []
    for number in range(RESAMPLES):
        drawn = numpy_generator(seed, "patients", number).integers(len(names), size=len(names))
        resample = points[np.concatenate([of_patient[i] for i in drawn])]
        if len(np.unique(resample, axis=0)) > k:
            again = mixture(resample, k, derive(seed, "resample", number))
            found.append(adjusted_rand_score(known, again.predict(points)))
    return float(np.mean(found)) if found else 0.0
