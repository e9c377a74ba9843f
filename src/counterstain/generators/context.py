"""What a denoiser that was trained for inpainting sees of the kept surroundings: masked latents and the redraw mask.

Shapes: B = batch, z = latent channels, h, w = rows and columns of the latents, H, W = of the image in pixels.
The pixels to be redrawn are blanked before encoding: an encoder sees beyond a latent's own pixels, and the old stain
would reach the latents around an instance. Source: the extra channels of inpainting in Rombach et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from counterstain.generators.inpainting import dilated, latent_redraw_mask
from counterstain.taxonomy import BACKGROUND

BLANK = 128  # mid-grey, 0 as a network's input
Encode = Callable[[Tensor], Tensor]  # images (B, H, W, 3) uint8 -> latents (B, z, h, w)


def surroundings(encode: Encode, images: Tensor, redraw: Tensor, factor: int) -> Tensor:
    """Return the channels that show what is kept.

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
