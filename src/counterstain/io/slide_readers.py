"""What every reader of slide files gives to :class:`counterstain.io.slides.Slide`: levels of RGB pixels.

Shapes: H, W = rows and columns in pixels of a level.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from xml.etree.ElementTree import Element  # the type alone; parsing is defusedxml's

import defusedxml.ElementTree
import numpy as np
import openslide
import tifffile
import zarr

from counterstain.errors import InputError

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


# Slides that OpenSlide opens: MIRAX, SVS, NDPI, BIF, tiled TIFF, DICOM and others.

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


# Slides that are OME-TIFF or plain TIFF, read with tifffile: pyramids, tiles or strips, 8 bits RGB.
#
# Shapes: H, W = rows and columns of a level in pixels.

_MICROMETRES = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
_MICROMETRES_PER_UNIT = {2: 25_400.0, 3: 10_000.0}  # TIFF's ResolutionUnit: inch, centimetre


class TiffSource:
    """A TIFF file opened with tifffile.

    Raises
    ------
    tifffile.TiffFileError
        Not a TIFF file.
    InputError
        A TIFF file, but not of 8 bits RGB.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = tifffile.TiffFile(path)
        try:
            series = _largest_series(self._file)
            _check_layout(path, series)
            self._axes = str(series.axes)
            self._arrays = [_open_level(path, level) for level in series.levels]
            self._try_to_decode()
        except BaseException:
            self._file.close()
            raise
        sizes = [self._size(array) for array in self._arrays]
        self.levels = tuple(
            Level(width_px=width, height_px=height, downsample=true_downsample(width, height, sizes[0]))
            for width, height in sizes
        )
        self.mpp_xy = tiff_mpp(self._file)
        self.bounds_level0_px = (0, 0, *sizes[0])

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return (H, W, 3) uint8 at a place in the level's own pixels; what lies outside is white."""
        pixels = np.full((height, width, 3), WHITE, np.uint8)
        size = self.levels[level]
        left, right = max(x, 0), min(x + width, size.width_px)
        top, bottom = max(y, 0), min(y + height, size.height_px)
        if left < right and top < bottom:
            pixels[top - y : bottom - y, left - x : right - x] = self._window(level, top, bottom, left, right)
        return pixels

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _window(self, level: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        array = self._arrays[level]
        try:
            if self._axes == "SYX":
                window = np.moveaxis(np.asarray(array[:, top:bottom, left:right]), 0, -1)
            else:
                window = np.asarray(array[top:bottom, left:right])
        except Exception as error:  # decoders raise whatever they like on damaged segments
            raise InputError(
                f"{self._path}: cannot be read at x {left}, y {top} of level {level} ({reason(error)}); "
                "copy or export the slide again"
            ) from error
        return on_white(window) if window.shape[-1] == 4 else window

    def _size(self, array: Any) -> tuple[int, int]:
        height, width = array.shape[1:] if self._axes == "SYX" else array.shape[:2]
        return int(width), int(height)

    def _try_to_decode(self) -> None:
        self._window(0, 0, 1, 0, 1)


def tiff_mpp(file: tifffile.TiffFile) -> tuple[float, float] | None:
    """Return micrometres per pixel (x, y) from OME-XML or from the resolution tags, None where there are none."""
    from_ome = _ome_mpp(file.ome_metadata) if file.is_ome else None
    return from_ome or _tag_mpp(file.pages.first)


def _largest_series(file: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    """Return the series with the most pixels: label and overview pictures are smaller."""
    return max(file.series, key=lambda series: int(np.prod(series.shape)))


def _check_layout(path: Path, series: tifffile.TiffPageSeries) -> None:
    axes, shape = str(series.axes), tuple(series.shape)
    channels = shape[axes.index("S")] if "S" in axes else 1
    if axes not in {"YXS", "SYX"} or channels not in {3, 4} or series.dtype != np.uint8:
        size = " x ".join(map(str, shape))
        raise InputError(
            f"{path}: {series.dtype} pixels, axes {axes} ({size}); expected 8 bits RGB, so save the slide as such"
        )


def _open_level(path: Path, level: tifffile.TiffPageSeries) -> Any:
    """Open a level without reading it: mapped into memory where it is not compressed, segment by segment elsewhere."""
    page = level.keyframe
    if page.is_memmappable and len(level.pages) == 1 and page.shape == level.shape:
        return np.memmap(path, mode="r", dtype=np.uint8, offset=page.dataoffsets[0], shape=tuple(page.shape))
    return zarr.open_array(level.aszarr(level=0), mode="r")


def _ome_mpp(xml: str | None) -> tuple[float, float] | None:
    try:
        root = defusedxml.ElementTree.fromstring(xml or "")
    except (defusedxml.ElementTree.ParseError, defusedxml.DefusedXmlException, ValueError):
        return None
    pixels = root.find(".//{*}Pixels")
    sizes = [_micrometres(pixels, axis) for axis in "XY"] if pixels is not None else [None]
    return None if None in sizes else (sizes[0], sizes[1])  # type: ignore[return-value]


def _micrometres(pixels: Element, axis: str) -> float | None:
    factor = _MICROMETRES.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
    try:
        return float(pixels.attrib[f"PhysicalSize{axis}"]) * factor if factor else None
    except (KeyError, ValueError):
        return None


def _tag_mpp(page: Any) -> tuple[float, float] | None:
    tags = page.tags
    if "XResolution" not in tags or "YResolution" not in tags:
        return None
    unit = _MICROMETRES_PER_UNIT.get(int(tags["ResolutionUnit"].value) if "ResolutionUnit" in tags else 2)
    (x, per_x), (y, per_y) = tags["XResolution"].value, tags["YResolution"].value
    return (unit * per_x / x, unit * per_y / y) if unit and x and y and per_x and per_y else None
