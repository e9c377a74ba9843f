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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import openslide
import tifffile
from scipy import ndimage, sparse

from counterstain.errors import InputError
from counterstain.io.pixel_readers import OpenSlideSource, SlideSource, TiffSource, reason
from counterstain.io.regions import Box

PLAUSIBLE_MPP = (0.01, 20.0)  # outside, the file's value is a screen's or printer's resolution, not a scanner's
MAX_ANISOTROPY = 0.01
MAX_CONTRADICTION = 0.05
LEVEL_TOLERANCE = 1.01  # a level up to 1 % coarser than the output still serves
SOURCE_PX = 1024  # edge of what is decoded at once: holds the memory constant
EDGE_STEPS = 2**20  # edges are whole multiples of 1 / EDGE_STEPS px, so that sums do not depend on where they start
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Tissue on a thumbnail, see tissue_mask: saturation 0..1, brightness 0..255.
MIN_SATURATION = 0.04  # paler pixels are never tissue, so that a blank slide has none
MAX_SATURATION = 0.2  # stronger pixels are always tissue, so that a strong stain does not hide pale tissue
MIN_BRIGHTNESS = 30  # darker pixels are a border or a felt pen
CLOSING_PX = 3  # gaps up to about this width are closed
MIN_AREA_SHARE = 2e-4  # of the thumbnail; smaller specks are dust
SATURATION_BINS = 256


class Thumbnail(NamedTuple):
    """The scanned area of a slide, shrunk."""

    image: np.ndarray  # (H, W, 3) uint8
    x_level0_px: int
    y_level0_px: int
    """Its upper left corner on the canvas."""
    downsample: float
    """Level-0 pixels per pixel."""


@dataclass(frozen=True, slots=True)
class SlideWindow:
    """A rectangle of a slide at one resolution, read piece by piece; any piece equals that part of the whole."""

    slide: Slide
    x_level0_px: float
    y_level0_px: float
    step: float
    """Level-0 pixels per pixel of the window."""
    shape: tuple[int, int, int]
    """H, W, 3."""

    def read(self, y_px: int, x_px: int, height_px: int, width_px: int) -> np.ndarray:
        """Return a piece at a place in the window, (height_px, width_px, 3) uint8."""
        image = np.empty((height_px, width_px, 3), np.uint8)
        edge = max(1, int(SOURCE_PX * self.slide.downsample_for(self.step) / self.step))
        for y in range(0, height_px, edge):
            for x in range(0, width_px, edge):
                rows, columns = min(edge, height_px - y), min(edge, width_px - x)
                image[y : y + rows, x : x + columns] = self._read_block(y_px + y, x_px + x, rows, columns)
        return image

    def _read_block(self, y_px: int, x_px: int, rows: int, columns: int) -> np.ndarray:
        downsample = self.slide.downsample_for(self.step)
        y_edges = _edges(self.y_level0_px, self.step, y_px, rows, downsample)
        x_edges = _edges(self.x_level0_px, self.step, x_px, columns, downsample)
        top, left = math.floor(y_edges[0]), math.floor(x_edges[0])
        height, width = math.ceil(y_edges[-1]) - top, math.ceil(x_edges[-1]) - left
        pixels = self.slide.read_level(downsample, left, top, width, height)
        return area_average(pixels, y_edges - top, x_edges - left)


class Slide:
    """An open slide; a context manager.

    Examples
    --------
    >>> with Slide.open("slide.mrxs") as slide:  # doctest: +SKIP
    ...     image = slide.read(12_000, 8_000, 512, 512, mpp=0.5)
    """

    def __init__(self, path: Path, source: SlideSource, mpp_level0: float) -> None:
        self.path = path
        self.mpp_level0 = mpp_level0
        self._source = source
        self._level_of = {level.downsample: number for number, level in reversed(list(enumerate(source.levels)))}

    @classmethod
    def open(cls, path: str | Path, mpp_level0: float | None = None, given_by: str = "--mpp-level0") -> Slide:
        """Open a slide file.

        Parameters
        ----------
        path : str or Path
            Whatever OpenSlide opens, OME-TIFF, or plain TIFF; RGB with 8 bits a channel.
        mpp_level0 : float, optional
            Micrometres per pixel of level 0. Needed where the file does not say; elsewhere it overrules the file's
            value, from which it may differ by 5 %.
        given_by : str
            Where ``mpp_level0`` comes from, for messages.

        Raises
        ------
        InputError
            The file is missing, damaged or no slide; its resolution is unknown, contradicts ``mpp_level0`` or differs
            by more than 1 % between x and y.
        """
        path = Path(path)
        source = _open_source(path)
        try:
            return cls(path, source, _resolve_mpp(path, source.mpp_xy, mpp_level0, given_by))
        except InputError:
            source.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    @property
    def size_level0_px(self) -> tuple[int, int]:
        """Width and height of the canvas."""
        return self._source.levels[0].width_px, self._source.levels[0].height_px

    @property
    def bounds_level0_px(self) -> tuple[int, int, int, int]:
        """Return x, y, width and height of the scanned area: MIRAX's bounds, the whole canvas where there are none."""
        return self._source.bounds_level0_px

    @property
    def downsamples(self) -> tuple[float, ...]:
        """Factors of the levels, 1 first."""
        return tuple(level.downsample for level in self._source.levels)

    def read(self, x_level0: float, y_level0: float, width_px: int, height_px: int, mpp: float) -> np.ndarray:
        """Read a region.

        Parameters
        ----------
        x_level0, y_level0 : float
            Upper left corner in level-0 pixels of the canvas; may lie outside.
        width_px, height_px : int
            Size of the output.
        mpp : float
            Micrometres per pixel of the output.

        Returns
        -------
        (height_px, width_px, 3) uint8 array
        """
        window = SlideWindow(self, x_level0, y_level0, self._step(mpp), (height_px, width_px, 3))
        return window.read(0, 0, height_px, width_px)

    def window(self, box: Box, mpp: float) -> SlideWindow:
        """Return a region that is read piece by piece; its size is the box's in micrometres over mpp, rounded."""
        step = self._step(mpp)
        height, width = (max(1, round(side / step)) for side in (box.height, box.width))
        return SlideWindow(self, box.x, box.y, step, (height, width, 3))

    def thumbnail(self, max_px: int) -> Thumbnail:
        """Return the scanned area with its longer side ``max_px`` at most."""
        x, y, width, height = self.bounds_level0_px
        downsample = max(1.0, max(width, height) / max_px)
        size = (max(1, int(width / downsample)), max(1, int(height / downsample)))
        return Thumbnail(self.read(x, y, *size, mpp=self.mpp_level0 * downsample), x, y, downsample)

    def downsample_for(self, step: float) -> float:
        """Return the factor of the coarsest level that serves an output of ``step`` level-0 pixels per pixel."""
        return max(factor for factor in self.downsamples if factor <= max(1.0, step * LEVEL_TOLERANCE))

    def read_level(self, downsample: float, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return (H, W, 3) uint8 of the level with this factor, at a place in its own pixels."""
        return self._source.read(self._level_of[downsample], x, y, width, height)

    def _step(self, mpp: float) -> float:
        if not 0 < mpp < math.inf:
            raise InputError(f"{self.path}: cannot be read at {mpp} mpp; expected micrometres per pixel above 0")
        return mpp / self.mpp_level0


def _edges(start: float, step: float, first: int, count: int, downsample: float) -> np.ndarray:
    """Return the edges of output pixels first … first + count in pixels of a level."""
    edges = (start + np.arange(first, first + count + 1) * step) / downsample
    return np.asarray(np.round(edges * EDGE_STEPS) / EDGE_STEPS)


def area_average(pixels: np.ndarray, y_edges: np.ndarray, x_edges: np.ndarray) -> np.ndarray:
    """Average source pixels over the cells of a grid, each weighted by the part of it that the cell covers.

    Cells whose edges are whole numbers are plain means, exact to the rounding (halves go up). A cell's value depends
    on its own edges alone, so a region averaged in tiles equals the region averaged in one piece.

    Parameters
    ----------
    pixels : (H, W, C) uint8 array
    y_edges : (h + 1,) float array
        Rising, within 0 … H.
    x_edges : (w + 1,) float array
        Rising, within 0 … W.

    Returns
    -------
    (h, w, C) uint8 array
    """
    H, W, C = pixels.shape
    if _identical(y_edges, H) and _identical(x_edges, W):
        return pixels
    h, w = len(y_edges) - 1, len(x_edges) - 1
    rows = _coverage(y_edges, H) @ pixels.reshape(H, W * C).astype(np.float64)  # (h, W * C)
    turned = rows.reshape(h, W, C).swapaxes(0, 1).reshape(W, h * C)
    sums = (_coverage(x_edges, W) @ turned).reshape(w, h, C)
    sums /= np.diff(x_edges)[:, None, None] * np.diff(y_edges)[None, :, None]
    sums += 0.5
    return np.ascontiguousarray(sums.astype(np.uint8).swapaxes(0, 1))


def _identical(edges: np.ndarray, length: int) -> bool:
    return len(edges) == length + 1 and bool((edges == np.arange(length + 1)).all())


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


def _open_source(path: Path) -> SlideSource:
    """Open a slide file with the reader that serves it best."""
    if not path.is_file():
        raise InputError(f"{path}: no such slide file")
    with path.open("rb") as file:
        is_tiff = file.read(4) in TIFF_MAGICS
    if not is_tiff:
        return _open_openslide(path)
    if _is_ome(path):
        return _open_tifffile(path)  # OpenSlide does not know OME's resolution
    if openslide.OpenSlide.detect_format(path) not in {None, "generic-tiff"}:
        return _open_openslide(path)
    try:
        return OpenSlideSource(path)
    except openslide.OpenSlideError:  # it reads tiled files of no known vendor; tifffile reads strips too
        return _open_tifffile(path)


def _open_openslide(path: Path) -> SlideSource:
    try:
        return OpenSlideSource(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        if path.suffix.lower() == ".mrxs" and not (path.with_suffix("") / "Slidedat.ini").is_file():
            raise InputError(
                f"{path}: its folder {path.stem!r} with Slidedat.ini is missing beside it; copy both"
            ) from error
        raise InputError(
            f"{path}: not a slide that can be read; expected a format of OpenSlide (MIRAX, SVS, NDPI, BIF, DICOM, …), "
            "OME-TIFF or RGB TIFF"
        ) from error
    except openslide.OpenSlideError as error:
        raise InputError(f"{path}: damaged or incomplete ({reason(error)}); copy or export the slide again") from error


def _open_tifffile(path: Path) -> SlideSource:
    try:
        return TiffSource(path)
    except InputError:
        raise
    except Exception as error:  # on damaged files tifffile raises more than its own errors
        raise InputError(f"{path}: damaged or incomplete ({reason(error)}); copy or export the slide again") from error


def _is_ome(path: Path) -> bool:
    try:
        with tifffile.TiffFile(path) as file:
            return bool(file.is_ome)
    except Exception:  # noqa: BLE001 # damaged in a way that the readers will name
        return False


def _resolve_mpp(path: Path, found: tuple[float, float] | None, given: float | None, given_by: str) -> float:
    """Return the micrometres per level-0 pixel: the user's where given, otherwise the file's."""
    if given is not None and not 0 < given < math.inf:
        raise InputError(f"{path}: {given_by} {given}: expected micrometres per pixel above 0")
    if found is None or not all(PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1] for value in found):
        if given is None:
            said = "" if found is None else f" that is plausible ({found[0]:.4g} mpp)"
            raise InputError(f"{path}: the file has no resolution{said}; give it with --mpp-level0")
        return given
    mean = sum(found) / 2
    if abs(found[0] - found[1]) > MAX_ANISOTROPY * mean:
        raise InputError(
            f"{path}: pixels are not square, {found[0]:g} x {found[1]:g} mpp; save the slide with square pixels"
        )
    if given is not None and abs(given - mean) > MAX_CONTRADICTION * mean:
        raise InputError(
            f"{path}: {given_by} {given:g} contradicts the file's {mean:g} mpp; leave it out, or correct the file"
        )
    return mean if given is None else given


def tissue_mask(image: np.ndarray) -> np.ndarray:
    """Return where a thumbnail, (H, W, 3) uint8, shows tissue, (H, W) bool: stain is colourful, glass is not.

    The threshold of saturation is Otsu's (1979) between MIN_SATURATION and MAX_SATURATION.
    """
    values = ndimage.median_filter(_saturation(image), size=3)
    threshold = float(np.clip(_otsu(values), MIN_SATURATION, MAX_SATURATION))
    mask = (values > threshold) & (image.max(axis=-1) >= MIN_BRIGHTNESS)
    y, x = np.ogrid[-CLOSING_PX : CLOSING_PX + 1, -CLOSING_PX : CLOSING_PX + 1]
    padded = np.pad(mask, CLOSING_PX, mode="edge")  # otherwise tissue at the border is eaten away
    closed = ndimage.binary_closing(padded, structure=x**2 + y**2 <= CLOSING_PX**2)
    parts, _ = ndimage.label(closed[CLOSING_PX:-CLOSING_PX, CLOSING_PX:-CLOSING_PX])
    keep = np.bincount(parts.ravel()) >= MIN_AREA_SHARE * mask.size
    keep[0] = False
    return np.asarray(keep[parts])


def _saturation(image: np.ndarray) -> np.ndarray:
    """Return the saturation of HSV, (H, W) float32 in 0..1."""
    high, low = image.max(axis=-1).astype(np.float32), image.min(axis=-1).astype(np.float32)
    return np.asarray((high - low) / np.maximum(high, 1), np.float32)


def _otsu(values: np.ndarray) -> float:
    """Return the threshold in 0..1 that separates values best into two classes."""
    counts, edges = np.histogram(values, bins=SATURATION_BINS, range=(0, 1))
    centres = (edges[:-1] + edges[1:]) / 2
    below, below_sum = np.cumsum(counts), np.cumsum(counts * centres)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (below_sum / below - (below_sum[-1] - below_sum) / above) ** 2
    return float(edges[1 + int(np.nan_to_num(between).argmax())])
