"""What a generator is shown: one-hot labels, instance edges, images as tensors.

Shapes: B = batch, L = labels (background and subtypes), S = length of a style vector, z = latent channels, f = pixels
of a latent's edge, h, w = rows and columns of the latents, H, W = of the image in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from counterstain.generators.diffusion_config import Shrinking
from counterstain.seeding import torch_generator
from counterstain.taxonomy import BACKGROUND, IGNORE


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
        """Take the labels out and leave what else is in it."""
        return replace(self, labels=torch.zeros_like(self.labels))

    def followed_by(self, other: Condition) -> Condition:
        """Append the samples of another condition of the same network."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__}
        return Condition(**{name: torch.cat(pair) for name, pair in pairs.items() if pair[0] is not None})

    def cut(self, places: Iterable[tuple[int, int, int]], height: int, width: int) -> Condition:
        """Return windows of a size, one for each place: number of the sample, first row, first column."""
        wanted = list(places)
        planes = {"labels": self.labels, "nuclei": self.nuclei, "context": self.context}
        windows = {name: cut(plane, wanted, height, width) for name, plane in planes.items() if plane is not None}
        style = None if self.style is None else self.style[[sample for sample, _, _ in wanted]]
        return Condition(**windows, style=style)


def cut(plane: Tensor, places: Sequence[tuple[int, int, int]], height: int, width: int) -> Tensor:
    """Cut windows out of (B, C, h, w), one for each place: number of the sample, first row, first column."""
    return torch.stack([plane[b, :, y : y + height, x : x + width] for b, y, x in places])


def one_hot(label_masks: Tensor, num_labels: int) -> Tensor:
    """Turn labels, (B, H, W) uint8, into (B, L, H, W) float; ignored pixels count as background."""
    labels = torch.where(label_masks == IGNORE, BACKGROUND, label_masks).long()
    return functional.one_hot(labels, num_labels).movedim(-1, 1).float()


def edges(instances: Tensor) -> Tensor:
    """Mark pixels that have a neighbour (up, down, left, right) of another instance.

    The instance-edge channel of Park et al. 2019, after pix2pixHD.

    Parameters
    ----------
    instances : (B, H, W) integer tensor

    Returns
    -------
    (B, 1, H, W) float tensor of 0 and 1
    """
    edge = torch.zeros(instances.shape, dtype=torch.bool, device=instances.device)
    across = instances[:, :, 1:] != instances[:, :, :-1]
    down = instances[:, 1:] != instances[:, :-1]
    edge[:, :, 1:] |= across
    edge[:, :, :-1] |= across
    edge[:, 1:] |= down
    edge[:, :-1] |= down
    return edge[:, None].float()


def shrink(condition: Tensor, factor: int, how: Shrinking) -> Tensor:
    """Bring a condition, (B, L, H, W), to the size of the latents.

    ``area`` gives the share of each label under a latent, ``bilinear`` is what the authors' code does.
    """
    if factor == 1:
        return condition
    if how == "area":
        return functional.avg_pool2d(condition, factor)
    return functional.interpolate(condition, scale_factor=1 / factor, mode="bilinear", align_corners=False)


def kept_samples(batch: dict[str, Tensor], seed: int, what: str, dropout: float) -> Tensor:
    """Choose which samples of a training batch are shown something, (B,) float of 0 and 1."""
    generators = [torch_generator(seed, what, int(batch["step"]), place) for place in batch["position"].tolist()]
    return torch.stack([torch.rand((), generator=g) >= dropout for g in generators]).float()


def to_tensor(images: Tensor) -> Tensor:
    """Turn images, (B, H, W, 3) uint8, into (B, 3, H, W) float, -1..1."""
    return images.movedim(-1, 1).float() / 127.5 - 1.0


def to_images(tensor: Tensor) -> np.ndarray:
    """Turn (B, 3, H, W) float, -1..1, into (B, H, W, 3) uint8."""
    levels = ((tensor.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return levels.movedim(1, -1).cpu().contiguous().numpy()
