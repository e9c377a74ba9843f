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
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from counterstain.data.stains import unmixing
from counterstain.generators.diffusion_config import NUCLEUS_UM, CounterstainConfig
from counterstain.generators.pipeline import nuclei_channels, nuclei_condition, nuclei_map
from counterstain.seeding import torch_generator
from counterstain.taxonomy import BACKGROUND

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


def edges(instances: Tensor) -> Tensor:
    """Mark the pixels of (B, H, W) that have a neighbour (up, down, left, right) of another instance.

    The instance-edge channel of Park et al. 2019, after pix2pixHD: (B, 1, H, W) float of 0 and 1.
    """
    across = functional.pad(instances[:, :, 1:] != instances[:, :, :-1], (1, 1))
    down = functional.pad(instances[:, 1:] != instances[:, :-1], (0, 0, 1, 1))
    return (across[:, :, 1:] | across[:, :, :-1] | down[:, 1:] | down[:, :-1])[:, None].float()


def kept_samples(batch: dict[str, Tensor], seed: int, what: str, dropout: float) -> Tensor:
    """Choose which samples of a training batch are shown something, (B,) float of 0 and 1."""
    generators = [torch_generator(seed, what, int(batch["step"]), place) for place in batch["position"].tolist()]
    return torch.stack([torch.rand((), generator=g) >= dropout for g in generators]).float()


def nuclei_shown(images: Tensor | None, config: CounterstainConfig, factor: int, like: Tensor) -> Tensor:
    """Return what a condition shows of the nuclei of images (B, H, W, 3) uint8, (B, f² + 1, h, w).

    The map is brought to the latents' size without loss, and the last channel is 1; without images all is 0, in the
    size of ``like`` (B, any, h, w).
    """
    if images is None:
        return like.new_zeros(len(like), nuclei_channels(factor), *like.shape[2:])
    return nuclei_condition(counterstain_map(images, config), factor)


def counterstain_map(images: Tensor, config: CounterstainConfig) -> Tensor:
    """Read the nuclei off images (B, H, W, 3) uint8, as (B, 1, H, W) float, -1..1; ``config`` needs ``local_px``."""
    settings = nuclei_settings(config)
    return nuclei_map(images, **settings | {"amounts": torch.tensor(settings["amounts"])})


def nuclei_settings(config: CounterstainConfig) -> dict[str, Any]:
    """Return the arguments of :func:`nuclei_map` as plain values."""
    if config.local_px is None:
        raise ValueError("local_px depends on the scale: use CounterstainConfig.at")
    amounts = unmixing(config.other_stain)[:, :2].tolist()
    shown = {"shows": config.shows, "hidden": config.hidden}
    return shown | {"amounts": amounts, "local_px": config.local_px, "um_px": config.local_px / NUCLEUS_UM}


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
