"""The counterstain of a real patch as a map of its nuclei, so that a redrawn instance keeps them and changes its stain.

A label mask does not say where nuclei lie, so a denoiser has to invent them; what it invents is paler and less regular
than tissue, and a segmenter learns that. Where subtypes differ by a stain, relabelling an instance leaves its nuclei
where they are, and haematoxylin shows them. How strong haematoxylin is, and what of another stain is mistaken for it,
would tell the old subtype; so the map holds differences to the surroundings alone, in units of their spread or, where
nuclei are as dark under any stain, in optical density. It does not suit subtypes that the architecture of the tissue
tells apart: the old one would show.

Shapes: B = batch, H, W = rows and columns in pixels, h, w = rows and columns of the latents, f = H / h.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from counterstain.data.stains import unmixing
from counterstain.generators.diffusion_config import CounterstainConfig

BLEED = 0.1  # of the other stain's amount is read as haematoxylin
SATURATION = 2.0  # amount of the other stain, in optical density, that hides half of the haematoxylin under it
SPREAD_WIDTH = 4.0  # the spread is taken over so many times the width of the mean
FLAT = 0.02  # added to the spread, in optical density: noise of empty glass is no structure
TYPICAL = 0.5  # difference of nuclei to their surroundings, in optical density
FURTHEST = 3.0  # in units of the spread, or of what is typical
GAUSSIAN_WIDTHS = 3.0  # radius of a kernel in standard deviations


def channels(factor: int) -> int:
    """Return how many channels a condition gets."""
    return factor**2 + 1


def shown(maps: Tensor, factor: int) -> Tensor:
    """Bring maps (B, 1, H, W) to the latents' size without loss, and say that there is one: (B, f² + 1, h, w)."""
    blocks = functional.pixel_unshuffle(maps, factor)
    return torch.cat([blocks, torch.ones_like(blocks[:, :1])], dim=1)


def absent(batch: int, factor: int, like: Tensor) -> Tensor:
    """Return what :func:`shown` gives for samples without a map, (B, f² + 1, h, w) zeros of the size of ``like``."""
    return like.new_zeros(batch, channels(factor), *like.shape[2:])


def counterstain_map(images: Tensor, config: CounterstainConfig) -> Tensor:
    """Read the nuclei off images.

    Haematoxylin is unmixed from the other stain and a residual with the colours of Ruifrok & Johnston (2001). Where the
    other stain is strong the law of absorption fails, and some of it is left in what is unmixed; this is taken off. Of
    the rest the local mean is taken off; for ``structure`` the difference is divided by its local standard deviation.

    Parameters
    ----------
    images : (B, H, W, 3) uint8
    config : CounterstainConfig
        With ``local_px``.

    Returns
    -------
    (B, 1, H, W) float tensor
        -1..1, positive where there is more haematoxylin than around.
    """
    density = -torch.log(images.clamp(min=1).float() / 255)
    amounts = torch.from_numpy(unmixing(config.other_stain)[:, :2]).float()  # (3, 2)
    unmixed = (density @ amounts.to(images.device)).movedim(-1, 1)
    other = unmixed[:, 1:].clamp(min=0)
    amount = (unmixed[:, :1] - BLEED * other) / (1 + (other / SATURATION).square())
    if config.local_px is None:
        raise ValueError("local_px depends on the scale: use CounterstainConfig.at")
    difference = amount - _smooth(amount, config.local_px)
    if config.shows == "contrast":
        return (difference / TYPICAL).clamp(-FURTHEST, FURTHEST) / FURTHEST
    spread = _smooth(difference.square(), SPREAD_WIDTH * config.local_px).sqrt() + FLAT
    return (difference / spread).clamp(-FURTHEST, FURTHEST) / FURTHEST


def _smooth(maps: Tensor, sd_px: float) -> Tensor:
    """Convolve (B, 1, H, W) with a Gaussian; only pixels of the image count, so borders are no darker."""
    return _blurred(maps, sd_px) / _blurred(torch.ones_like(maps[:1]), sd_px)


def _blurred(maps: Tensor, sd_px: float) -> Tensor:
    radius = round(GAUSSIAN_WIDTHS * sd_px)
    kernel = torch.exp(-torch.arange(-radius, radius + 1, device=maps.device).float().square() / (2 * sd_px**2))
    kernel /= kernel.sum()
    down = functional.conv2d(maps, kernel[None, None, :, None], padding=(radius, 0))
    return functional.conv2d(down, kernel[None, None, None, :], padding=(0, radius))
