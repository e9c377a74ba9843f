"""Monitors of a generator in training: style codes that change nothing, white images, repeated texture.

All of them look at drawn images alone, as uint8 arrays. Öttl et al. (2023) saw repeated texture and plain white
background in GAN images; codes that change nothing are the collapse of the VAE's latents (z collapse).

Shapes: n = masks, k = codes for one mask, H, W = rows and columns in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import ndimage

FAINTEST_DIVERSITY = 1.0  # grey levels: less than a display shows
LARGEST_WHITE_SHARE = 0.1
STRONGEST_REPETITION = 0.35  # a repeated tile is 1; tissue of the phantom is 0.17 at 128 px, 0.25 at 64 px
PEAKS = 30  # of the autocorrelation that are looked at
FLAT = 1.0  # grey levels: an image whose details vary less has no texture
WHITE_LEVEL = 235.0  # mean grey level of an image without tissue


def code_diversity(images: np.ndarray) -> float:
    """Return how much the style code changes what is drawn for one mask.

    Parameters
    ----------
    images : (n, k, H, W, 3) uint8
        The same mask along the second axis, k at least 2.

    Returns
    -------
    float
        Standard deviation between codes in grey levels (0..255), averaged over pixels, channels and masks. 0 = z has
        collapsed.
    """
    return float(images.astype(np.float32).std(axis=1, ddof=1).mean())


def white_share(images: np.ndarray, level: float = WHITE_LEVEL) -> float:
    """Return the share of images (n, H, W, 3) uint8 whose mean grey level is above ``level``."""
    return float((images.mean(axis=(1, 2, 3)) > level).mean())


def repetition(images: np.ndarray) -> np.ndarray:
    """Return how strongly each image repeats itself at some distance: the largest peak of its autocorrelation.

    Parameters
    ----------
    images : (n, H, W, 3) uint8

    Returns
    -------
    (n,) float
        1 = the image is a tile, laid side by side; 0.2 to 0.3 = tissue, by how few cells it shows; noise is below.

    Notes
    -----
    The grey level without what varies over more than an eighth of the edge, brought to equal contrast everywhere, is
    correlated with itself, at distances up to half of the edge, over the pixels that overlap. A peak counts by its
    height above the lowest point on the way to it: a border correlates with itself all along, and does not repeat.
    """
    return np.array([_strongest_peak(image.mean(axis=2)) for image in images])


def warnings_of(figures: Mapping[str, float]) -> list[str]:
    """Say in a sentence each what is wrong with the figures of :func:`code_diversity` and its siblings.

    Parameters
    ----------
    figures : mapping
        ``code_diversity``, ``white_share`` and ``repetition``, the last two perhaps with ``real_…``, the same of real
        patches: what real patches show as well is no fault of the generator.
    """
    found = []
    if figures.get("code_diversity", np.inf) < FAINTEST_DIVERSITY:
        found.append(
            f"the style code changes images by {figures['code_diversity']:.2f} grey levels only: z has collapsed"
        )
    white = figures.get("white_share", 0.0)
    if white > LARGEST_WHITE_SHARE + figures.get("real_white_share", 0.0):
        found.append(f"{white:.0%} of the images are near white")
    repeated = figures.get("repetition", 0.0)
    if repeated > max(STRONGEST_REPETITION, 1.5 * figures.get("real_repetition", 0.0)):
        found.append(f"texture repeats itself (autocorrelation {repeated:.2f})")
    return found


def _strongest_peak(grey: np.ndarray) -> float:
    """Return the height of the highest peak of the autocorrelation of (H, W), but for the one in the middle."""
    width = min(grey.shape) / 16
    fine = grey - ndimage.gaussian_filter(grey, width)
    if fine.std() < FLAT:
        return 0.0
    # Equal contrast everywhere, or one strong border would count as repeated along itself.
    fine = fine / np.sqrt(ndimage.gaussian_filter(fine**2, width) + FLAT**2)
    correlation = _autocorrelation(fine - fine.mean())
    peaks = correlation == ndimage.maximum_filter(correlation, 3)
    places = np.argwhere(peaks)
    highest = places[np.argsort(correlation[peaks])[::-1][:PEAKS]]
    return max(_height(correlation, place) for place in highest)


def _height(correlation: np.ndarray, place: np.ndarray) -> float:
    """Return by how much a place stands above the lowest point on the straight way from the middle, or above 0."""
    middle = np.array(correlation.shape) // 2
    steps = np.linspace(0, 1, max(2, int(np.abs(place - middle).max()) + 1))
    way = middle[:, None] + np.outer(place - middle, steps)
    lowest = ndimage.map_coordinates(correlation, way, order=1).min()
    return float(correlation[tuple(place)] - max(lowest, 0.0))


def _autocorrelation(values: np.ndarray) -> np.ndarray:
    """Correlate (H, W) with itself up to half of each edge, no shift in the middle, over what overlaps."""
    shape = [2 * edge for edge in values.shape]
    power = np.abs(np.fft.rfft2(values, shape)) ** 2
    overlap = np.abs(np.fft.rfft2(np.ones_like(values), shape)) ** 2
    summed, counts = (np.fft.fftshift(np.fft.irfft2(spectrum, shape)) for spectrum in (power, overlap))
    quarter = [edge // 2 for edge in values.shape]
    inside = tuple(slice(q, 3 * q + 1) for q in quarter)
    correlation = summed[inside] / counts[inside]
    normalised: np.ndarray = correlation / correlation[quarter[0], quarter[1]]
    return normalised
