"""What every reader of slide files gives to :class:`counterstain.data.slides.Slide`: levels of RGB pixels.

Shapes: H, W = rows and columns in pixels of a level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

WHITE = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One resolution of a slide; its pixel k covers the level-0 pixels from k * downsample on."""

    width_px: int
    height_px: int
    downsample: float


class SlideSource(Protocol):
    """An open slide file."""

    levels: tuple[Level, ...]
    """Level 0 first, each one coarser than the one before."""
    mpp_xy: tuple[float, float] | None
    """Micrometres per level-0 pixel as the file says, None where it does not."""
    bounds_level0_px: tuple[int, int, int, int]
    """x, y, width and height of the scanned area."""

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return (H, W, 3) uint8 at a place in the level's own pixels; what lies outside or is empty is white."""

    def close(self) -> None:
        """Close the file."""


def true_downsample(width_px: int, height_px: int, level0_px: tuple[int, int]) -> float:
    """Return the factor that a level was shrunk by.

    Sides are rounded when a level is made (46,001 px shrunk by 4 are 11,500), so the quotient of two sides drifts
    over a slide. Where a whole number explains both sides to the pixel, it is the factor.
    """
    quotients = (level0_px[0] / width_px, level0_px[1] / height_px)
    factor = float(round(sum(quotients) / 2))
    if factor >= 1 and all(
        abs(side0 / factor - side) < 1 for side0, side in zip(level0_px, (width_px, height_px), strict=True)
    ):
        return factor
    return sum(quotients) / 2


def reason(error: Exception) -> str:
    """Return what a library says as one line of printable characters."""
    text = " ".join(str(error).split())
    return "".join(character for character in text if character.isprintable()) or type(error).__name__


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Lay (H, W, 4) uint8 pixels, alpha not multiplied in, on white; returns (H, W, 3) uint8."""
    alpha = rgba[..., 3:]
    if (alpha == WHITE).all():
        return np.ascontiguousarray(rgba[..., :3])
    blended = rgba[..., :3].astype(np.uint16) * alpha + np.uint16(WHITE) * (WHITE - alpha.astype(np.uint16))
    return np.asarray((blended + WHITE // 2) // WHITE, np.uint8)
