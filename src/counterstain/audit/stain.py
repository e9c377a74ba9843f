"""Stain and seams of instances, measured in the image itself, without a network.

Shapes: H, W = rows and columns in pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

import numpy as np
import pandas as pd

from counterstain.audit.redrawn import REAL
from counterstain.data.patches import Patch
from counterstain.data.relabel import redrawn_pixels
from counterstain.data.stains import STAIN_VECTORS
from counterstain.taxonomy import BACKGROUND

Stain = Literal["dab", "eosin"]


def stain_density(image: np.ndarray, stain: Stain) -> np.ndarray:
    """Separate one stain from haematoxylin.

    Parameters
    ----------
    image : (H, W, 3) uint8 array
    stain : {"dab", "eosin"}
        The stain beside haematoxylin.

    Returns
    -------
    (H, W) float array
        Optical density (natural logarithm) along the stain's unit vector; negative where the colour lies outside.
    """
    vectors = np.array([STAIN_VECTORS["haematoxylin"], STAIN_VECTORS[stain]])
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    third = np.cross(*vectors)
    basis = np.stack([*vectors, third / np.linalg.norm(third)])
    density = -np.log((image.astype(np.float64) + 1) / 256)
    return np.asarray((density @ np.linalg.inv(basis))[..., 1])


def seam(patch: Patch, kept: Collection[int] = REAL) -> float:
    """Mean step of the grey level (0..255) from a pixel inside an instance to its neighbour in the background.

    Parameters
    ----------
    kept : collection of int
        Subtypes whose instances do not count.

    Returns
    -------
    float
        NaN where the patch has no such pair of neighbours.
    """
    grey = patch.image.astype(np.float64).mean(2)
    inside, outside = redrawn_pixels(patch.instances, patch.subtypes, kept), patch.instances == BACKGROUND
    found = np.concatenate([_steps(grey, inside, outside), _steps(grey.T, inside.T, outside.T)])
    return float(found.mean()) if len(found) else float("nan")


def stain_table(patches: Iterable[Patch], stain: Stain, min_area_px: int, kept: Collection[int] = REAL) -> pd.DataFrame:
    """Return a row per instance: ``subtype`` (id), ``density`` (mean optical density of the stain inside it).

    Instances of the subtypes ``kept`` and those that show fewer than ``min_area_px`` pixels are left out.
    """
    rows = []
    for patch in patches:
        density = stain_density(patch.image, stain)
        for instance, area in patch.areas_px.items():
            if area >= min_area_px and patch.subtypes[instance] not in kept:
                rows.append((patch.subtypes[instance], float(density[patch.instances == instance].mean())))
    return pd.DataFrame(rows, columns=["subtype", "density"])


def _steps(grey: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    across = (inside[:, 1:] & outside[:, :-1]) | (outside[:, 1:] & inside[:, :-1])
    return np.asarray(np.abs(np.diff(grey, axis=1))[across])
