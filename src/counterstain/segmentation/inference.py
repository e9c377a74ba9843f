"""Sliding-window inference over images of any size, cut so that no pixel depends on the tile it was computed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from counterstain.errors import ConfigError

TILE_WINDOWS = 8  # windows of a tile along one axis


class Span(NamedTuple):
    """A tile along one axis, in pixels of the image."""

    read_from: int
    """First pixel that is read; below 0 where the image is continued beyond its edge."""
    read_px: int
    """How many are read: whole windows."""
    start: int
    """First pixel that the tile answers for."""
    stop: int
    """End of those; unless it is the image's, pixel ``stop`` itself is known too, so that outlines meet there."""
    last: bool = True
    """Whether the image ends here."""


def spans(length: int, size_px: int, overlap_px: int, tile_windows: int = TILE_WINDOWS) -> list[Span]:
    """Cut one axis of an image into tiles.

    The first window begins ``overlap_px`` before the image, so that its edge is seen with what lies beyond it.

    Parameters
    ----------
    length : int
        Pixels of the image.
    size_px : int
        Edge of a window.
    overlap_px : int
        Pixels that neighbouring windows share, below ``size_px``.
    tile_windows : int
        Windows of a tile; more where windows overlap so far that a tile would get no further.
    """
    stride = size_px - overlap_px
    windows = max(1, -(-(length + overlap_px - size_px) // stride) + 1)
    per_tile = max(tile_windows, 2 * -(-size_px // stride))
    found: list[Span] = []
    first = start = 0
    while not found or not found[-1].last:
        last = min(first + per_tile, windows) - 1
        ends = last == windows - 1
        stop = length if ends else (last + 1) * stride - overlap_px - 1
        found.append(Span(first * stride - overlap_px, (last - first) * stride + size_px, start, stop, ends))
        start = stop
        first = max(0, (stop + overlap_px - size_px) // stride + 1)  # the first window that shows pixel ``stop``
    return found


# Sliding-window inference over regions of any size.
#
# Shapes: H, W = rows and columns of a region in pixels, S = edge of a window, B = windows in a batch. Windows of
# several regions share the fixed batches, so that many small regions cost no more than few large ones.


class TumourModel(Protocol):
    """What inference needs of a segmenter."""

    def tumour_logits(self, images: Tensor) -> Tensor:
        """Return (B, S, S) float logits of tumour for (B, S, S, 3) uint8 images."""
        ...


def predict(
    segmenter: TumourModel, image: np.ndarray, *, size_px: int, overlap_px: int | None = None, batch_size: int = 16
) -> np.ndarray:
    """Return the probability of tumour, (H, W) float32, of a region, (H, W, 3) uint8; see :func:`predict_each`."""
    return next(predict_each(segmenter, [image], size_px=size_px, overlap_px=overlap_px, batch_size=batch_size))


def predict_each(
    segmenter: TumourModel,
    images: Iterable[np.ndarray],
    *,
    size_px: int,
    overlap_px: int | None = None,
    batch_size: int = 16,
) -> Iterator[np.ndarray]:
    """Yield the probability of tumour, (H, W) float32, of every region, (H, W, 3) uint8, in their order.

    A region's result does not depend on the other regions: every batch is full, the last one filled up with blank
    windows. A region smaller than a window is continued by reflection. Logits of overlapping windows are averaged
    with a weight that falls smoothly towards the window's edge.

    Parameters
    ----------
    segmenter : TumourModel
    images : iterable of (H, W, 3) uint8 arrays
        Any sizes; read one after the other, as the windows need them.
    size_px : int
        Edge S of the windows.
    overlap_px : int, optional
        Pixels that neighbouring windows share at least; a quarter of a window where not given.
    batch_size : int

    Raises
    ------
    ConfigError
        The overlap is as large as the window.
    """
    overlap_px = size_px // 4 if overlap_px is None else overlap_px
    if overlap_px >= size_px:
        raise ConfigError(f"overlap_px {overlap_px}: expected less than the window of {size_px} px")
    waiting: deque[_Canvas] = deque()

    def windows() -> Iterator[tuple[_Canvas, int, int]]:
        for image in images:
            canvas = _Canvas(image, size_px, overlap_px)
            waiting.append(canvas)
            for y, x in canvas.corners:
                yield canvas, y, x

    for group in _groups(windows(), batch_size):
        logits = _logits(segmenter, [canvas.window(y, x) for canvas, y, x in group], batch_size)
        for (canvas, y, x), of_window in zip(group, logits, strict=True):
            canvas.add(y, x, of_window)
        while waiting and waiting[0].finished:
            yield waiting.popleft().probability()


def window_weight(size_px: int) -> np.ndarray:
    """Return the weight of a window's rows (and columns), (S,) float32: a Hann window that never reaches zero."""
    return np.sin(np.pi * (np.arange(size_px, dtype=np.float32) + 0.5) / size_px) ** 2


class _Canvas:
    """A region whose logits are gathered window by window."""

    def __init__(self, image: np.ndarray, size_px: int, overlap_px: int) -> None:
        self._height, self._width = image.shape[:2]
        missing = [(0, max(size_px - length, 0)) for length in (self._height, self._width)]
        self._image = np.pad(image, [*missing, (0, 0)], mode="reflect") if np.any(missing) else image
        self._size_px = size_px
        rows, columns = (_starts(length, size_px, overlap_px) for length in self._image.shape[:2])
        self.corners = [(y, x) for y in rows for x in columns]
        self._left = len(self.corners)
        weight = window_weight(size_px)
        self._weight = np.outer(weight, weight)
        self._total = np.outer(
            _total_weight(rows, weight, self._image.shape[0]), _total_weight(columns, weight, self._image.shape[1])
        )
        self._sum = np.zeros(self._image.shape[:2], np.float32)

    @property
    def finished(self) -> bool:
        return self._left == 0

    def window(self, y: int, x: int) -> np.ndarray:
        return self._image[y : y + self._size_px, x : x + self._size_px]

    def add(self, y: int, x: int, logits: np.ndarray) -> None:
        self._sum[y : y + self._size_px, x : x + self._size_px] += self._weight * logits
        self._left -= 1

    def probability(self) -> np.ndarray:
        logits = torch.from_numpy(self._sum / self._total)
        probability: np.ndarray = torch.sigmoid(logits)[: self._height, : self._width].numpy()
        return probability


def _logits(segmenter: TumourModel, windows: list[np.ndarray], batch_size: int) -> np.ndarray:
    """Return (n, S, S) float32 for n windows, computed in a batch of ``batch_size``."""
    batch = np.zeros((batch_size, *windows[0].shape), np.uint8)
    batch[: len(windows)] = windows
    with torch.inference_mode():
        logits: np.ndarray = segmenter.tumour_logits(torch.from_numpy(batch)).float().cpu().numpy()
    return logits[: len(windows)]


def _starts(length: int, size_px: int, overlap_px: int) -> list[int]:
    """Return evenly spread starts of windows that cover ``length`` and share at least ``overlap_px``."""
    steps = -(-(length - size_px) // (size_px - overlap_px))
    starts: list[int] = np.linspace(0, length - size_px, steps + 1).astype(int).tolist()
    return starts


def _total_weight(starts: list[int], weight: np.ndarray, length: int) -> np.ndarray:
    total = np.zeros(length, np.float32)
    for start in starts:
        total[start : start + len(weight)] += weight
    return total


def _groups(windows: Iterator[tuple[_Canvas, int, int]], batch_size: int) -> Iterator[list[tuple[_Canvas, int, int]]]:
    group = []
    for window in windows:
        group.append(window)
        if len(group) == batch_size:
            yield group
            group = []
    if group:
        yield group
