"""Readers of pixels: which layouts are read, OpenSlide for slides, Pillow for ordinary images.

:func:`check_layout` is the one list of the ways to store pixels that are read; every reader (tifffile's is in
:mod:`counterstain.io.tiff_files`) describes a file as a :class:`PixelLayout` and asks before it hands out a pixel.
Shapes: H, W = rows and columns in pixels of a level or image.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openslide
from PIL import Image, UnidentifiedImageError

from counterstain.errors import InputError
from counterstain.io.parts import Source, array_of, image_array, panel_of, stored_file

WHITE = 255
PLAUSIBLE_MPP = (0.01, 20.0)  # outside, the file's value is a screen's or printer's resolution, not a scanner's
MAX_DIFFERENCE = 0.01  # between a given resolution and the file's that is not worth a word
MAX_SHEAR = 0.01  # by which the factors of a level may differ between x and y
ROWS_AT_ONCE = 1024
IMAGE_FORMATS = ("PNG", "TIFF", "JPEG", "BMP", "GIF", "WEBP")

# TIFF tags and their values
BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, ORIENTATION, SAMPLES, PREDICTOR = 258, 259, 262, 266, 274, 277, 317
PLANAR, COLOUR_MAP, EXTRA_SAMPLES, SAMPLE_FORMAT = 284, 320, 338, 339
STORED = (273, 279, 324, 325)  # where strips and tiles lie, and their length
COLOURS = {0: "inverted grey", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIELab"}
JPEG = 7
APERIO_YCBCR = 33003  # JPEG 2000 that only OpenSlide turns into RGB
LOSSY = {JPEG, APERIO_YCBCR, 33005, 34712, 50001}  # JPEG 2000 (Aperio's and others'), WebP
COMPRESSIONS = {
    1,  # none
    *(2, 3, 4),  # CCITT, of one bit
    *(5, 8, 32773, 32946, 34925, 50000),  # LZW, deflate, PackBits, deflate, LZMA, Zstandard
    *LOSSY,
}
UNSPECIFIED, PREMULTIPLIED, STRAIGHT = 0, 1, 2  # what an extra sample is
TRANSPARENT = "is transparent everywhere, so that nothing of it would be seen; save it without transparency"
UNKNOWN, UPRIGHT = 0, 1  # orientations
SLIDE_COLOURS = frozenset({"RGB"})
IMAGE_COLOURS = frozenset({"RGB", "grey", "palette"})
OF_MODE = {
    "1": "grey", "L": "grey", "LA": "grey", "La": "grey", "I": "grey", "F": "grey", "P": "palette", "PA": "palette",
    "RGB": "RGB", "RGBA": "RGB", "RGBa": "RGB", "RGBX": "RGB",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelLayout:
    """How a file stores its pixels."""

    bits: int  # of a channel
    colour: str  # RGB, grey, palette, or another one that is not read
    numbers: str = "unsigned"  # or signed, or floating-point
    extra: tuple[int, ...] = ()  # what channels beside the colours are, as TIFF's ExtraSamples
    orientation: int = UPRIGHT  # as TIFF and EXIF number it; 1 is upright
    storage: str = ""  # what is unusual in how bytes are stored, in words
    pages: int = 1
    words: str  # the layout in the words of the library that reads it, for messages

    @property
    def premultiplied(self) -> bool:
        """Whether colours are multiplied by alpha already."""
        return self.extra == (PREMULTIPLIED,)


def check_layout(path: Source, layout: PixelLayout, colours: frozenset[str]) -> None:
    """Raise InputError where pixels are stored in a way that would not be read for certain as their maker meant them.

    ``colours`` are those that can be used.
    """
    if layout.bits > 8:
        raise InputError(f"{path}: more than 8 bits a channel ({layout.words}); convert it to 8 bits")
    if layout.numbers != "unsigned":
        raise InputError(f"{path}: {layout.numbers} numbers ({layout.words}); convert it to 8 bits without a sign")
    if layout.colour not in colours:
        expected = "RGB, grey or palette" if len(colours) > 1 else "RGB"
        raise InputError(f"{path}: not {expected} ({layout.words}); save it as {expected} with 8 bits a channel")
    if layout.bits != 8 and layout.colour == "RGB":
        raise InputError(f"{path}: has {layout.bits} bits a channel ({layout.words}); save it with 8 bits a channel")
    if layout.extra not in {(), (STRAIGHT,), (PREMULTIPLIED,)}:
        raise InputError(
            f"{path}: has a channel beside its colours of which the file does not say that it is transparency "
            f"({layout.words}); save it as RGB without that channel"
        )
    if layout.orientation not in {UNKNOWN, UPRIGHT}:
        raise InputError(
            f"{path}: is stored turned or mirrored (orientation {layout.orientation}), so that it may not fit its "
            "annotations; save it upright, without the orientation tag, as the annotations see it"
        )
    if layout.storage:
        raise InputError(f"{path}: {layout.storage} ({layout.words}); save it with LZW or JPEG compression, or none")
    if layout.pages > 1:
        raise InputError(f"{path}: has {layout.pages} pages; save the one to be imported as a file of its own")


def tiff_layout(tag: Callable[[int, Any], Any], words: str, pages: int = 1) -> PixelLayout:
    """Return the layout of a page of a TIFF file; ``tag`` takes a tag's number and the value where there is none."""
    samples, photometric, compression = tag(SAMPLES, 1), tag(PHOTOMETRIC, None), tag(COMPRESSION, 1)
    colour = COLOURS.get(photometric, f"photometric {photometric}")
    if compression == APERIO_YCBCR or (colour == "YCbCr" and compression == JPEG and tag(PLANAR, 1) == 1):
        colour = "RGB"  # as it is decoded
    extra = _numbers(tag(EXTRA_SAMPLES, ()))
    beside = samples - {"RGB": 3, "grey": 1, "palette": 1}.get(colour, samples)
    unsaid = beside - len(extra)
    formats = set(_numbers(tag(SAMPLE_FORMAT, 1)))
    bits = max(_numbers(tag(BITS, 1)))
    return PixelLayout(
        bits=bits,
        colour=colour if beside >= 0 and unsaid >= 0 else f"{colour} of {samples} channels",
        numbers={1: "unsigned", 2: "signed"}.get(formats.pop(), "floating-point") if len(formats) == 1 else "mixed",
        extra=(*extra, *[UNSPECIFIED] * unsaid),
        orientation=tag(ORIENTATION, UPRIGHT),
        storage=_unusual(tag, compression, samples),
        pages=pages,
        words=f"{words}, {colour} of {bits} bits" + (f", ExtraSamples {extra}" if extra else ""),
    )


def _unusual(tag: Callable[[int, Any], Any], compression: int, samples: int) -> str:
    if compression not in COMPRESSIONS:
        return f"compression {compression} is not read"
    if compression == JPEG and samples > 3:
        return "JPEG with transparency is not read"
    if compression in LOSSY and COLOURS.get(tag(PHOTOMETRIC, None)) == "palette":
        return "a palette whose numbers were compressed with losses is not read"
    if tag(FILL_ORDER, 1) != 1:
        return "bytes with reversed bits are not read"
    if tag(PREDICTOR, 1) not in {1, 2}:
        return f"predictor {tag(PREDICTOR, 1)} is not read"
    return ""


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, tuple | list) else (int(value),)


def image_layout(image: Image.Image) -> PixelLayout:
    """Return the layout of an image that Pillow has opened; of a TIFF file, as its tags say it."""
    words, pages = f"mode {image.mode}", getattr(image, "n_frames", 1)
    tags = getattr(image, "tag_v2", None)
    if image.format == "TIFF" and tags is not None:
        layout = tiff_layout(tags.get, words, pages)
        absent = any(0 in _numbers(tags.get(tag, ())) for tag in STORED)
        return replace(layout, storage="strips or tiles without data are not read") if absent else layout
    deep = image.mode.startswith(("I", "F")) or ";16" in decoder_of(image)  # colours of 16 bits have no mode in Pillow
    # PNG's EXIF data may stand behind the pixels, and Pillow would decode these to reach it.
    exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
    return PixelLayout(
        bits=16 if deep else 8,
        colour=OF_MODE.get(image.mode, image.mode),
        orientation=exif.get(ORIENTATION, UPRIGHT),
        pages=pages,
        words=words,
    )


def decoder_of(image: Image.Image) -> str:
    """Return how the pixels are stored, in Pillow's words."""
    return str([tile[3] for tile in getattr(image, "tile", [])])


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of a slide; its pixel k covers the level-0 pixels from k * downsample on."""

    width_px: int
    height_px: int
    downsample: float
    number: int  # in the file
    exact: bool = True
    """Whether its stored pixels are read where they lie; otherwise it will do for pictures to look at."""


class SlideSource(Protocol):
    """An open slide file."""

    levels: tuple[Level, ...]  # level 0 first, each one coarser than the one before
    mpp_xy: tuple[float, float] | None  # micrometres per level-0 pixel as the file says, None where it does not
    doubt: str  # why that is not certain, in words
    bounds_level0_px: tuple[int, int, int, int]  # x, y, width and height of the scanned area

    def read(self, level: Level, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return (H, W, 3) uint8 at a place in the level's own pixels; what lies outside or is empty is white."""

    def close(self) -> None:
        """Close the file."""


def levels_of(sizes: Sequence[tuple[int, int]], tiles: Sequence[tuple[int, int]] | None = None) -> tuple[Level, ...]:
    """Return levels of these widths and heights; those are left out whose factors in x and y contradict each other.

    Sides are rounded when a level is made (46,001 px shrunk by 4 are 11,500), so one factor has to explain both sides
    to the pixel; if a whole number does, it is the factor. A level that may be padded to whole tiles (``tiles`` are
    widths and heights; a power of two that divides a side counts as one, too) is not exact, and left out where padding
    leaves more than one factor.
    """
    levels = []
    for number, size in enumerate(sizes):
        sides = list(zip(sizes[0], size, strict=True))
        units = [_padded_to(side, tile) for side, tile in zip(size, tiles[number] if tiles else (1, 1), strict=True)]
        least = max(side0 / (side + 1) for side0, side in sides)
        most = _most(sides, [1, 1])
        quotients = [side0 / side for side0, side in sides]
        factor = sum(quotients) / 2
        whole = max(1, round(factor))
        to_the_pixel = least < whole < most
        possible = range(math.floor(least) + 1, math.ceil(min(_most(sides, units), max(sizes[0]))))
        padded = [f for f in possible if f.bit_count() == 1] or list(possible)
        if to_the_pixel and (whole.bit_count() == 1 or not padded or padded[0].bit_count() > 1):
            levels.append(Level(*size, float(whole), number))
        elif padded:
            levels += [Level(*size, float(padded[0]), number, exact=False)] if len(padded) == 1 else []
        elif least < most:
            levels.append(Level(*size, min(max(factor, least), most), number))
        elif max(quotients) <= (1 + MAX_SHEAR) * min(quotients):
            levels.append(Level(*size, factor, number, exact=False))
    return tuple(levels)


def _padded_to(side: int, tile: int) -> int:
    """Return the largest number of pixels that a side may have been padded to a multiple of."""
    return max(side & -side, tile if side % tile == 0 else 1)


def _most(sides: Sequence[tuple[int, int]], units: Sequence[int]) -> float:
    """Return the factor that every level stays below whose sides become these when rounded up to the units."""
    return min(side0 / (side - u) if side > u else math.inf for (side0, side), u in zip(sides, units, strict=True))


def is_plausible(mpp: float) -> bool:
    """Whether a scanner has this many micrometres per pixel."""
    return PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]


def reason(error: Exception) -> str:
    """Return what a library says as one line of printable characters."""
    text = " ".join(str(error).split())
    return "".join(character for character in text if character.isprintable())[:200] or type(error).__name__


def on_white(pixels: np.ndarray, *, premultiplied: bool = False) -> np.ndarray:
    """Lay (H, W, 3 or 4) uint8 pixels on white; returns (H, W, 3) uint8."""
    alpha = pixels[..., 3:]
    if (alpha == WHITE).all():
        opaque = [pixels[..., channel] for channel in range(3)]  # copied one by one in a quarter of the time
        return np.stack(opaque, axis=-1) if alpha.size else np.ascontiguousarray(pixels)
    laid = np.empty((*pixels.shape[:2], 3), np.uint8)
    for top in range(0, len(pixels), ROWS_AT_ONCE):
        rows, a = (part[top : top + ROWS_AT_ONCE].astype(np.uint16) for part in (pixels[..., :3], alpha))
        over = rows + (WHITE - a) if premultiplied else (rows * a + WHITE * (WHITE - a) + WHITE // 2) // WHITE
        laid[top : top + ROWS_AT_ONCE] = np.minimum(WHITE, over)
    return laid


class OpenSlideSource:
    """A slide in a format of OpenSlide: MIRAX, NDPI, BIF, SCN, DICOM and others."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = openslide.OpenSlide(path)
        # OpenSlide takes places in whole level-0 pixels. Where these are not whole pixels of the level, it shifts the
        # level by the fraction that remains: pixels between those that are stored.
        self.levels = tuple(
            replace(level, exact=level.exact and self._file.level_downsamples[level.number] == round(level.downsample))
            for level in levels_of(self._file.level_dimensions)
        )
        x, y = self._number(openslide.PROPERTY_NAME_MPP_X), self._number(openslide.PROPERTY_NAME_MPP_Y)
        self.doubt = ""
        self.mpp_xy = None if x is None or y is None else (x, y)
        self.bounds_level0_px = self._bounds()

    def read(self, level: Level, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return (H, W, 3) uint8 at a place in the level's own pixels; what lies outside or is empty is white."""
        downsample = self._file.level_downsamples[level.number]  # OpenSlide's own, which padding may have changed
        place = (round(x * downsample), round(y * downsample))
        try:
            return on_white(np.asarray(self._file.read_region(place, level.number, (width, height))))
        except openslide.OpenSlideError as error:
            raise InputError(
                f"{self._path}: cannot be read at x {place[0]}, y {place[1]} ({reason(error)}); "
                "copy or export the slide again"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _number(self, name: str) -> float | None:
        try:
            return float(self._file.properties[name])
        except (KeyError, ValueError):
            return None

    def _bounds(self) -> tuple[int, int, int, int]:
        x, y, width, height = (self._number(f"openslide.bounds-{name}") for name in ("x", "y", "width", "height"))
        if x is None or y is None or width is None or height is None:
            return (0, 0, *self._file.dimensions)
        return (int(x), int(y), int(width), int(height))


def image_size(path: Source, *, labels: bool = False) -> tuple[int, int]:
    """Return rows and columns of an image from its header alone; raises what :func:`read_image` raises on headers."""
    array = array_of(path)
    if array is not None:
        return array.shape[0], array.shape[1] if array.ndim > 1 else 0
    with opened_image(path, labels=labels) as image:
        columns = panel_of(path, image.width)
        return image.height, columns.stop - columns.start


def read_image(path: Source) -> np.ndarray:
    """Read an image or array as (H, W, 3) uint8; grey becomes RGB, transparent becomes white.

    Raises InputError where the file is missing, damaged or no image, has a layout that is not read, or is far too
    large.
    """
    if (array := image_array(path)) is not None:
        return array
    with opened_image(path) as image:
        image.load()
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        for top in range(0, image.height, ROWS_AT_ONCE):  # Pillow copies what it converts
            band = pixels[top : top + ROWS_AT_ONCE]
            whole = len(band) == image.height
            band[:] = _rgb(image if whole else image.crop((0, top, image.width, top + len(band))))
        if image.has_transparency_data and (pixels == WHITE).all() and not _rgba(image)[..., 3].any():
            raise InputError(f"{path}: {TRANSPARENT}")
        return pixels[:, panel_of(path, pixels.shape[1])]


def _rgb(image: Image.Image) -> np.ndarray:
    if image.has_transparency_data:
        return on_white(_rgba(image))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _rgba(image: Image.Image) -> np.ndarray:
    return np.asarray((image.convert("LA") if image.mode == "La" else image).convert("RGBA"))


def _mend_palette(image: Image.Image) -> None:
    """Read colours of 8 bits in a TIFF's palette, which has 16, as libtiff does: Pillow would take them for black."""
    colours = image.tag_v2.get(COLOUR_MAP, ()) if image.mode == "P" and hasattr(image, "tag_v2") else ()
    if 0 < max(colours, default=0) <= WHITE:
        image.putpalette(np.reshape(colours, (3, -1)).T.astype(np.uint8).tobytes())


@contextmanager
def opened_image(path: Source, *, labels: bool = False) -> Iterator[Image.Image]:
    """Open an image with Pillow, whatever is wrong with it as an InputError.

    Layouts of ``labels`` without colours are checked by :mod:`counterstain.io.masks`, which reads them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of images half the size that is an error, and of damaged tags
            with Image.open(stored_file(path), formats=IMAGE_FORMATS) as image:
                _check_image(path, image, labels=labels)
                _mend_palette(image)
                yield image
                _check_image(path, image, labels=labels)  # PNG may have its EXIF data behind the pixels
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; cut it into regions of at most "
            "10,000 x 10,000 px"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path}: not an image that can be read; expected PNG, TIFF or JPEG with 8 bits a channel"
        ) from error
    except InputError:
        raise
    except Exception as error:  # on damaged files Pillow's decoders raise whatever they meet
        raise InputError(f"{path}: damaged or cut off ({reason(error)}); export it again") from error


def _check_image(path: Source, image: Image.Image, *, labels: bool) -> None:
    layout = image_layout(image)
    if not labels or layout.colour == "RGB":
        check_layout(path, layout, IMAGE_COLOURS)
