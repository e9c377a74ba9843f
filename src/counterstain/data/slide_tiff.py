"""Slides that are OME-TIFF or plain TIFF, read with tifffile: pyramids, tiles or strips, 8 bits RGB.

Shapes: H, W = rows and columns of a level in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element  # the type alone; parsing is defusedxml's

import defusedxml.ElementTree
import numpy as np
import tifffile
import zarr

from counterstain.data.slide_source import WHITE, Level, on_white, reason, true_downsample
from counterstain.errors import InputError

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
