"""Resampling by area: every output pixel is the mean of what lies under it.

Shapes: H, W = rows and columns of the source in pixels, h, w = those of the output, C = channels. Source pixel k
covers the interval k … k + 1; the output's pixels are the cells between neighbouring edges.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse


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
