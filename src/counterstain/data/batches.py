"""Batches of patches by step number, as the training loop asks for them.

Shapes: B = batch, H, W = rows and columns of a patch in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from counterstain.data.patches import Patch


class PatchSource(Protocol):
    """Anything that gives the patch of a number: a sampler, a synthetic set, a mixture."""

    def __getitem__(self, index: int, /) -> Patch: ...


def stack(patches: Sequence[Patch]) -> dict[str, Tensor]:
    """Stack patches to ``images`` (B, H, W, 3) uint8, ``labels`` (B, H, W) uint8, ``instances`` (B, H, W) int32."""
    return {
        "images": torch.from_numpy(np.stack([p.image for p in patches])),
        "labels": torch.from_numpy(np.stack([p.label_mask for p in patches])),
        "instances": torch.from_numpy(np.stack([p.instances for p in patches])),
    }


def patch_batches(source: PatchSource, batch_size: int) -> Callable[[int], dict[str, Tensor]]:
    """Return the function step -> batch, where step s holds the patches s·B … (s+1)·B - 1 of the source."""

    def batch(step: int) -> dict[str, Tensor]:
        return stack([source[i] for i in range(step * batch_size, (step + 1) * batch_size)])

    return batch
