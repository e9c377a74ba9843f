"""Images larger than those a network was trained on: overlapping windows whose results are blended.

At each step the denoiser looks at every window of the latents; where windows overlap, its predictions are averaged
with weights that fall smoothly to the windows' borders (Bar-Tal et al. 2023, MultiDiffusion, equation 5; smooth weights
are ours: the published ones are all equal, and leave lines where a window ends). The steps of all samplers here are
linear in the prediction, so averaging predictions is averaging steps.

Shapes: B = batch, z = latent channels, C = condition channels, h, w = rows and columns of the latents, n = windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from counterstain.generators.conditioning import Condition, cut
from counterstain.generators.samplers import Denoiser

ConditionedDenoiser = Callable[[Tensor, int, Condition], Tensor]  # latents, timestep, condition -> prediction


@dataclass(frozen=True)
class WindowGrid:
    """Windows over a plane, all of one size; ``rows`` and ``columns`` are the windows' first ones."""

    height: int
    width: int
    window_height: int
    window_width: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def over(cls, height: int, width: int, window: int, overlap: int) -> WindowGrid:
        """Cover a plane with windows of ``window`` (less where the plane is smaller) that share ``overlap`` or more."""
        high, wide = min(window, height), min(window, width)
        return cls(height, width, high, wide, _starts(height, high, overlap), _starts(width, wide, overlap))

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def places(self) -> list[tuple[int, int]]:
        """First row and column of every window."""
        return [(y, x) for y in self.rows for x in self.columns]

    def span(self, y: int, x: int, scale: int = 1) -> tuple[slice, slice]:
        """Return the rows and columns of the window that begins at y, x, in units ``scale`` times as small."""
        height, width = self.window_height * scale, self.window_width * scale
        return slice(y * scale, y * scale + height), slice(x * scale, x * scale + width)

    def weights(self, scale: int = 1) -> Tensor:
        """Return each window's weights, (n, rows, columns) double, in units ``scale`` times as small.

        Over every point they sum to 1.
        """
        down = _weights(self.height, self.window_height, self.rows, scale)
        across = _weights(self.width, self.window_width, self.columns, scale)
        both = down[:, None, :, None] * across[None, :, None, :]
        return torch.from_numpy(both.reshape(len(self), *both.shape[2:]))


def windowed(denoise: ConditionedDenoiser, condition: Condition, grid: WindowGrid, batch: int) -> Denoiser:
    """Return a denoiser of large latents out of one of windows; ``condition`` is that of the whole latents.

    The network always sees ``batch`` windows at once: the last batch is filled up by repetition, so that the result
    does not depend on how many windows there are.
    """
    size = grid.window_height, grid.window_width
    weights = grid.weights().float().to(condition.labels.device)
    pieces = [(b, y, x) for b in range(len(condition.labels)) for y, x in grid.places]

    def predict(latents: Tensor, timestep: int) -> Tensor:
        blended = torch.zeros_like(latents)
        for first in range(0, len(pieces), batch):
            places = [pieces[min(k, len(pieces) - 1)] for k in range(first, first + batch)]
            predicted = denoise(cut(latents, places, *size), timestep, condition.cut(places, *size))
            for k, (b, y, x) in enumerate(places[: len(pieces) - first]):
                rows, columns = grid.span(y, x)
                blended[b, :, rows, columns] += weights[(first + k) % len(grid)] * predicted[k]
        return blended

    return predict


def in_tiles(
    apply: Callable[[Tensor], Tensor], plane: Tensor, grid: WindowGrid, *, reads: int = 1, writes: int = 1, blend: bool
) -> Tensor:
    """Apply a network to a large plane tile by tile; the memory it needs is that of one tile, whatever the plane.

    One latent stands for ``reads`` rows of ``plane``, (B, C, grid height · reads, grid width · reads), and ``writes``
    rows of the result. ``blend`` averages overlaps with smooth weights; False where tiles agree on them anyway.
    """
    if len(grid) == 1:
        return apply(plane)
    weights = grid.weights(writes).to(plane.device) if blend else None
    whole: Tensor | None = None
    for b in range(len(plane)):
        for i, (y, x) in enumerate(grid.places):
            rows, columns = grid.span(y, x, reads)
            part = apply(plane[b : b + 1, :, rows, columns])
            if whole is None:
                whole = part.new_zeros((len(plane), part.shape[1], grid.height * writes, grid.width * writes))
            rows, columns = grid.span(y, x, writes)
            if weights is None:
                whole[b, :, rows, columns] = part[0]
            else:
                whole[b, :, rows, columns] += weights[i].to(part) * part[0]
    assert whole is not None
    return whole


def extended(plane: np.ndarray, smallest: int, multiple: int, *, by_edges: bool = False) -> np.ndarray:
    """Extend (H, W, …) below and to the right to at least ``smallest`` and to a multiple of ``multiple``.

    New pixels are 0, or the nearest ones with ``by_edges``.
    """
    missing = [max(smallest, math.ceil(size / multiple) * multiple) - size for size in plane.shape[:2]]
    margins = [(0, missing[0]), (0, missing[1]), *[(0, 0)] * (plane.ndim - 2)]
    return np.pad(plane, margins, mode="edge" if by_edges else "constant") if any(missing) else plane


def _starts(length: int, window: int, overlap: int) -> tuple[int, ...]:
    steps = math.ceil((length - window) / max(1, window - min(overlap, window - 1)))
    return tuple(round(i * (length - window) / max(1, steps)) for i in range(steps + 1))


def _weights(length: int, window: int, starts: tuple[int, ...], scale: int) -> np.ndarray:
    """Return weights along one axis, (windows, window · scale), that sum to 1 over every point."""
    bump = np.sin(np.pi * (np.arange(window * scale) + 0.5) / (window * scale)) ** 2
    total = np.zeros(length * scale)
    spans = [slice(start * scale, (start + window) * scale) for start in starts]
    for span in spans:
        total[span] += bump
    return np.stack([bump / total[span] for span in spans])
