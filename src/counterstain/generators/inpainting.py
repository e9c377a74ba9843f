"""Redrawing instances inside a real image: blended latents while drawing, the original pixels put back afterwards.

Latents are blended after Rombach et al. 2022 and Avrahami et al. 2023; the composite is ours, so that the background
equals the original's byte for byte. A denoiser that was trained for inpainting is also shown the surroundings that are
kept (the extra channels of Rombach et al. 2022).

Shapes: B = batch, z = latent channels, h, w = rows and columns of the latents, H, W = of the image in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from counterstain.generators.diffusion_config import InpaintingConfig
from counterstain.generators.samplers import fresh_noise
from counterstain.taxonomy import BACKGROUND

BLANK = 128  # mid-grey, 0 as a network's input
Encode = Callable[[Tensor], Tensor]  # images (B, H, W, 3) uint8 -> latents (B, z, h, w)


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


def surroundings(encode: Encode, images: Tensor, redraw: Tensor, factor: int) -> Tensor:
    """Return the channels that show what is kept.

    The pixels to be redrawn are blanked before encoding: an encoder sees beyond a latent's own pixels, and the old
    stain would reach the latents around an instance.

    Parameters
    ----------
    encode : callable
    images : (B, H, W, 3) uint8
    redraw : (B, H, W) bool

    Returns
    -------
    (B, z + 1, h, w) float tensor
        Latents of the kept pixels, 0 where anything is redrawn; then 1 where anything is redrawn.
    """
    blanked = torch.where(redraw[..., None], BLANK, images).to(torch.uint8)
    mask = latent_redraw_mask(redraw, factor, 0)
    return torch.cat([encode(blanked) * (1 - mask), mask], dim=1)


def draw_redrawn(instances: Tensor, share: float, widest_px: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Choose what a training sample has to redraw: some of its instances, or all of the image.

    Parameters
    ----------
    instances : (B, H, W) integer tensor
        0 = background.
    share : float
        Share of the samples that redraw instances: half of them all instances, half of them each one with chance 1/2;
        the others, and those without an instance, redraw the whole image, which is plain diffusion.
    widest_px : int
        Instances are widened by 0 to so many pixels.
    generators : one per sample

    Returns
    -------
    (B, H, W) bool tensor
    """
    chosen = [_redrawn(map_, share, widest_px, g) for map_, g in zip(instances, generators, strict=True)]
    return torch.stack(chosen)


def _redrawn(instances: Tensor, share: float, widest_px: int, generator: torch.Generator) -> Tensor:
    use, all_of_them = torch.rand(2, generator=generator).tolist()
    widened = int(torch.randint(widest_px + 1, (), generator=generator))
    ids = [i for i in torch.unique(instances).tolist() if i != BACKGROUND]
    picked = torch.rand(len(ids), generator=generator)
    chosen = [i for i, chance in zip(ids, picked.tolist(), strict=True) if all_of_them < 0.5 or chance < 0.5]
    if use >= share or not chosen:
        return torch.ones_like(instances, dtype=torch.bool)
    redrawn = torch.isin(instances, torch.tensor(chosen, device=instances.device, dtype=instances.dtype))
    return dilated(redrawn[None], widened)[0]
