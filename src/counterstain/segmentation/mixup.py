"""Mixup: each patch of a batch is blended with another one, and the losses are blended alike.

Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from counterstain.seeding import numpy_generator
from counterstain.training import Batch, Batches


@dataclass(frozen=True, slots=True)
class MixupBatches:
    """Blended batches; a step's blend follows from the seed and the step alone."""

    batches: Batches
    alpha: float
    """Of the Beta(alpha, alpha) from which the share of the first patch is drawn, once for a batch."""
    seed: int

    def __call__(self, step: int) -> Batch:
        """Return a step's batch.

        Returns
        -------
        dict
            Beside what the batch has: ``mixed_labels`` (B, H, W) uint8, the labels of the other patches, and
            ``kept_share`` (B,) float, how much of an image is its own.
        """
        batch = self.batches(step)
        rng = numpy_generator(self.seed, "mixup", step)
        share = float(rng.beta(self.alpha, self.alpha))
        order = torch.from_numpy(rng.permutation(len(batch["images"])))
        images = batch["images"].float()
        blended = (share * images + (1 - share) * images[order]).round().to(torch.uint8)
        mixed = {"images": blended, "mixed_labels": batch["labels"][order]}
        return batch | mixed | {"kept_share": torch.full((len(images),), share)}
