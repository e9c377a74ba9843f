"""Slides that OpenSlide opens: MIRAX, SVS, NDPI, BIF, tiled TIFF, DICOM and others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide

from counterstain.data.slide_source import WHITE, Level, on_white, reason, true_downsample
from counterstain.errors import InputError

BLOCK_PX = 256  # see OpenSlideSource._read_blocks


class OpenSlideSource:
    """A slide file opened with OpenSlide.

    Raises
    ------
    openslide.OpenSlideUnsupportedFormatError
        OpenSlide does not know the format.
    openslide.OpenSlideError
        It knows the format, but the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = openslide.OpenSlide(path)
        size = self._file.level_dimensions[0]
        self.levels = tuple(
            Level(width_px=width, height_px=height, downsample=true_downsample(width, height, size))
            for width, height in self._file.level_dimensions
        )
        self.mpp_xy = _pair(self._number(openslide.PROPERTY_NAME_MPP_X), self._number(openslide.PROPERTY_NAME_MPP_Y))
        self.bounds_level0_px = self._bounds(size)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return (H, W, 3) uint8 at a place in the level's own pixels; what lies outside or is empty is white."""
        if float(self._file.level_downsamples[level]).is_integer():
            return self._read(level, x, y, width, height)
        return self._read_blocks(level, x, y, width, height)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        downsample = self._file.level_downsamples[level]
        place = (round(x * downsample), round(y * downsample))
        try:
            return on_white(np.asarray(self._file.read_region(place, level, (width, height))))
        except openslide.OpenSlideError as error:
            raise InputError(
                f"{self._path}: cannot be read at x {place[0]}, y {place[1]} ({reason(error)}); "
                "copy or export the slide again"
            ) from error

    def _read_blocks(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Read a level whose downsample is no whole number.

        OpenSlide takes places in whole level-0 pixels and shifts the level by what is left of one: a little
        differently for every place asked for. Blocks on a fixed grid are the same for every caller.
        """
        pixels = np.full((height, width, 3), WHITE, np.uint8)
        for top in range(y // BLOCK_PX * BLOCK_PX, y + height, BLOCK_PX):
            for left in range(x // BLOCK_PX * BLOCK_PX, x + width, BLOCK_PX):
                block = self._read(level, left, top, BLOCK_PX, BLOCK_PX)
                rows, columns = _overlap(top, y, height), _overlap(left, x, width)
                pixels[rows[0], columns[0]] = block[rows[1], columns[1]]
        return pixels

    def _number(self, name: str) -> float | None:
        try:
            return float(self._file.properties[name])
        except (KeyError, ValueError):
            return None

    def _bounds(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        names = (
            openslide.PROPERTY_NAME_BOUNDS_X,
            openslide.PROPERTY_NAME_BOUNDS_Y,
            openslide.PROPERTY_NAME_BOUNDS_WIDTH,
            openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
        )
        x, y, width, height = (self._number(name) for name in names)
        plain = self._file.properties[openslide.PROPERTY_NAME_VENDOR] == "generic-tiff"  # absent tiles are just white
        if plain or x is None or y is None or width is None or height is None:
            return (0, 0, *size)
        return (int(x), int(y), int(width), int(height))


def _pair(x: float | None, y: float | None) -> tuple[float, float] | None:
    return None if x is None or y is None else (x, y)


def _overlap(block: int, start: int, length: int) -> tuple[slice, slice]:
    """Return where a block lies in a window along one axis, and which part of the block that is."""
    first, last = max(block, start), min(block + BLOCK_PX, start + length)
    return slice(first - start, last - start), slice(first - block, last - block)
