"""What a generator is shown: one-hot labels, instance edges, nuclei of a real patch, what is kept around instances.

A label mask does not say where nuclei lie, so a denoiser has to invent them; what it invents is paler and less regular
than tissue, and a segmenter learns that. Where subtypes differ by a stain, relabelling an instance leaves its nuclei
where they are, and haematoxylin shows them. How strong haematoxylin is, and what of another stain is mistaken for it,
would tell the old subtype; so the map holds differences to the surroundings alone, in units of their spread or, where
nuclei are as dark under any stain, in optical density. It does not suit subtypes that the architecture of the tissue
tells apart: the old one would show.

Where instances are redrawn inside a real image, a denoiser that was trained for it is shown the surroundings that are
kept (the extra channels of Rombach et al. 2022); any other is kept to them by its sampler. The original pixels are put
back afterwards, so that the background equals the original's byte for byte.

Shapes: B = batch, L = labels (background and subtypes), S = length of a style vector, z = latent channels, f = pixels
of a latent's edge, h, w = rows and columns of the latents, H, W = of the image in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from counterstain.data.stains import unmixing
from counterstain.generators.diffusion_config import NUCLEUS_UM, CounterstainConfig, Shrinking
from counterstain.seeding import torch_generator
from counterstain.taxonomy import BACKGROUND, IGNORE

BLEED = 0.1  # of the other stain's amount is read as haematoxylin
SATURATION = 2.0  # amount of the other stain, in optical density, that hides half of the haematoxylin under it
HIDDEN = 0.3  # amount of the other stain, in optical density, from which on haematoxylin is filled in
STEEPNESS = 4  # of the step between what is seen and what is filled in
LEAST_SEEN = 1e-3
NOISE_UM, FILL_UM = 0.5, 2.5  # standard deviations: noise of pixels, and as far as from a membrane to what lies beside
SPREAD_WIDTH = 4.0  # the spread is taken over so many times the width of the mean
FLAT = 0.02  # added to the spread, in optical density: noise of empty glass is no structure
TYPICAL = 0.5  # difference of nuclei to their surroundings, in optical density
FURTHEST = 3.0  # in units of the spread, or of what is typical
GAUSSIAN_WIDTHS = 3.0  # radius of a kernel in standard deviations

BLANK = 128  # mid-grey, 0 as a network's input
Encode = Callable[[Tensor], Tensor]  # images (B, H, W, 3) uint8 -> latents (B, z, h, w)
Place = tuple[int, int, int]  # of a window: number of the sample, first row, first column


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a denoiser is shown beside the noisy latents; None = a part that the network is not shown."""

    labels: Tensor  # (B, L, h, w)
    nuclei: Tensor | None = None  # (B, f² + 1, h, w)
    context: Tensor | None = None  # (B, z + 1, h, w)
    style: Tensor | None = None  # (B, S)

    def cat(self) -> Tensor:
        """Return the parts that have a place in the image as channels, (B, C, h, w)."""
        return torch.cat([part for part in (self.labels, self.nuclei, self.context) if part is not None], dim=1)

    def without_labels(self) -> Condition:
        """Return the same condition with all labels 0."""
        return replace(self, labels=torch.zeros_like(self.labels))

    def followed_by(self, other: Condition) -> Condition:
        """Append the samples of another condition of the same network."""
        return Condition(**{name: torch.cat([part, getattr(other, name)]) for name, part in self._given().items()})

    def cut(self, places: Sequence[Place], height: int, width: int) -> Condition:
        """Return windows of a size as samples, each with the style of the sample that it is cut from."""
        return Condition(
            **{
                name: part[[sample for sample, _, _ in places]] if name == "style" else cut(part, places, height, width)
                for name, part in self._given().items()
            }
        )

    def _given(self) -> dict[str, Tensor]:
        return {name: part for name, part in vars(self).items() if part is not None}


def cut(plane: Tensor, places: Sequence[Place], height: int, width: int) -> Tensor:
    """Cut windows out of (B, C, H, W), one for each place."""
    return torch.stack([plane[b, :, y : y + height, x : x + width] for b, y, x in places])


def one_hot(label_masks: Tensor, num_labels: int) -> Tensor:
    """Turn labels, (B, H, W) uint8, into (B, L, H, W) float; ignored pixels count as background."""
    labels = torch.where(label_masks == IGNORE, BACKGROUND, label_masks).long()
    return functional.one_hot(labels, num_labels).movedim(-1, 1).float()


def edges(instances: Tensor) -> Tensor:
    """Mark the pixels of (B, H, W) that have a neighbour (up, down, left, right) of another instance.

    The instance-edge channel of Park et al. 2019, after pix2pixHD: (B, 1, H, W) float of 0 and 1.
    """
    across = functional.pad(instances[:, :, 1:] != instances[:, :, :-1], (1, 1))
    down = functional.pad(instances[:, 1:] != instances[:, :-1], (0, 0, 1, 1))
    return (across[:, :, 1:] | across[:, :, :-1] | down[:, 1:] | down[:, :-1])[:, None].float()


def shrink(condition: Tensor, factor: int, how: Shrinking) -> Tensor:
    """Bring a condition, (B, L, H, W), to the size of the latents.

    ``area`` gives the share of each label under a latent, ``bilinear`` looks at the four pixels in its middle alone.
    """
    if how == "area" or factor == 1:
        return functional.avg_pool2d(condition, factor)
    return functional.interpolate(condition, scale_factor=1 / factor, mode="bilinear", align_corners=False)


def kept_samples(batch: dict[str, Tensor], seed: int, what: str, dropout: float) -> Tensor:
    """Choose which samples of a training batch are shown something, (B,) float of 0 and 1."""
    generators = [torch_generator(seed, what, int(batch["step"]), place) for place in batch["position"].tolist()]
    return torch.stack([torch.rand((), generator=g) >= dropout for g in generators]).float()


def nuclei_channels(factor: int) -> int:
    """Return how many channels of a condition show nuclei."""
    return factor**2 + 1


def nuclei_shown(images: Tensor | None, config: CounterstainConfig, factor: int, like: Tensor) -> Tensor:
    """Return what a condition shows of the nuclei of images (B, H, W, 3) uint8, (B, f² + 1, h, w).

    The map is brought to the latents' size without loss, and the last channel is 1; without images all is 0, in the
    size of ``like`` (B, any, h, w).
    """
    if images is None:
        return like.new_zeros(len(like), nuclei_channels(factor), *like.shape[2:])
    blocks = functional.pixel_unshuffle(counterstain_map(images, config), factor)
    return torch.cat([blocks, torch.ones_like(blocks[:, :1])], dim=1)


def counterstain_map(images: Tensor, config: CounterstainConfig) -> Tensor:
    """Read the nuclei off images (B, H, W, 3) uint8; ``config`` needs ``local_px``.

    Haematoxylin is unmixed from the other stain and a residual with the colours of Ruifrok & Johnston (2001). Where the
    other stain is strong the law of absorption fails, and some of it is left in what is unmixed; this is taken off, or
    what is hidden is filled in from around, weighted by how much of it is seen (normalised convolution, Knutsson &
    Westin 1993). Of the rest the local mean is taken off; for ``structure`` the difference is divided by its local
    standard deviation.
    The result, (B, 1, H, W) float, -1..1, is positive where there is more haematoxylin than around.
    """
    if config.local_px is None:
        raise ValueError("local_px depends on the scale: use CounterstainConfig.at")
    density = -torch.log(images.clamp(min=1).float() / 255)
    amounts = torch.from_numpy(unmixing(config.other_stain)[:, :2]).float()  # (3, 2)
    unmixed = (density @ amounts.to(images.device)).movedim(-1, 1)
    other = unmixed[:, 1:].clamp(min=0)
    amount = unmixed[:, :1] - BLEED * other
    if config.hidden == "filled":
        um = config.local_px / NUCLEUS_UM
        seen = 1 / (1 + (_smooth(other, NOISE_UM * um) / HIDDEN).pow(STEEPNESS)) + LEAST_SEEN
        amount = seen * amount + (1 - seen) * _smooth(amount, FILL_UM * um, seen)
        difference = amount - _smooth(amount, config.local_px, seen)
    else:
        amount = amount / (1 + (other / SATURATION).square())
        difference = amount - _smooth(amount, config.local_px)
    unit: Tensor | float = TYPICAL
    if config.shows == "structure":
        unit = _smooth(difference.square(), SPREAD_WIDTH * config.local_px).sqrt() + FLAT
    return (difference / unit).clamp(-FURTHEST, FURTHEST) / FURTHEST


def _smooth(maps: Tensor, sd_px: float, weights: Tensor | None = None) -> Tensor:
    """Convolve (B, 1, H, W) with a Gaussian; pixels count by their weights, those outside the image not at all."""
    if weights is None:
        return _blurred(maps, sd_px) / _blurred(torch.ones_like(maps[:1]), sd_px)
    return _blurred(maps * weights, sd_px) / _blurred(weights, sd_px)


def _blurred(maps: Tensor, sd_px: float) -> Tensor:
    radius = round(GAUSSIAN_WIDTHS * sd_px)
    kernel = torch.exp(-torch.arange(-radius, radius + 1, device=maps.device).float().square() / (2 * sd_px**2))
    kernel /= kernel.sum()
    down = functional.conv2d(maps, kernel[None, None, :, None], padding=(radius, 0))
    return functional.conv2d(down, kernel[None, None, None, :], padding=(0, radius))


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


def to_tensor(images: Tensor) -> Tensor:
    """Turn images, (B, H, W, 3) uint8, into (B, 3, H, W) float, -1..1."""
    return images.movedim(-1, 1).float() / 127.5 - 1.0


def to_images(tensor: Tensor) -> np.ndarray:
    """Turn (B, 3, H, W) float, -1..1, into (B, H, W, 3) uint8."""
    levels = ((tensor.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return levels.movedim(1, -1).cpu().contiguous().numpy()
