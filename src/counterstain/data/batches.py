"""Batches of patches by step number, as the training loop asks for them.

Shapes: B = batch, H, W = rows and columns of a patch in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from counterstain.data.patches import Patch

if TYPE_CHECKING:
    from torch import Tensor


class PatchSource(Protocol):
    """Anything that gives the patch of a number: a sampler, a synthetic set, a mixture."""

    def __getitem__(self, index: int, /) -> Patch: ...


def stack(patches: Sequence[Patch]) -> dict[str, Tensor]:
    """Stack patches to ``images`` (B, H, W, 3) uint8, ``labels`` (B, H, W) uint8, ``instances`` (B, H, W) int32."""
    import torch

    return {
        "images": torch.from_numpy(np.stack([p.image for p in patches])),
        "labels": torch.from_numpy(np.stack([p.label_mask for p in patches])),
        "instances": torch.from_numpy(np.stack([p.instances for p in patches])),
    }


@dataclass(frozen=True, slots=True)
class PatchBatches:
    """The function step -> batch, where step s holds the patches s·B … (s+1)·B - 1 of the source."""

    source: PatchSource
    batch_size: int

    def __call__(self, step: int) -> dict[str, Tensor]:
        """Return the whole batch of a step."""
        return self.part(step, 0, self.batch_size)

    def part(self, step: int, start: int, stop: int) -> dict[str, Tensor]:
        """Return the patches at the places start … stop - 1 of a step's batch, preparing no others."""
        first = step * self.batch_size
        return stack([self.source[i] for i in range(first + start, first + stop)])


def patch_batches(source: PatchSource, batch_size: int) -> PatchBatches:
    """Return the batches of a source."""
    return PatchBatches(source, batch_size)
