"""What a generator is shown: one-hot labels, instance edges, images as tensors.

Shapes: B = batch, L = labels (background and subtypes), H, W = rows and columns in pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from counterstain.generators.diffusion_config import Shrinking
from counterstain.seeding import torch_generator
from counterstain.taxonomy import BACKGROUND, IGNORE


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
