"""Redrawing instances inside a real image: blended latents while drawing, the original pixels put back after it.

Shapes: B = batch, z = latent channels, h, w = rows and columns of the latents, H, W = of the image in pixels.
Source: latent blending after Rombach et al. 2022 and Avrahami et al. 2023; the composite is ours, so that the
background is the original's byte for byte.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from counterstain.config import Config
from counterstain.generators.samplers import Blend


class InpaintingConfig(Config):
    """What is redrawn and what is kept."""

    dilation_px: Annotated[int, Field(ge=0, le=64)] = 0
    """How far the latents are redrawn beyond the instances, against the pull of the old stain at their borders."""
    composite: bool = True
    """Put the original pixels back outside the instances; False is what the authors' code does."""


def latent_redraw_mask(redraw: Tensor, factor: int, dilation_px: int) -> Tensor:
    """Mark each latent under which any pixel is redrawn.

    Parameters
    ----------
    redraw : (B, H, W) bool

    Returns
    -------
    (B, 1, h, w) float tensor of 0 and 1
    """
    wide = redraw[:, None].float()
    if dilation_px:
        wide = functional.max_pool2d(wide, 2 * dilation_px + 1, stride=1, padding=dilation_px)
    return functional.max_pool2d(wide, factor)


def blend_known(known: Tensor, mask: Tensor, noise: Tensor, scheduler: Any) -> Blend:
    """Return a function that puts the known latents, noised to the step's level, back outside the mask.

    Parameters
    ----------
    known : (B, z, h, w)
        Latents of the real images.
    mask : (B, 1, h, w)
        1 = redrawn.
    noise : (B, z, h, w)
        The noise of the known latents, the same at all steps.
    """

    def blend(latents: Tensor, timestep: int | None) -> Tensor:
        if timestep is None:
            kept = known
        else:
            steps = torch.full((len(known),), timestep, device=known.device)
            kept = scheduler.add_noise(known, noise, steps)
        return mask * latents + (1 - mask) * kept

    return blend


def composite(drawn: np.ndarray, images: np.ndarray, redraw: np.ndarray) -> np.ndarray:
    """Take the drawn pixels where ``redraw``, (B, H, W) bool, and the original ones elsewhere."""
    return np.where(redraw[..., None], drawn, images)
