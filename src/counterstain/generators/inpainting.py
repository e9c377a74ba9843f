"""Redrawing instances inside a real image: blended latents while drawing, the original pixels put back after it.

Shapes: B = batch, z = latent channels, h, w = rows and columns of the latents, H, W = of the image in pixels.
Source: latent blending after Rombach et al. 2022 and Avrahami et al. 2023; the composite is ours, so that the
background is the original's byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from counterstain.generators.drawing_config import InpaintingConfig
from counterstain.generators.samplers import fresh_noise


def dilated(redraw: Tensor, dilation_px: int) -> Tensor:
    """Widen what is redrawn, (B, H, W) bool, by a square of so many pixels to each side."""
    if not dilation_px:
        return redraw
    wide = functional.max_pool2d(redraw[:, None].float(), 2 * dilation_px + 1, stride=1, padding=dilation_px)
    return wide[:, 0] > 0


def latent_redraw_mask(redraw: Tensor, factor: int, dilation_px: int) -> Tensor:
    """Mark each latent under which any pixel is redrawn.

    Parameters
    ----------
    redraw : (B, H, W) bool

    Returns
    -------
    (B, 1, h, w) float tensor of 0 and 1
    """
    return functional.max_pool2d(dilated(redraw, dilation_px)[:, None].float(), factor)


def step_walk(steps: int, config: InpaintingConfig) -> list[int]:
    """Return the order in which steps are taken, for :func:`counterstain.generators.samplers.sample`.

    With ``resamples`` r and ``jump_length`` j, after every j steps the latents are noised back by j steps, r - 1
    times, and these are taken again, as in the published schedule of RePaint (Lugmayr et al. 2022, appendix B).

    Examples
    --------
    >>> step_walk(4, InpaintingConfig(resamples=2, jump_length=2))
    [0, 1, 2, 3, 1, 2, 3, 4]
    """
    first = steps - max(1, round(steps * config.strength)) if config.start == "original" else 0
    r, j = config.resamples, config.jump_length
    jumps_left = {steps - 1 - left: r - 1 for left in range(0, steps - first - j, j)}
    walk = [first]
    while walk[-1] < steps:
        walk.append(walk[-1] + 1)
        if jumps_left.get(walk[-1], 0):
            jumps_left[walk[-1]] -= 1
            walk.append(walk[-1] - j)
    return walk


class KnownLatents:
    """Puts the known latents, noised to the step's level, back outside the mask.

    Parameters
    ----------
    known : (B, z, h, w)
        Latents of the real images.
    mask : (B, 1, h, w)
        1 = redrawn.
    generators : one per sample
        Of the known latents' noise, which stays the same until :meth:`renoise`.
    scheduler
        Of the same settings as the one that draws.
    """

    def __init__(self, known: Tensor, mask: Tensor, generators: Sequence[torch.Generator], scheduler: Any) -> None:
        self._known, self._mask, self._generators, self._scheduler = known, mask, generators, scheduler
        self.renoise()

    def renoise(self) -> None:
        """Draw new noise: with the old one, taking steps again would not see more of what is kept."""
        self._noise = fresh_noise(self._known.shape[1:], self._generators).to(self._known)

    def __call__(self, latents: Tensor, timestep: int | None) -> Tensor:
        """Blend latents (B, z, h, w) that are at a timestep, None = clean."""
        kept = self._known
        if timestep is not None:
            steps = torch.full((len(kept),), timestep, device=kept.device)
            kept = self._scheduler.add_noise(kept, self._noise, steps)
        return self._mask * latents + (1 - self._mask) * kept


def composite(drawn: np.ndarray, images: np.ndarray, redraw: np.ndarray) -> np.ndarray:
    """Take the drawn pixels where ``redraw``, (B, H, W) bool, and the original ones elsewhere."""
    return np.where(redraw[..., None], drawn, images)
