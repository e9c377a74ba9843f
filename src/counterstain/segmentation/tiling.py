"""How a large image is cut into tiles so that no pixel's probability depends on the tile that it was computed in.

All tiles take their windows from one grid over the whole image. A tile answers for the pixels all of whose windows it
holds; neighbouring tiles share the windows on their seam. Tiles, not the whole image, are in memory.
"""

from __future__ import annotations

from typing import NamedTuple

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
