"""Sliding-window inference: the probability of tumour in every pixel of regions, and of slides tile by tile.

A segmenter that tells subtypes has a logit for each of them; the probability of tumour is then their sum.

The next images are read while the network works. Every window is seen once, also where tiles overlap, and windows of a
slide without tissue are not seen at all.

Shapes: H, W = rows and columns of an image in pixels, S = edge of a window, B = windows in a batch, K = number of
subtypes, where a segmenter tells them. Windows of several
images share batches of one size, so that many small regions cost no more than few large ones.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice, zip_longest
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from counterstain.data.region_store import PixelWindow
from counterstain.io.outlines import TILE_WINDOWS, Span, spans
from counterstain.processes import cores
from counterstain.segmentation.model import Segmenter
from counterstain.segmentation.segmenter_config import Windows

MOST_READERS = 4
MOST_SHARED = 512  # windows of a seam between two rows of tiles, of which logits are kept: more are computed twice
Corner = tuple[int, int]
Known = Mapping[Corner, Callable[[], np.ndarray]]
T = TypeVar("T")
CanvasT = TypeVar("CanvasT", bound="Canvas")
HasTissue = Callable[[int, int, int, int], bool]
"""Whether a part of an image shows tissue, by its first row and column, height and width in pixels."""


def sliding_window_inference(
    segmenter: Segmenter, images: Iterable[np.ndarray], windows: Windows
) -> Iterator[np.ndarray]:
    """Yield the tumour probability, (H, W) float32, of every region, (H, W, 3) uint8, in their order.

    Regions may have any sizes, and are read one at a time, as their windows are needed. The result of a region does not
    depend on the others: every batch is full, the last one padded with blank windows. A region smaller than a window is
    padded by reflection. Logits of overlapping windows are averaged with a Hann window as weight.
    """
    for canvas in filled(segmenter, (Canvas(image, windows) for image in images), windows.batch_size):
        yield canvas.probability()


def filled(segmenter: Segmenter, canvases: Iterable[CanvasT], batch_size: int) -> Iterator[CanvasT]:
    """Yield canvases in their order once the logits of all their windows are there; windows of several share batches.

    A GPU works on one batch while the logits of the batch before are blended.
    """
    waiting: deque[CanvasT] = deque()

    def missing() -> Iterator[tuple[CanvasT, Corner]]:
        for canvas in canvases:
            waiting.append(canvas)
            for corner in canvas.missing:
                yield canvas, corner

    remaining, started = missing(), deque[tuple[list[tuple[CanvasT, Corner]], _Logits]]()
    while group := list(islice(remaining, batch_size)):
        started.append((group, _Logits(segmenter, [canvas.window(corner) for canvas, corner in group], batch_size)))
        if len(started) > started[0][1].ahead:
            yield from _blended(*started.popleft(), waiting)
    while started:
        yield from _blended(*started.popleft(), waiting)
    yield from waiting  # those that miss nothing


def _blended(group: list[tuple[CanvasT, Corner]], logits: _Logits, waiting: deque[CanvasT]) -> Iterator[CanvasT]:
    for (canvas, _), of_window in zip(group, logits.wait(), strict=True):
        canvas.add(of_window)
    while waiting and waiting[0].left == 0:
        yield waiting.popleft()


class _Logits:
    """The logits of a batch of windows, which a GPU may still be computing."""

    def __init__(self, segmenter: Segmenter, windows: list[np.ndarray], batch_size: int) -> None:
        batch = np.zeros((batch_size, *windows[0].shape), np.uint8)
        batch[: len(windows)] = windows
        with torch.inference_mode():
            logits = segmenter.tumour_logits(torch.from_numpy(batch))[: len(windows)].float()
        self.ahead = int(logits.is_cuda)
        self._logits = logits.to("cpu", non_blocking=True)  # into pinned memory
        self._ready: Any = torch.cuda.Event() if logits.is_cuda else None  # type: ignore[no-untyped-call]
        if self._ready:
            self._ready.record()

    def wait(self) -> np.ndarray:
        """Return them when they are there, (n, S, S) or (n, K, S, S) float32."""
        if self._ready:
            self._ready.synchronize()
        return np.asarray(self._logits.numpy())


class Canvas:
    """An image whose logits are collected window by window: a region, or a tile of a slide.

    ``image`` is (H, W, 3) uint8. ``known`` has the logits of windows that the network need not see, by the row and
    column of their upper left corners: functions that are called when all windows before were added, and return the
    last rows of the window, (h, S) or (K, h, S) float32.
    """

    def __init__(self, image: np.ndarray, windows: Windows, known: Known | None = None) -> None:
        self.shape = self._height, self._width = image.shape[:2]
        size = self._size_px = windows.size_px
        padding = [(0, max(size - length, 0)) for length in (self._height, self._width)]
        self._image = np.pad(image, [*padding, (0, 0)], mode="reflect") if np.any(padding) else image
        rows, columns = (_starts(length, size, windows.overlap_px) for length in self._image.shape[:2])
        self._starts, self._known = (rows, columns), known or {}
        self._corners = deque((y, x) for y in rows for x in columns)
        self.missing = [corner for corner in self._corners if corner not in self._known]
        self.left = len(self.missing)
        weight = self._weight = np.sin(np.pi * (np.arange(size, dtype=np.float32) + 0.5) / size) ** 2  # Hann, never 0
        self._weights = np.outer(weight, weight)
        self._sum: np.ndarray | None = None  # while no window is there

    def window(self, corner: Corner) -> np.ndarray:
        """Return the pixels of a window, (S, S, 3) uint8."""
        y, x = corner
        return self._image[y : y + self._size_px, x : x + self._size_px]

    def add(self, logits: np.ndarray) -> None:
        """Take the logits, (S, S) or (K, S, S) float32, of the next window of ``missing``."""
        self._add_known()
        self._blend(self._corners.popleft(), logits)
        self.left -= 1

    def probability(self) -> np.ndarray:
        """Return the probability of tumour, (H, W) float32; called once, when nothing is missing."""
        return self.tumour()[0]

    def tumour(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return :meth:`probability` and the likeliest subtype, (H, W) uint8, None where subtypes are not told."""
        logits, own = self._blended(), (slice(self._height), slice(self._width))
        subtypes = None if logits.ndim == 2 else (logits.argmax(0) + 1).astype(np.uint8)[own]
        return tumour_probability(logits)[own], subtypes

    def logits(self) -> np.ndarray:
        """Return the logits, (H, W) or (K, H, W) float32, instead of :meth:`probability`."""
        return self._blended()[..., : self._height, : self._width]

    def _blended(self) -> np.ndarray:
        self._add_known()
        assert self._sum is not None
        shape = self._sum.shape[-2:]
        down, across = (_total_weight(s, self._weight, n) for s, n in zip(self._starts, shape, strict=True))
        for y in range(0, shape[0], self._size_px):  # a band at a time: less memory
            self._sum[..., y : y + self._size_px, :] /= np.outer(down[y : y + self._size_px], across)
        return self._sum

    def _add_known(self) -> None:
        while self._corners and self._corners[0] in self._known:
            corner = self._corners.popleft()
            self._blend(corner, self._known[corner]())

    def _blend(self, corner: Corner, logits: np.ndarray) -> None:
        if self._sum is None:
            self._sum = np.zeros((*logits.shape[:-2], *self._image.shape[:2]), np.float32)
        if logits.ndim > self._sum.ndim:  # only windows without tissue so far
            self._sum = np.repeat(self._sum[None], len(logits), axis=0)
        (y, x), size, rows = corner, self._size_px, logits.shape[-2]
        self._sum[..., y + size - rows : y + size, x : x + size] += self._weights[size - rows :] * logits


def tumour_probability(logits: np.ndarray) -> np.ndarray:
    """Turn logits of tumour, (H, W), or of every subtype over background, (K, H, W), into probabilities in place."""
    tumour = torch.from_numpy(logits)
    probability: np.ndarray = (tumour.logsumexp(0) if tumour.ndim == 3 else tumour).sigmoid_().numpy()
    return probability


class Band(NamedTuple):
    """Rows of a region: those of one row of windows, ``own_px`` of which are in no window of the next."""

    top_px: int
    height_px: int
    own_px: int


def bands(height_px: int, windows: Windows) -> list[Band]:
    """Cut a region into the rows of its windows, for :class:`Strip`."""
    starts = _starts(max(height_px, windows.size_px), windows.size_px, windows.overlap_px)
    ends = zip(starts, [*starts[1:], height_px], strict=True)
    return [Band(top, min(windows.size_px, height_px), end - top) for top, end in ends]


class Strip(Canvas):
    """A row of the windows of a region, so that a large region is never whole in memory.

    The strips of a region, ``height_px`` high, come one after the other, each with the one ``above`` it; their logits
    are added up in the order of the whole region's, and :meth:`probability` is of the rows that are the band's own,
    (own_px, W).
    """

    def __init__(self, image: np.ndarray, windows: Windows, band: Band, height_px: int, above: Strip | None) -> None:
        super().__init__(image, windows)
        height_px = max(height_px, windows.size_px)
        down = _total_weight(_starts(height_px, *windows[:2]), self._weight, height_px)
        self._down, self._own_px, self._above = down[band.top_px :][: band.own_px], band.own_px, above

    @property
    def shared(self) -> np.ndarray:
        """What was added up in the rows that the next strip shows too."""
        assert self._sum is not None
        return self._sum[..., self._own_px :, :]

    def _blended(self) -> np.ndarray:
        """Return the logits of the rows of its own."""
        assert self._sum is not None
        own = self._sum[..., : self._own_px, :]
        own /= np.outer(self._down, _total_weight(self._starts[1], self._weight, own.shape[-1]))
        return own

    def _blend(self, corner: Corner, logits: np.ndarray) -> None:
        if self._above is not None:  # all of its windows were added
            shared, self._above = self._above.shared, None
            self._sum = np.zeros((*shared.shape[:-2], *self._image.shape[:2]), np.float32)
            self._sum[..., : shared.shape[-2], :] = shared
        super()._blend(corner, logits)


def _starts(length: int, size_px: int, overlap_px: int) -> list[int]:
    """Return evenly spaced starts of windows that cover ``length`` and overlap by at least ``overlap_px``."""
    steps = -(-(length - size_px) // (size_px - overlap_px))
    starts: list[int] = np.linspace(0, length - size_px, steps + 1).astype(int).tolist()
    return starts


def _total_weight(starts: list[int], weight: np.ndarray, length: int) -> np.ndarray:
    total = np.zeros(length, np.float32)
    for start in starts:
        total[start : start + len(weight)] += weight
    return total


def read_ahead(tasks: Iterable[Callable[[], T]], threads: int = 1) -> Generator[T, None, None]:
    """Yield what tasks return, in their order; threads do as many of them ahead, beside the caller.

    With one thread the tasks are done one after the other. Close the iterator where it may be left early: what tasks
    read from must stay open until then.
    """
    running: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for task in tasks:
                running.append(pool.submit(task))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


# Slides: tiles, whose windows come from one grid over the whole image


def readers() -> int:
    """Return how many tiles of a slide are read at once, ahead of the network: one where there are two cores."""
    return max(1, min(MOST_READERS, cores() - 1))


class TileRow(NamedTuple):
    """A row of tiles of an image."""

    view: PixelWindow
    span: Span
    below: Span | None  # the next row
    columns: Sequence[Span]  # the tiles that have a window with tissue
    has_tissue: HasTissue


def everywhere(_y_px: int, _x_px: int, _height_px: int, _width_px: int) -> bool:
    """Say that all parts of an image may show tissue."""
    return True


def tile_rows(
    view: PixelWindow, windows: Windows, has_tissue: HasTissue = everywhere, tile_windows: int = TILE_WINDOWS
) -> list[TileRow]:
    """Cut an image into rows of tiles, without tiles that show no tissue."""
    rows, columns = (spans(length, windows.size_px, windows.overlap_px, tile_windows) for length in view.shape[:2])

    def wanted(row: Span) -> list[Span]:
        return [tile for tile in columns if has_tissue(row.read_from, tile.read_from, row.read_px, tile.read_px)]

    return [TileRow(view, row, below, wanted(row), has_tissue) for row, below in zip_longest(rows, rows[1:])]


def tiles(rows: Sequence[TileRow], windows: Windows) -> Iterator[Callable[[], _Tile]]:
    """Yield functions that read the tiles of rows, for :func:`read_ahead`.

    A tile takes logits of windows that a tile before it shows from there. Where a window shows no tissue, its pixels
    are background, with probability 0.
    """
    size = windows.size_px
    background = np.broadcast_to(np.float32(-np.inf), (size, size))
    seam: Seam = {}  # between a row and the next
    before: TileRow | None = None
    for row in rows:
        above = seam if before and before.view is row.view and before.below == row.span else {}
        seam, before, beside = {}, row, Seam()
        for column, following in zip_longest(row.columns, row.columns[1:]):
            left, beside = beside, {}
            known: dict[Corner, Callable[[], np.ndarray]] = {}
            shared: dict[Corner, list[_Shared]] = {}
            starts = (_starts(length, size, windows.overlap_px) for length in (row.span.read_px, column.read_px))
            for down, across in itertools.product(*starts):
                corner, y, x = (down, across), row.span.read_from + down, column.read_from + across
                if not row.has_tissue(y, x, size, size):
                    known[corner] = lambda: background
                elif seen := left.get((y, x)) or above.get((y, x)):
                    known[corner] = seen.logits
                else:
                    shared[corner] = []
                    if following and x >= following.read_from:
                        shared[corner].append(beside.setdefault((y, x), _Shared(0)))
                    if row.below and y >= row.below.read_from and len(seam) < MOST_SHARED:
                        shared[corner].append(seam.setdefault((y, x), _Shared(row.below.start - y)))
            yield partial(_Tile, row, column, windows, known, shared)


class _Shared:
    """The logits of a window that a later tile shows too, from a row of it on."""

    def __init__(self, first: int) -> None:
        self._first, self._logits = first, np.empty(0)

    def keep(self, logits: np.ndarray) -> None:
        self._logits = logits[..., self._first :, :].copy()

    def logits(self) -> np.ndarray:
        return self._logits


Seam = dict[tuple[int, int], _Shared]


class _Tile(Canvas):
    """A tile of a slide; the logits of windows on its seams are kept for the tiles that show them too."""

    def __init__(
        self, row: TileRow, column: Span, windows: Windows, known: Known, shared: Mapping[Corner, Sequence[_Shared]]
    ) -> None:
        image = np.empty((row.span.read_px, column.read_px, 3), np.uint8)
        super().__init__(image, windows, known)
        self._shared = shared
        if self.missing:
            top, left = (min(places) for places in zip(*self.missing, strict=True))
            bottom, right = (max(places) + windows.size_px for places in zip(*self.missing, strict=True))
            y, x = row.span.read_from + top, column.read_from + left
            image[top:bottom, left:right] = row.view.read(y, x, bottom - top, right - left)

    def add(self, logits: np.ndarray) -> None:
        """Take the logits of the next missing window."""
        for shared in self._shared[self.missing[-self.left]]:
            shared.keep(logits)
        super().add(logits)
