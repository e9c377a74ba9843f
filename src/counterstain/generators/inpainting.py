"""Redrawing instances inside a real image: what is redrawn, and what a denoiser is shown of the rest.

A denoiser that was trained for inpainting is shown the surroundings that are kept (the extra channels of Rombach et al.
2022); any other is kept to them by its sampler. The original pixels are put back afterwards, so that the background
equals the original's byte for byte.

Shapes: B = batch, z = latent channels, h, w = rows and columns of the latents, H, W = of the image in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from counterstain.taxonomy import BACKGROUND

BLANK = 128  # mid-grey, 0 as a network's input
Encode = Callable[[Tensor], Tensor]  # images (B, H, W, 3) uint8 -> latents (B, z, h, w)


def dilated(redraw: Tensor, dilation_px: int) -> Tensor:
    """Widen what is redrawn, (B, H, W) bool, by a square of so many pixels to each side."""
    wide = functional.max_pool2d(redraw[:, None].float(), 2 * dilation_px + 1, stride=1, padding=dilation_px)
    return wide[:, 0] > 0


def latent_redraw_mask(redraw: Tensor, factor: int) -> Tensor:
    """Mark each latent under which any pixel is redrawn: (B, H, W) bool -> (B, 1, h, w) float of 0 and 1."""
    return functional.max_pool2d(redraw[:, None].float(), factor)


def surroundings(encode: Encode, images: Tensor, redraw: Tensor, factor: int) -> Tensor:
    """Return the channels that show what is kept of images (B, H, W, 3) uint8 outside ``redraw`` (B, H, W) bool.

    They are (B, z + 1, h, w): latents of the kept pixels, 0 where anything is redrawn; then 1 where anything is.
    The pixels to be redrawn are blanked before encoding: an encoder sees beyond a latent's own pixels, and the old
    stain would reach the latents around an instance.
    """
    blanked = torch.where(redraw[..., None], BLANK, images).to(torch.uint8)
    mask = latent_redraw_mask(redraw, factor)
    return torch.cat([encode(blanked) * (1 - mask), mask], dim=1)


def draw_redrawn(instances: Tensor, share: float, widest_px: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Choose what training samples have to redraw, (B, H, W) bool: some of their instances, or all of the image.

    ``instances`` (B, H, W) are integers, 0 = background, and widened by 0 to ``widest_px`` pixels. Of the ``share`` of
    samples that redraw instances half redraw all, half each one with chance 1/2; the others, and those without an
    instance, redraw the whole image, which is plain diffusion. Each sample has a generator of its own.
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
