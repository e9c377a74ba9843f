"""TIFF files (plain, OME and Aperio's SVS), read with tifffile: pyramids, tiles or strips, RGB with 8 bits a channel.

Shapes: H, W = rows and columns in pixels.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
import warnings
from functools import lru_cache
from pathlib import Path

import defusedxml.ElementTree
import numpy as np
import tifffile

from counterstain.errors import CounterstainWarning, InputError
from counterstain.io.pixel_readers import (
    APERIO_YCBCR,
    MAX_DIFFERENCE,
    ROWS_AT_ONCE,
    SLIDE_COLOURS,
    TRANSPARENT,
    WHITE,
    Level,
    PixelLayout,
    check_layout,
    is_plausible,
    levels_of,
    on_white,
    reason,
    tiff_layout,
)

APERIO_MPP = re.compile(r"\|\s*MPP\s*=\s*([^|\s]*)")
APERIO_PART = re.compile(r"\[-?\d+,-?\d+ (\d+)x(\d+)\]")  # of what was scanned: the size of level 0
MICROMETRES = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
MICROMETRES_PER_UNIT = {2: 25_400.0, 3: 10_000.0}  # ResolutionUnit: inch, centimetre
NOT_COMPRESSED = 1
MAX_PAGES = 1000
MAX_BESIDE = 0.26  # of the area of an image: a reduced copy of half its sides, a label or an overview
MAX_SEGMENT_BYTES = 2**29  # of a strip or tile, decoded
KEPT_BYTES = 2**26  # of decoded tiles of a level
KEPT_STRIPS_BYTES = 2**28  # strips are as wide as the slide, so blocks side by side need the same ones

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is said by the errors here


class TiffSource:
    """An OME-TIFF, SVS or plain TIFF, read with tifffile: pyramids, tiles or strips, RGB with 8 bits a channel."""

    def __init__(self, path: Path, *, every_page_is_level: bool = False) -> None:
        self._file = tifffile.TiffFile(path)
        try:
            if self._file.is_ome:
                pages = _ome_pages(path, self._file)
            else:
                pages = _plain_pages(path, self._file, every_page_is_level=every_page_is_level)
            sizes = [(page.imagewidth, page.imagelength) for page in pages]
            tiles = [(p.tilewidth, p.tilelength) if p.is_tiled else (1, 1) for p in pages]
            self.levels = levels_of(sizes, tiles)
            self._pixels = {level.number: _PagePixels(path, pages[level.number]) for level in self.levels}
            self.mpp_xy, self.doubt = _mpp_of(self._file, pages[0])
            self.read(self.levels[0], 0, 0, 1, 1)  # damage that stops the decoder is found here
            self._pixels[self.levels[-1].number].check_shown()
        except BaseException:
            self._file.close()
            raise
        self.bounds_level0_px = (0, 0, self.levels[0].width_px, self.levels[0].height_px)

    def read(self, level: Level, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return (H, W, 3) uint8 at a place in the level's own pixels; what lies outside is white."""
        left, right = max(x, 0), min(x + width, level.width_px)
        top, bottom = max(y, 0), min(y + height, level.height_px)
        is_within = (left, top, right, bottom) == (x, y, x + width, y + height)
        found = self._pixels[level.number].read(top, left, bottom, right) if left < right and top < bottom else None
        if found is not None and is_within:
            return found
        pixels = np.full((height, width, 3), WHITE, np.uint8)
        if found is not None:
            pixels[top - y : bottom - y, left - x : right - x] = found
        return pixels

    def close(self) -> None:
        """Close the file and forget its pixels."""
        self._file.close()
        for pixels in self._pixels.values():
            pixels.forget()


class _PagePixels:
    """The pixels of a page of a TIFF file, mapped into memory or decoded strip by strip or tile by tile."""

    def __init__(self, path: Path, page: tifffile.TiffPage) -> None:
        self._path, self._page, self._lock = path, page, threading.Lock()
        layout = page_layout(page)
        if page.compression == APERIO_YCBCR:
            raise InputError(f"{path}: Aperio's JPEG 2000 outside of a slide of Aperio; save it with JPEG compression")
        self._premultiplied = layout.premultiplied
        height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
        rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
        self._planes, inside = (samples, 1) if page.planarconfig == 2 else (1, samples)
        self._segment_px, self._grid = (rows, columns), (-(-height // rows), -(-width // columns))
        self._check_segments()
        self._mapped = None
        if page.is_memmappable:
            self._mapped = np.memmap(path, np.uint8, mode="r", offset=page.dataoffsets[0], shape=tuple(page.shape))
        nbytes = rows * columns * inside
        if self._mapped is None and nbytes > MAX_SEGMENT_BYTES:
            kind = "tile" if page.is_tiled else "strip"
            raise InputError(
                f"{path}: is compressed in a {kind} of {columns:,} x {rows:,} px, which has to be decoded as a whole; "
                "save it in tiles of 256 x 256 px, for example with 'vips tiffsave IN OUT --tile --compression jpeg'"
            )
        kept = KEPT_BYTES if page.is_tiled else KEPT_STRIPS_BYTES
        self._segment = lru_cache(max(self._planes, kept // nbytes))(self._decode)

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """Return rows top to bottom of columns left to right, all within the page, (H, W, 3) uint8."""
        return on_white(self._stored(top, left, bottom, right), premultiplied=self._premultiplied)

    def check_shown(self) -> None:
        """Raise InputError where all is transparent; of a page that is not, the first rows are read."""
        height, width = self._page.imagelength, self._page.imagewidth
        tops = range(0, height, ROWS_AT_ONCE) if self._page.samplesperpixel > 3 else range(0)
        bands = (self._stored(top, 0, min(top + ROWS_AT_ONCE, height), width) for top in tops)
        if tops and not any(band[..., 3].any() for band in bands):
            raise InputError(f"{self._path}: {TRANSPARENT}")

    def _stored(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        samples = self._page.samplesperpixel
        if self._mapped is not None:
            window = (slice(top, bottom), slice(left, right))
            planar = self._planes > 1
            return np.moveaxis(self._mapped[:, *window], 0, -1) if planar else np.asarray(self._mapped[window])
        pixels = np.full((bottom - top, right - left, samples), WHITE, np.uint8)
        (rows, columns), (down, across) = self._segment_px, self._grid
        for plane, row, column in itertools.product(
            range(self._planes), range(top // rows, -(-bottom // rows)), range(left // columns, -(-right // columns))
        ):
            segment = self._segment((plane * down + row) * across + column)
            if segment is None:
                continue
            y, x = row * rows, column * columns
            y0, y1, x0, x1 = max(top, y), min(bottom, y + rows), max(left, x), min(right, x + columns)
            channels = slice(plane, plane + 1) if self._planes > 1 else slice(None)
            pixels[y0 - top : y1 - top, x0 - left : x1 - left, channels] = segment[y0 - y : y1 - y, x0 - x : x1 - x]
        return pixels

    def forget(self) -> None:
        """Let go of decoded segments and of the file's memory map."""
        self._segment.cache_clear()
        self._mapped = None

    def _check_segments(self) -> None:
        """Raise InputError where strips or tiles are not of the number, place and length that the page needs."""
        page, (rows, columns), (down, across) = self._page, self._segment_px, self._grid
        starts, lengths = (np.asarray(v, np.int64) for v in (page.dataoffsets, page.databytecounts))
        outside = (starts < 0) | (lengths < 0) | (starts + lengths > self._path.stat().st_size)
        fits = len(starts) == len(lengths) == self._planes * down * across and not outside.any()
        if fits and page.compression == NOT_COMPRESSED:
            line = columns * (page.samplesperpixel if self._planes == 1 else 1)
            last = page.imagelength - (down - 1) * rows  # rows of the last strip
            by_row = lengths.reshape(self._planes, down, across)
            whole = by_row == rows * line
            whole[:, -1] |= ~np.bool_(page.is_tiled) & (by_row[:, -1] == last * line)
            fits = bool((whole | (by_row == 0)).all())
        if not fits:
            raise InputError(f"{self._path}: damaged or cut off; copy or export the slide again")

    def _decode(self, index: int) -> np.ndarray | None:
        """Return the (H, W, channels) uint8 of a strip or tile, None where nothing is stored."""
        page, start, length = self._page, self._page.dataoffsets[index], self._page.databytecounts[index]
        if not start or not length:
            return None
        try:
            with self._lock:
                page.parent.filehandle.seek(start)
                data = page.parent.filehandle.read(length)
            tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
            segment = page.decode(data, index, **tables)[0]
            return None if segment is None else np.asarray(segment[0], np.uint8)
        except Exception as error:  # decoders raise whatever they like on damaged segments
            row, column = divmod(index % (self._grid[0] * self._grid[1]), self._grid[1])
            place = f"x {column * self._segment_px[1]}, y {row * self._segment_px[0]}"
            raise InputError(
                f"{self._path}: cannot be read at {place} of its level of {page.imagewidth} x {page.imagelength} px "
                f"({reason(error)}); copy or export the slide again"
            ) from error


def page_layout(page: tifffile.TiffPage, pages: int = 1) -> PixelLayout:
    """Return how a page stores its pixels; ``pages`` are those of its size."""
    size = " x ".join(map(str, page.shape))
    return tiff_layout(page.tags.valueof, f"{page.dtype} pixels, axes {page.axes}, {size}", pages)


def area(page: tifffile.TiffPage) -> int:
    """Return the number of pixels of a page."""
    return int(page.imagewidth) * int(page.imagelength)


def first_pages(path: Path, file: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """Return all pages of a file; raises InputError where there are too many for a slide."""
    pages = [page.aspage() for page in itertools.islice(file.pages, MAX_PAGES + 1)]
    if len(pages) > MAX_PAGES:
        raise InputError(f"{path}: has more than {MAX_PAGES} pages; save the one to be imported as a file of its own")
    return pages


def _ome_pages(path: Path, file: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """Return the page of every level of the largest image."""
    by_size = sorted(file.series, key=lambda series: -area(series.keyframe))
    series, *others = by_size  # a label or overview picture is smaller
    large = [other.keyframe for other in others if area(other.keyframe) > MAX_BESIDE * area(series.keyframe)]
    if any(page.shape == series.keyframe.shape for page in large):
        raise InputError(
            f"{path}: has {len(file.series)} images, several of {series.keyframe.imagewidth} x "
            f"{series.keyframe.imagelength} px; save the one to be imported as a file of its own"
        )
    if large:
        warnings.warn(
            f"{path}: only the largest of its images is read; one of {large[0].imagewidth} x {large[0].imagelength} px "
            "is left out: if it shows other tissue, save it as a file of its own",
            CounterstainWarning,
            stacklevel=2,
        )
    check_layout(path, page_layout(series.keyframe, len(series.pages)), SLIDE_COLOURS)
    return [level.keyframe for level in series.levels]


def _plain_pages(path: Path, file: tifffile.TiffFile, *, every_page_is_level: bool) -> list[tifffile.TiffPage]:
    """Return the largest page, and those that are the same image at other resolutions."""
    pages = first_pages(path, file)
    base = max(pages, key=area)
    same = [page for page in pages if page.shape == base.shape and not page.is_reduced]
    check_layout(path, page_layout(base, len(same)), SLIDE_COLOURS)
    smaller = [page for page in pages if page.is_tiled and (every_page_is_level or page.is_reduced)]
    smaller += [page.aspage() for page in base.pages or ()]
    smaller = [page for page in smaller if area(page) < area(base) and _is_read(path, page)]
    return [base, *sorted(smaller, key=area, reverse=True)]


def _is_read(path: Path, page: tifffile.TiffPage) -> bool:
    try:
        check_layout(path, page_layout(page), SLIDE_COLOURS)
    except InputError:
        return False
    return True


def _mpp_of(file: tifffile.TiffFile, page: tifffile.TiffPage) -> tuple[tuple[float, float] | None, str]:
    """Return the micrometres per pixel of a page, as OME's XML, Aperio's description or the page's tags say.

    The words say why it is not certain, where other entries contradict it.
    """
    if file.is_ome and (found := _ome_mpp(file.ome_metadata, page)):
        return found, ""
    by_tags, said = _tag_mpp(page), APERIO_MPP.search(page.description)
    if not said:
        return by_tags, ""
    try:
        mpp = float(said[1])
    except ValueError:
        return None, ""
    part, size = APERIO_PART.search(page.description), (page.imagewidth, page.imagelength)
    if part and (int(part[1]), int(part[2])) != size:
        doubt = f"its description ({mpp:g} mpp) is that of {part[1]} x {part[2]} px, but it has {size[0]} x {size[1]}"
    elif by_tags and is_plausible(by_tags[0]) and abs(by_tags[0] - mpp) > MAX_DIFFERENCE * mpp:
        doubt = f"its description says {mpp:g} mpp, its resolution tags say {by_tags[0]:.4g}"
    else:
        doubt = ""
    return (mpp, mpp), doubt


def _ome_mpp(xml: str | None, page: tifffile.TiffPage) -> tuple[float, float] | None:
    """Return what the images of the page's size say, None where that is nothing, or not the same."""
    found = set()
    try:
        for pixels in defusedxml.ElementTree.fromstring(xml or "").iterfind(".//{*}Pixels"):
            if [pixels.attrib.get(f"Size{axis}") for axis in "XY"] == [str(page.imagewidth), str(page.imagelength)]:
                sides = [
                    float(pixels.attrib[f"PhysicalSize{axis}"])
                    * MICROMETRES[pixels.get(f"PhysicalSize{axis}Unit", "µm")]
                    for axis in "XY"
                ]
                found.add((sides[0], sides[1]))
    except (defusedxml.ElementTree.ParseError, defusedxml.DefusedXmlException, KeyError, ValueError):
        return None  # no XML, or no sizes in a unit of length
    return found.pop() if len(found) == 1 else None


def _tag_mpp(page: tifffile.TiffPage) -> tuple[float, float] | None:
    try:
        unit = MICROMETRES_PER_UNIT[page.tags.valueof("ResolutionUnit", 2)]
        (x, per_x), (y, per_y) = (page.tags.valueof(f"{axis}Resolution") for axis in "XY")
        return (unit * per_x / x, unit * per_y / y) if per_x and per_y else None
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # no resolution, or none in a unit of length
        return None
