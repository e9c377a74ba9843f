"""Readers of pixels: OpenSlide and tifffile for slides, Pillow for ordinary images.

:func:`check_layout` is the one place that decides which layouts of pixels are read; every reader asks it before it
hands out a pixel. Shapes: H, W = rows and columns in pixels of a level or image.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import defusedxml.ElementTree
import numpy as np
import openslide
import tifffile
import zarr
from PIL import Image, UnidentifiedImageError

from counterstain.errors import InputError

WHITE = 255
GENERIC_TIFF = "generic-tiff"  # OpenSlide's vendor of tiled files without a vendor
BLOCK_PX = 256  # see OpenSlideSource._read_blocks
MICROMETRES = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MICROMETRES_PER_TIFF_UNIT = {2: 25_400.0, 3: 10_000.0}  # ResolutionUnit: inch, centimetre


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelLayout:
    """How a file stores its pixels."""

    bits: int
    """Of a channel."""
    channels: int
    pages: int = 1
    words: str
    """The layout in the words of the library that reads it, for messages."""


def check_layout(path: Path, layout: PixelLayout, *, channels: tuple[int, ...] = (1, 2, 3, 4)) -> None:
    """Raise InputError where pixels are stored in a way that would not be read as their maker meant them.

    ``channels`` are the numbers of channels that can be used.
    """
    if layout.bits > 8:
        raise InputError(f"{path}: more than 8 bits a channel ({layout.words}); convert it to 8 bits")
    if layout.channels not in channels:
        raise InputError(f"{path}: not RGB ({layout.words}); save it as RGB with 8 bits a channel")
    if layout.pages > 1:
        raise InputError(f"{path}: has {layout.pages} pages; save the one to be imported as a file of its own")


@dataclass(frozen=True, slots=True)
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


def open_slide_file(path: Path) -> SlideSource:
    """Open a slide file with the reader that serves it best; InputError says what is wrong with the file."""
    if not path.is_file():
        raise InputError(f"{path}: no such slide file")
    try:
        return _open_with_best_reader(path)
    except InputError:
        raise
    except openslide.OpenSlideUnsupportedFormatError as error:
        if path.suffix.lower() == ".mrxs" and not (path.with_suffix("") / "Slidedat.ini").is_file():
            raise InputError(
                f"{path}: its folder {path.stem!r} with Slidedat.ini is missing beside it; copy both"
            ) from error
        raise InputError(
            f"{path}: not a slide that can be read; expected a format of OpenSlide (MIRAX, SVS, NDPI, BIF, DICOM, …), "
            "OME-TIFF or RGB TIFF"
        ) from error
    except Exception as error:  # on damaged files tifffile raises more than its own errors
        raise InputError(f"{path}: damaged or incomplete ({_reason(error)}); copy or export the slide again") from error


def _open_with_best_reader(path: Path) -> SlideSource:
    with path.open("rb") as file:
        is_tiff = file.read(4) in TIFF_MAGICS
    if is_tiff and _is_ome(path):
        return TiffSource(path)  # OpenSlide does not know OME's resolution
    is_plain = is_tiff and openslide.OpenSlide.detect_format(path) in {None, GENERIC_TIFF}
    try:
        return OpenSlideSource(path)
    except openslide.OpenSlideError:
        if not is_plain:
            raise
        return TiffSource(path)  # OpenSlide reads tiled files of no known vendor; tifffile reads strips too


def _is_ome(path: Path) -> bool:
    try:
        with tifffile.TiffFile(path) as file:
            return bool(file.is_ome)
    except Exception:  # noqa: BLE001 # damaged in a way that the readers will name
        return False


def _levels_of(sizes: Sequence[Sequence[int]]) -> tuple[Level, ...]:
    """Return levels of these widths and heights.

    Sides are rounded when a level is made (46,001 px shrunk by 4 are 11,500), so the quotient of two sides drifts
    over a slide. Where a whole number explains both sides to the pixel, it is the factor.
    """
    levels = []
    for size in sizes:
        sides = list(zip(sizes[0], size, strict=True))
        quotient = sum(side0 / side for side0, side in sides) / 2
        whole = float(round(quotient))
        exact = whole >= 1 and all(abs(side0 / whole - side) < 1 for side0, side in sides)
        levels.append(Level(size[0], size[1], whole if exact else quotient))
    return tuple(levels)


def _reason(error: Exception) -> str:
    """Return what a library says as one line of printable characters."""
    text = " ".join(str(error).split())
    return "".join(character for character in text if character.isprintable()) or type(error).__name__


def _on_white(rgba: np.ndarray) -> np.ndarray:
    """Lay (H, W, 3 or 4) uint8 pixels, alpha not multiplied in, on white; returns (H, W, 3) uint8."""
    alpha = rgba[..., 3:]
    if (alpha == WHITE).all():
        return np.ascontiguousarray(rgba[..., :3])
    blended = rgba[..., :3].astype(np.uint16) * alpha + np.uint16(WHITE) * (WHITE - alpha.astype(np.uint16))
    return np.asarray((blended + WHITE // 2) // WHITE, np.uint8)


class OpenSlideSource:
    """A slide in a format of OpenSlide: MIRAX, SVS, NDPI, BIF, tiled TIFF, DICOM and others."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = openslide.OpenSlide(path)
        self.levels = _levels_of(self._file.level_dimensions)
        x, y = self._number(openslide.PROPERTY_NAME_MPP_X), self._number(openslide.PROPERTY_NAME_MPP_Y)
        self.mpp_xy = None if x is None or y is None else (x, y)
        self.bounds_level0_px = self._bounds()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return (H, W, 3) uint8 at a place in the level's own pixels; what lies outside or is empty is white."""
        whole = float(self._file.level_downsamples[level]).is_integer()
        return (self._read if whole else self._read_blocks)(level, x, y, width, height)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        downsample = self._file.level_downsamples[level]
        place = (round(x * downsample), round(y * downsample))
        try:
            return _on_white(np.asarray(self._file.read_region(place, level, (width, height))))
        except openslide.OpenSlideError as error:
            raise InputError(
                f"{self._path}: cannot be read at x {place[0]}, y {place[1]} ({_reason(error)}); "
                "copy or export the slide again"
            ) from error

    def _read_blocks(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Read a level whose downsample is no whole number.

        OpenSlide takes places in whole level-0 pixels and shifts the level by the fraction that remains, a little
        differently for every place asked for. Blocks on a fixed grid are the same for every caller.
        """
        rows, columns = (
            range(first // BLOCK_PX * BLOCK_PX, first + length, BLOCK_PX) for first, length in ((y, height), (x, width))
        )
        blocks = [[self._read(level, left, top, BLOCK_PX, BLOCK_PX) for left in columns] for top in rows]
        pixels = np.concatenate([np.concatenate(row, axis=1) for row in blocks])
        return pixels[y - rows[0] :, x - columns[0] :][:height, :width]

    def _number(self, name: str) -> float | None:
        try:
            return float(self._file.properties[name])
        except (KeyError, ValueError):
            return None

    def _bounds(self) -> tuple[int, int, int, int]:
        x, y, width, height = (self._number(f"openslide.bounds-{name}") for name in ("x", "y", "width", "height"))
        plain = self._file.properties[openslide.PROPERTY_NAME_VENDOR] == GENERIC_TIFF  # absent tiles are just white
        if plain or x is None or y is None or width is None or height is None:
            return (0, 0, *self._file.dimensions)
        return (int(x), int(y), int(width), int(height))


class TiffSource:
    """An OME-TIFF or plain TIFF, read with tifffile: pyramids, tiles or strips, RGB with 8 bits a channel."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = tifffile.TiffFile(path)
        try:
            # Label and overview pictures are smaller than the slide.
            series = max(self._file.series, key=lambda series: int(np.prod(series.shape)))
            check_layout(path, _series_layout(series), channels=(3, 4))
            self._channels = str(series.axes).index("S")  # the axis of channels
            self._arrays = [_open_level(path, level) for level in series.levels]
            self.levels = _levels_of([np.delete(array.shape, self._channels).tolist()[::-1] for array in self._arrays])
            self.read(0, 0, 0, 1, 1)  # damage that stops the decoder is found here
        except BaseException:
            self._file.close()
            raise
        from_ome = _ome_mpp(self._file.ome_metadata) if self._file.is_ome else None
        self.mpp_xy = from_ome or _tag_mpp(self._file.pages.first)
        self.bounds_level0_px = (0, 0, self.levels[0].width_px, self.levels[0].height_px)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return (H, W, 3) uint8 at a place in the level's own pixels; what lies outside is white."""
        pixels = np.full((height, width, 3), WHITE, np.uint8)
        left, right = max(x, 0), min(x + width, self.levels[level].width_px)
        top, bottom = max(y, 0), min(y + height, self.levels[level].height_px)
        if left >= right or top >= bottom:
            return pixels
        window = [slice(top, bottom), slice(left, right)]
        window.insert(self._channels, slice(None))
        try:
            found = np.moveaxis(np.asarray(self._arrays[level][tuple(window)]), self._channels, -1)
        except Exception as error:  # decoders raise whatever they like on damaged segments
            raise InputError(
                f"{self._path}: cannot be read at x {left}, y {top} of level {level} ({_reason(error)}); "
                "copy or export the slide again"
            ) from error
        pixels[top - y : bottom - y, left - x : right - x] = _on_white(found)
        return pixels

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _series_layout(series: tifffile.TiffPageSeries) -> PixelLayout:
    axes, shape = str(series.axes), tuple(series.shape)
    size = " x ".join(map(str, shape))
    return PixelLayout(
        bits=8 * series.dtype.itemsize,
        channels=shape[axes.index("S")] if axes in {"YXS", "SYX"} and series.dtype.kind == "u" else 0,
        words=f"{series.dtype} pixels, axes {axes}, {size}",
    )


def _open_level(path: Path, level: tifffile.TiffPageSeries) -> Any:
    """Open a level without reading it: mapped into memory where it is not compressed, segment by segment elsewhere."""
    page = level.keyframe
    if page.is_memmappable and len(level.pages) == 1 and page.shape == level.shape:
        return np.memmap(path, mode="r", dtype=np.uint8, offset=page.dataoffsets[0], shape=tuple(page.shape))
    return zarr.open_array(level.aszarr(level=0), mode="r")


def _ome_mpp(xml: str | None) -> tuple[float, float] | None:
    try:
        pixels = next(defusedxml.ElementTree.fromstring(xml or "").iterfind(".//{*}Pixels")).attrib
        x, y = (
            float(pixels[f"PhysicalSize{axis}"]) * MICROMETRES[pixels.get(f"PhysicalSize{axis}Unit", "µm")]
            for axis in "XY"
        )
    except (defusedxml.ElementTree.ParseError, defusedxml.DefusedXmlException, StopIteration, KeyError, ValueError):
        return None  # no XML, no pixels, or no sizes in a unit of length
    return x, y


def _tag_mpp(page: Any) -> tuple[float, float] | None:
    try:
        unit = MICROMETRES_PER_TIFF_UNIT[page.tags.valueof("ResolutionUnit", 2)]
        (x, per_x), (y, per_y) = (page.tags.valueof(f"{axis}Resolution") for axis in "XY")
        return (unit * per_x / x, unit * per_y / y) if per_x and per_y else None
    except (KeyError, TypeError, ZeroDivisionError):  # no resolution, or none in a unit of length
        return None


def image_size(path: Path) -> tuple[int, int]:
    """Return rows and columns of an image from its header alone; raises what :func:`read_image` raises on headers."""
    with opened_image(path) as image:
        return image.height, image.width


def read_image(path: Path) -> np.ndarray:
    """Read a PNG, TIFF or JPEG image as (H, W, 3) uint8; grey becomes RGB, transparent becomes white.

    Raises
    ------
    InputError
        The file is missing, damaged or no image, has a layout that is not read, or is far too large.
    """
    with opened_image(path) as image:
        if image.has_transparency_data:
            return _on_white(np.asarray(image.convert("RGBA")))
        return np.asarray(image.convert("RGB"))


@contextmanager
def opened_image(path: Path, *, labels: bool = False) -> Iterator[Image.Image]:
    """Open an image with Pillow, whatever is wrong with it as an InputError.

    Layouts of ``labels`` are checked by :mod:`counterstain.io.masks`, which reads them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half the size that is an error
            with Image.open(path) as image:
                if not labels:
                    check_layout(path, _image_layout(image))
                yield image
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; cut it into regions of at most "
            "10,000 x 10,000 px"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not an image that can be read; expected PNG, TIFF or JPEG") from error
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise on damaged files
        raise InputError(f"{path}: damaged or cut off ({error}); export it again") from error


def _image_layout(image: Image.Image) -> PixelLayout:
    deep = image.mode.startswith(("I", "F")) or ";16" in _decoder(image)  # colours of 16 bits have no mode in Pillow
    return PixelLayout(
        bits=16 if deep else 8,
        channels=len(image.getbands()),
        pages=getattr(image, "n_frames", 1),
        words=f"mode {image.mode}",
    )


def _decoder(image: Image.Image) -> str:
    """Return how the pixels are stored, in Pillow's words."""
    return str([tile[3] for tile in getattr(image, "tile", [])])
