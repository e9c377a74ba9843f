"""Stains of an image: their colours, unmixing, and random changes of their strength.

Shapes: H, W = rows and columns in pixels. Optical density is the natural logarithm of white over the grey level.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Stains = Literal["channels", "dab", "eosin", "macenko"]
# Optical density of red, green and blue of the pure stains (Ruifrok & Johnston 2001).
STAIN_VECTORS = {"haematoxylin": (0.65, 0.70, 0.29), "dab": (0.27, 0.57, 0.78), "eosin": (0.07, 0.99, 0.11)}
STAINED_DENSITY = 0.15  # beta of Macenko et al. 2009: less is background
ANGLES_PERCENT = (1, 99)  # alpha of Macenko et al. 2009
FEWEST_PIXELS = 64
SMALLEST_ANGLE = np.deg2rad(5)  # nearer colours cannot be told apart

_DENSITY = -np.log(np.maximum(np.arange(256), 1) / 255).astype(np.float32)  # (256,) of every grey level


def jitter_stains(image: np.ndarray, stains: Stains, sd: float, rng: np.random.Generator) -> np.ndarray:
    """Scale and shift the optical density of each stain, at random, once for the whole image, (H, W, 3) uint8.

    What is changed is each colour channel; or haematoxylin and DAB or eosin (the residual is kept); or two stains whose
    colours are estimated from the image, each channel where there are no two. ``sd`` is the standard deviation of the
    factor (around 1) and of the offset (around 0).
    """
    vectors = None
    if stains != "channels":
        vectors = macenko_vectors(image) if stains == "macenko" else _pure(stains)
    if vectors is None:
        return _jitter_channels(image, sd, rng)
    basis = _with_residual(vectors)
    factor, offset = sd * rng.standard_normal((2, 2))
    change = np.linalg.inv(basis) @ np.diag([*(1 + factor), 1.0]) @ basis
    shift = np.array([*offset, 0.0]) @ basis
    changed = _DENSITY[image] @ change.astype(np.float32) + shift.astype(np.float32)
    return np.asarray(np.clip(np.rint(255 * np.exp(-changed)), 0, 255).astype(np.uint8))


def unmixing(other: Literal["dab", "eosin"]) -> np.ndarray:
    """Return the matrix that turns optical density into amounts of stains (Ruifrok & Johnston 2001), (3, 3) float.

    ``density @ unmixing(other)`` has the amounts of haematoxylin, of the other stain and of the residual at a right
    angle to both; negative where a colour lies outside.
    """
    return np.asarray(np.linalg.inv(_with_residual(_pure(other))))


def macenko_vectors(image: np.ndarray) -> np.ndarray | None:
    """Read the colours of two stains off an image (Macenko et al., ISBI 2009).

    Returns unit vectors of optical density, (2, 3) float, the bluer (redder-absorbing) stain first; None where too few
    pixels are stained or all have one colour.
    """
    density = _DENSITY[image].reshape(-1, 3).astype(np.float64)
    stained = density[(density > STAINED_DENSITY).all(axis=1)]
    if len(stained) < FEWEST_PIXELS:
        return None
    _, axes = np.linalg.eigh(np.cov(stained, rowvar=False))
    plane = axes[:, [2, 1]] * np.where(axes[:, [2, 1]].sum(axis=0) < 0, -1, 1)  # (3, 2), pointing to more density
    on_plane = stained @ plane
    low, high = np.percentile(np.arctan2(on_plane[:, 1], on_plane[:, 0]), ANGLES_PERCENT)
    if high - low < SMALLEST_ANGLE:
        return None
    vectors = np.array([[np.cos(angle), np.sin(angle)] for angle in (low, high)]) @ plane.T
    return np.asarray(vectors[np.argsort(-vectors[:, 0], kind="stable")])


def _pure(other: str) -> np.ndarray:
    vectors = np.array([STAIN_VECTORS["haematoxylin"], STAIN_VECTORS[other]])
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _with_residual(vectors: np.ndarray) -> np.ndarray:
    residual = np.cross(*vectors)
    return np.stack([*vectors, residual / np.linalg.norm(residual)])


def _jitter_channels(image: np.ndarray, sd: float, rng: np.random.Generator) -> np.ndarray:
    density = -np.log(np.maximum(np.arange(256), 1) / 255)
    factor, offset = sd * rng.standard_normal((2, 3, 1))
    curves = 255 * np.exp(-(density * (1 + factor) + offset))
    lookup = np.minimum(np.rint(curves), 255).astype(np.uint8)  # (3, 256)
    jittered = np.empty_like(image)
    for channel in range(3):
        jittered[..., channel] = lookup[channel][image[..., channel]]
    return jittered
