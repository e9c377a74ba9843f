"""A slide at any resolution: ``Slide.open(path).read(x, y, width, height, mpp)``.

Places are in level-0 pixels of the whole canvas, sizes in pixels of the output, resolution in micrometres per pixel
(mpp). With s = mpp / mpp of level 0, output pixel (row i, column j) of a region at (x, y) is the mean of the area
x + s j … x + s (j + 1), y + s i … y + s (i + 1), parts of pixels counted in part (edges are rounded to a millionth of a
pixel). It is taken from the coarsest level that is not coarser than the output. Transparent pixels and the surroundings
of the slide are white. Finer than level 0 the same rule holds: pixels are repeated, no detail is invented.

Shapes: H, W = rows and columns of the source in pixels, h, w = those of the output, C = channels.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openslide
import shapely
import tifffile
from scipy import sparse

from counterstain.errors import CounterstainWarning, InputError
from counterstain.io.pixel_readers import (
    APERIO_YCBCR,
    MAX_DIFFERENCE,
    PLAUSIBLE_MPP,
    SLIDE_COLOURS,
    WHITE,
    Level,
    OpenSlideSource,
    SlideSource,
    check_layout,
    is_plausible,
    read_image,
    reason,
)
from counterstain.io.tiff_files import TiffSource, area, first_pages, page_layout

SUFFIXES = (
    ".bif", ".dcm", ".mrxs", ".ndpi", ".ome.tif", ".ome.tiff", ".scn", ".svs", ".svslide", ".tif", ".tiff", ".vms",
    ".vmu",
)  # fmt: skip
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".png", ".webp")  # ordinary images, held whole in memory
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
APERIO, GENERIC_TIFF = "aperio", "generic-tiff"  # OpenSlide's vendors
MAX_ANISOTROPY = 0.01
LEVEL_TOLERANCE = 1.01  # a level up to 1 % coarser than the output still serves
SOURCE_PX = 1024  # edge of what is decoded at once: holds the memory constant
ROWS_AT_ONCE = 64  # of the output: what is computed for them stays in the processor's cache
LARGEST_BLOCK = 2**24  # pixels whose sum 32 bits hold
EDGE_STEPS = 2**20  # edges are whole multiples of 1 / EDGE_STEPS px, so that sums do not depend on where they start


def list_slides(folder: str | Path, suffixes: tuple[str, ...] = SUFFIXES) -> dict[str, Path]:
    """Return the slides of a folder, or the one slide that is given, by name.

    A subfolder of DICOM files is one slide with the folder's name. ``suffixes`` are those of the files that count.

    Raises InputError where there is no such folder, no slide in it, or two slides have one name.
    """
    folder = Path(folder)
    if folder.is_file():
        return {slide_name(folder, suffixes): folder}
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of slides")
    slides: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        # OpenSlide finds the other DICOM files of a slide beside the one that it is given.
        file = min(path.glob("*.dcm"), default=None) if path.is_dir() else path
        if file is None or not file.name.lower().endswith(suffixes) or path.name.startswith("."):
            continue
        name = path.name if path.is_dir() else slide_name(path, suffixes)
        if name in slides:
            raise InputError(f"{folder}: {slides[name].name} and {path.name} are both slide {name!r}; rename one")
        slides[name] = file
    if not slides:
        raise InputError(f"{folder}: no slide in it; expected files ending in {', '.join(suffixes)}")
    return slides


def slide_name(path: str | Path, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """Return a file's name without the suffix of a slide (``a.b.ome.tiff`` is ``a.b``), composed as Unicode's NFC.

    Macs decompose the names of files (NFD), so that the same name would be two.
    """
    name = unicodedata.normalize("NFC", Path(path).name)
    suffix = max((end for end in suffixes if name.lower().endswith(end)), key=len, default="")
    return name[: len(name) - len(suffix)] or name


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a slide in level-0 pixels of the canvas, such as a region or the scanned area."""

    x: int
    y: int
    width: int
    height: int
    name: str = ""  # of a region, unique on its slide

    @property
    def polygon(self) -> shapely.Polygon:
        """The rectangle as a polygon."""
        return shapely.box(self.x, self.y, self.x + self.width, self.y + self.height)

    def overlaps(self, other: Box) -> bool:
        """Whether the two share a pixel."""
        beside = min(self.x + self.width, other.x + other.width) <= max(self.x, other.x)
        return not beside and min(self.y + self.height, other.y + other.height) > max(self.y, other.y)


class Thumbnail(NamedTuple):
    """The scanned area of a slide, shrunk."""

    image: np.ndarray  # (H, W, 3) uint8
    x_level0_px: int
    y_level0_px: int  # its upper left corner on the canvas
    downsample: float  # level-0 pixels per pixel


@dataclass(frozen=True, slots=True)
class SlideWindow:
    """A rectangle of a slide at one resolution, read piece by piece; any piece equals that part of the whole."""

    source: SlideSource
    x_level0_px: float
    y_level0_px: float
    step: float  # level-0 pixels per pixel of the window
    shape: tuple[int, int, int]  # H, W, 3
    rough: bool = False  # whether levels will do that show pixels between those stored, as for a thumbnail

    def read(self, y_px: int, x_px: int, height_px: int, width_px: int) -> np.ndarray:
        """Return a piece at a place in the window, (height_px, width_px, 3) uint8."""
        coarsest = max(1.0, self.step * LEVEL_TOLERANCE)
        usable = [level for level in self.source.levels if level.exact or self.rough or level.number == 0]
        level = max((level for level in usable if level.downsample <= coarsest), key=lambda level: level.downsample)
        edge = max(1, int(SOURCE_PX * level.downsample / self.step))
        image = _planar(height_px, width_px, 3)
        for y in range(0, height_px, edge):
            for x in range(0, width_px, edge):
                block = image[y : y + edge, x : x + edge]
                block[:] = self._read_block(level, y_px + y, x_px + x, *block.shape[:2])
        return image

    def _read_block(self, level: Level, y_px: int, x_px: int, rows: int, columns: int) -> np.ndarray:
        y_edges = self._edges(level, self.y_level0_px, y_px, rows)
        x_edges = self._edges(level, self.x_level0_px, x_px, columns)
        top, left = math.floor(y_edges[0]), math.floor(x_edges[0])
        height, width = math.ceil(y_edges[-1]) - top, math.ceil(x_edges[-1]) - left
        return area_average(self.source.read(level, left, top, width, height), y_edges - top, x_edges - left)

    def _edges(self, level: Level, start: float, first: int, count: int) -> np.ndarray:
        """Return the edges of output pixels first … first + count in pixels of a level."""
        edges = (start + np.arange(first, first + count + 1) * self.step) / level.downsample
        return np.asarray(np.round(edges * EDGE_STEPS) / EDGE_STEPS)


class ImageSource:
    """An ordinary image, such as PNG or JPEG, as a slide of one level that does not say its resolution."""

    def __init__(self, path: Path) -> None:
        self._pixels = read_image(path)
        height, width, _ = self._pixels.shape
        self.levels: tuple[Level, ...] = (Level(width, height, 1.0, 0),)
        self.mpp_xy: tuple[float, float] | None = None
        self.doubt = ""
        self.bounds_level0_px = (0, 0, width, height)

    def read(self, _level: Level, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return (H, W, 3) uint8 at a place in the image; what lies outside is white."""
        pixels = np.full((height, width, 3), WHITE, np.uint8)
        top, left = max(y, 0), max(x, 0)
        shown = self._pixels[top : max(y + height, 0), left : max(x + width, 0)]
        pixels[top - y :, left - x :][: shown.shape[0], : shown.shape[1]] = shown
        return pixels

    def close(self) -> None:
        """Release nothing: the file is closed already."""


def open_slide_file(path: Path) -> SlideSource:
    """Open a slide file with the reader that serves it best; InputError says what is wrong with the file."""
    if not path.is_file():
        raise InputError(f"{path}: no such slide file")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageSource(path)
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
        raise InputError(f"{path}: damaged or incomplete ({reason(error)}); copy or export the slide again") from error


def _open_with_best_reader(path: Path) -> SlideSource:
    with path.open("rb") as file:
        is_tiff = file.read(4) in TIFF_MAGICS
    if not is_tiff:
        return OpenSlideSource(path)
    vendor = openslide.OpenSlide.detect_format(path)
    with tifffile.TiffFile(path) as opened:
        if opened.is_ome or vendor in {None, GENERIC_TIFF}:
            return TiffSource(path)
        pages = first_pages(path, opened)
        if vendor == APERIO and not any(
            page.is_tiled and (page.compression == APERIO_YCBCR or 0 in page.databytecounts) for page in pages
        ):
            return TiffSource(path, every_page_is_level=True)
        check_layout(path, page_layout(max(pages, key=area)), SLIDE_COLOURS)
    return OpenSlideSource(path)


class Slide(AbstractContextManager["Slide"]):
    """An open slide; a context manager.

    Examples
    --------
    >>> with Slide.open("slide.mrxs") as slide:  # doctest: +SKIP
    ...     image = slide.read(12_000, 8_000, 512, 512, mpp=0.5)
    """

    def __init__(self, path: Path, source: SlideSource, mpp_level0: float) -> None:
        self.path = path
        self.mpp_level0 = mpp_level0
        self.size_level0_px = (source.levels[0].width_px, source.levels[0].height_px)
        """Width and height of the canvas."""
        self.bounds_level0_px = source.bounds_level0_px
        """x, y, width and height of the scanned area: MIRAX's bounds, the whole canvas where there are none."""
        self._source = source

    @classmethod
    def open(cls, path: str | Path, mpp_level0: float | None = None, given_by: str = "--mpp-level0") -> Slide:
        """Open whatever OpenSlide opens, OME-TIFF, plain TIFF or an ordinary image; RGB with 8 bits a channel.

        ``mpp_level0``, micrometres per pixel of level 0, is needed where the file does not say; elsewhere it overrules
        the file, with a warning if it differs by more than 1 %. ``given_by`` says where it comes from, for messages;
        without it there is no warning.

        Raises InputError where the file is missing, damaged, no slide, or stores pixels in a way that is not read; its
        resolution is unknown, no microscope's, or differs by more than 1 % between x and y.
        """
        path = Path(path)
        source = open_slide_file(path)
        try:
            return cls(path, source, _resolve_mpp(path, source, mpp_level0, given_by))
        except BaseException:
            source.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def read(self, x_level0: float, y_level0: float, width_px: int, height_px: int, mpp: float) -> np.ndarray:
        """Return a region at ``mpp`` micrometres per pixel, (height_px, width_px, 3) uint8.

        Its upper left corner, in level-0 pixels of the canvas, may lie outside.
        """
        window = SlideWindow(self._source, x_level0, y_level0, self._step(mpp), (height_px, width_px, 3))
        return np.ascontiguousarray(window.read(0, 0, height_px, width_px))

    def window(self, box: Box, mpp: float) -> SlideWindow:
        """Return a region that is read piece by piece; its size is the box's in micrometres over mpp, rounded."""
        step = self._step(mpp)
        height, width = (max(1, round(side / step)) for side in (box.height, box.width))
        return SlideWindow(self._source, box.x, box.y, step, (height, width, 3))

    def thumbnail(self, max_px: int) -> Thumbnail:
        """Return the scanned area with its longer side ``max_px`` at most."""
        x, y, width, height = self.bounds_level0_px
        downsample = max(1.0, max(width, height) / max_px)
        size = (max(1, int(width / downsample)), max(1, int(height / downsample)))
        window = SlideWindow(self._source, x, y, downsample, (size[1], size[0], 3), rough=True)
        return Thumbnail(np.ascontiguousarray(window.read(0, 0, size[1], size[0])), x, y, downsample)

    def _step(self, mpp: float) -> float:
        if not 0 < mpp < math.inf:
            raise InputError(f"{self.path}: cannot be read at {mpp} mpp; expected micrometres per pixel above 0")
        return mpp / self.mpp_level0


def area_average(pixels: np.ndarray, y_edges: np.ndarray, x_edges: np.ndarray) -> np.ndarray:
    """Average source pixels over the cells of a grid, each weighted by the part of it that the cell covers.

    Cells whose edges are whole numbers are plain means, exact to the rounding (halves go up). A cell's value depends
    on its own edges alone, so a region averaged in tiles equals the region averaged in one piece.

    Takes (H, W, C) uint8 and rising edges, (h + 1,) within 0 … H and (w + 1,) within 0 … W; returns (h, w, C) uint8.
    """
    down, across = _whole_step(y_edges), _whole_step(x_edges)
    if down and across and down * across <= LARGEST_BLOCK:
        (top, bottom), (left, right) = (edges[[0, -1]].astype(int) for edges in (y_edges, x_edges))
        return _block_means(pixels[top:bottom, left:right], down, across)
    W, C = pixels.shape[1:]
    h, w = len(y_edges) - 1, len(x_edges) - 1
    of_columns, widths = _coverage(x_edges, W), np.diff(x_edges)[:, None, None]
    means = _planar(h, w, C)
    for first in range(0, h, ROWS_AT_ONCE):
        edges = y_edges[first : first + ROWS_AT_ONCE + 1]
        n, top, bottom = len(edges) - 1, math.floor(edges[0]), math.ceil(edges[-1])
        rows = _coverage(edges - top, bottom - top) @ pixels[top:bottom].reshape(-1, W * C).astype(np.float64)
        turned = np.empty((W, C, n))
        for channel in range(C):
            turned[:, channel] = rows[:, channel::C].T
        sums = (of_columns @ turned.reshape(W, C * n)).reshape(w, C, n)
        sums /= widths * np.diff(edges)
        sums += 0.5
        for channel in range(C):
            means[first : first + n, :, channel] = sums[:, channel].T
    return means


def _planar(height: int, width: int, channels: int) -> np.ndarray:
    """Return an empty image, (H, W, C) uint8, with the channels apart in memory: so it is computed, and so stored."""
    return np.moveaxis(np.empty((channels, height, width), np.uint8), 0, -1)


def _whole_step(edges: np.ndarray) -> int:
    """Return the number of source pixels in each of equal cells, 0 where they are not equal or share a pixel."""
    step = int(edges[1] - edges[0])
    return step if edges[0] == int(edges[0]) and np.array_equal(np.diff(edges), np.full(len(edges) - 1, step)) else 0


def _block_means(pixels: np.ndarray, down: int, across: int) -> np.ndarray:
    """Return the means of blocks of down x across pixels, (H / down, W / across, C) uint8; halves go up."""
    if down == across == 1:
        return pixels
    H, W, C = pixels.shape
    size, count = (H // down, W // across), down * across
    rows: np.ndarray = pixels[::down].reshape(size[0], W * C).astype(np.uint16 if count <= 256 else np.uint32)
    for k in range(1, down):
        rows += pixels[k::down].reshape(size[0], W * C)
    means = _planar(*size, C)
    for channel in range(C):  # steps through memory are the same for all pixels: several times faster than an axis of C
        sums: np.ndarray = rows[:, channel :: across * C].copy()
        for k in range(1, across):
            sums += rows[:, channel + k * C :: across * C]
        sums += count // 2
        means[..., channel] = sums // count
    return means


def _coverage(edges: np.ndarray, length: int) -> Any:
    """Return how much of each of ``length`` source pixels every cell covers, a sparse (cells, length) matrix."""
    start, stop = edges[:-1, None], edges[1:, None]
    first = np.floor(start).astype(np.intp)
    taps = int((np.ceil(stop) - first).max())
    source = first + np.arange(taps)
    covered = np.clip(np.minimum(source + 1, stop) - np.maximum(source, start), 0, None)
    columns = np.minimum(source, length - 1)  # taps past the end cover nothing
    row_starts = np.arange(len(edges)) * taps
    return sparse.csr_array((covered.ravel(), columns.ravel(), row_starts), shape=(len(edges) - 1, length))


def _resolve_mpp(path: Path, source: SlideSource, given: float | None, given_by: str) -> float:
    """Return the micrometres per level-0 pixel: the user's where given, otherwise the file's."""
    if given is not None and not is_plausible(given):
        low, high = PLAUSIBLE_MPP
        raise InputError(f"{path}: {given_by} {given:g}: expected {low:g} to {high:g} micrometres per pixel")
    found = source.mpp_xy
    if source.doubt and given is None:
        raise InputError(f"{path}: {source.doubt}; give the resolution that is right with --mpp-level0")
    if found is None or not all(map(is_plausible, found)):
        if given is None:
            said = "" if found is None else f" that is plausible ({found[0]:.4g} mpp)"
            raise InputError(f"{path}: the file has no resolution{said}; give it with --mpp-level0")
        return given
    x, y = found
    mean = (x + y) / 2
    square = abs(x - y) <= MAX_ANISOTROPY * mean
    if given is None and not square:
        raise InputError(f"{path}: pixels are not square, {x:g} x {y:g} mpp; save the slide with square pixels")
    if given is None:
        return mean
    if given_by and (not square or abs(given - mean) > MAX_DIFFERENCE * mean):
        said = f"{mean:g}" if square else f"{x:g} x {y:g}"
        warnings.warn(
            f"{path}: {given_by} {given:g} overrules the file's {said} mpp", CounterstainWarning, stacklevel=4
        )
    return given
