"""Weights of pixels by subtype: rare subtypes count more in the losses.

Shapes: K = number of subtypes; tables have an entry for each label 0 … K, 0 = background.
"""

from __future__ import annotations

import numpy as np

from counterstain.data.batches import PatchSource
from counterstain.taxonomy import BACKGROUND

COUNTED_PATCHES = 512


def label_weights(pixels: np.ndarray, strength: float) -> np.ndarray:
    """Return the weight of a pixel of every label.

    Parameters
    ----------
    pixels : (K + 1,) array
        How many pixels of each label the training shows.
    strength : float
        Exponent of the inverse frequency: 1 lets every subtype weigh the same in sum, 0 changes nothing.

    Returns
    -------
    (K + 1,) float array
        1 for background and for subtypes that do not occur; the mean over all pixels of subtypes is 1, so that the
        balance of the tissue class against background stays as it is.
    """
    weights = np.ones(len(pixels))
    present = np.flatnonzero(pixels[1:]) + 1
    if len(present):
        frequency = pixels[present] / pixels[present].sum()
        inverse = frequency**-strength
        weights[present] = inverse / (frequency * inverse).sum()
    return weights


def count_labels(source: PatchSource, total: int, num_labels: int) -> np.ndarray:
    """Count the pixels of every label in patches that are spread evenly over the first ``total`` of a stream.

    Returns
    -------
    (K + 1,) int64 array
        Pixels to be ignored are left out.
    """
    pixels = np.zeros(256, np.int64)
    for index in np.unique(np.linspace(0, total - 1, min(total, COUNTED_PATCHES)).astype(np.int64)).tolist():
        pixels += np.bincount(source[index].label_mask.ravel(), minlength=256)
    return pixels[BACKGROUND:num_labels]
