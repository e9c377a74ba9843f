"""Where a thumbnail shows tissue: stain is colourful, glass is not.

Shapes: H, W = rows and columns of the thumbnail in pixels.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field
from scipy import ndimage

from counterstain.config import Config

_BINS = 256


class TissueConfig(Config):
    """How tissue is told from glass."""

    min_saturation: Annotated[float, Field(ge=0, le=1)] = 0.04
    """Never take pixels below this for tissue (0..1), so that a blank slide has none."""
    max_saturation: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Always take pixels above this for tissue, so that a strong stain does not hide pale tissue."""
    min_brightness: Annotated[int, Field(ge=0, le=255)] = 30
    """Darker pixels are a border or a felt pen, not tissue."""
    closing_px: Annotated[int, Field(ge=0)] = 3
    """Gaps up to about this width between tissue are closed."""
    min_area_share: Annotated[float, Field(ge=0, le=1)] = 2e-4
    """Specks smaller than this share of the thumbnail are dust."""


def tissue_mask(image: np.ndarray, config: TissueConfig | None = None) -> np.ndarray:
    """Find tissue by saturation.

    The threshold is Otsu's (1979) between the two bounds of the configuration.

    Parameters
    ----------
    image : (H, W, 3) uint8 array
    config : TissueConfig, optional

    Returns
    -------
    (H, W) bool array
    """
    config = config or TissueConfig()
    values = ndimage.median_filter(saturation(image), size=3)
    threshold = float(np.clip(otsu(values), config.min_saturation, config.max_saturation))
    mask = (values > threshold) & (image.max(axis=-1) >= config.min_brightness)
    if config.closing_px:
        mask = _closed(mask, config.closing_px)
    return _without_specks(mask, config.min_area_share * mask.size)


def saturation(image: np.ndarray) -> np.ndarray:
    """Return the saturation of (H, W, 3) uint8 pixels as HSV defines it, (H, W) float32 in 0..1."""
    high, low = image.max(axis=-1).astype(np.float32), image.min(axis=-1).astype(np.float32)
    return np.asarray((high - low) / np.maximum(high, 1), np.float32)


def otsu(values: np.ndarray) -> float:
    """Return the threshold in 0..1 that parts values best into two classes (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=_BINS, range=(0, 1))
    centres = (edges[:-1] + edges[1:]) / 2
    below, below_sum = np.cumsum(counts), np.cumsum(counts * centres)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (below_sum / below - (below_sum[-1] - below_sum) / above) ** 2
    return float(edges[1 + int(np.nan_to_num(between).argmax())])


def _closed(mask: np.ndarray, radius: int) -> np.ndarray:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    padded = np.pad(mask, radius, mode="edge")  # else tissue at the border is eaten away
    closed = ndimage.binary_closing(padded, structure=x**2 + y**2 <= radius**2)
    return np.asarray(closed[radius:-radius, radius:-radius])


def _without_specks(mask: np.ndarray, min_area_px: float) -> np.ndarray:
    parts, _ = ndimage.label(mask)
    areas = np.bincount(parts.ravel())
    keep = areas >= min_area_px
    keep[0] = False
    return np.asarray(keep[parts])
