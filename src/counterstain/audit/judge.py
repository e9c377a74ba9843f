"""The judge: a network that learns from real training patches which subtype each pixel shows.

It says what subtype a drawn instance looks like, and its inner activations are the features in which drawn and real
images are compared; so nothing has to be downloaded, and the features know the cohort's own stain.

Shapes: B = batch, H, W = rows and columns in pixels, L = labels (background and subtypes), d = number of features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import Tensor
from torch.nn import functional

from counterstain.audit.judge_config import JudgeConfig
from counterstain.checkpoints import CheckpointHeader, load_checkpoint
from counterstain.config import build_stored
from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.data.sampling import PatchBatches
from counterstain.devices import choose_device
from counterstain.taxonomy import BACKGROUND, IGNORE
from counterstain.training import Trainable, cosine, fit, fused_optimizers
from counterstain.training_run import TrainingRun

Device = Literal["auto", "cpu", "cuda"]
GREY_MEAN, GREY_SD = 0.5, 0.25
BATCH = 32
LEAST_AREA_PX = 32  # of an instance that the judge learns from as a whole


class Judge(Trainable):
    """A U-Net with one output per label.

    Parameters
    ----------
    config : JudgeConfig
    num_labels : int
        L.
    """

    def __init__(self, config: JudgeConfig, num_labels: int) -> None:
        super().__init__()
        self.config, self.num_labels = config, num_labels
        self.network = smp.Unet(
            config.encoder,
            encoder_weights=None,
            decoder_channels=list(config.decoder_channels),
            classes=num_labels,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 -> logits (B, L, H, W)."""
        logits: Tensor = self.network(_normalised(images))
        return logits

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 -> the mean activations of the encoder's two deepest scales, (B, d)."""
        scales: Sequence[Tensor] = self.network.encoder(_normalised(images))
        return torch.cat([scale.mean((2, 3)) for scale in scales[-2:]], dim=1)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy over all pixels that are not to be ignored, and over instances."""
        logits, labels = self(batch["images"]).float(), batch["labels"].long()
        of_pixels = functional.cross_entropy(logits, labels, ignore_index=IGNORE)
        if not self.config.instance_weight:
            return {"loss_pixels": of_pixels, "loss": of_pixels}
        of_instances = instance_loss(logits, labels, batch["instances"])
        loss = of_pixels + self.config.instance_weight * of_instances
        return {"loss_pixels": of_pixels, "loss_instances": of_instances, "loss": loss}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW."""
        config, fused = self.config, fused_optimizers(self.config.training)
        return [torch.optim.AdamW(self.parameters(), config.lr, weight_decay=config.weight_decay, fused=fused)]

    def learning_rate(self, step: int) -> float:
        """Rise along a line and fall along a cosine."""
        return cosine(step, self.config.training.steps) * min(1.0, (step + 1) / (self.config.warmup_steps + 1))


def instance_loss(logits: Tensor, labels: Tensor, instances: Tensor) -> Tensor:
    """Cross-entropy of the subtypes of instances; an instance's logits are the mean over its pixels.

    Parameters
    ----------
    logits : (B, L, H, W) float
    labels : (B, H, W) int64
    instances : (B, H, W) int32
        Those that show fewer than 32 pixels or are to be ignored are left out.
    """
    patch = torch.arange(len(instances), device=instances.device)[:, None, None]
    counted = (instances != BACKGROUND) & (labels != IGNORE)
    places = torch.stack([patch.expand_as(instances)[counted], instances[counted].long()])
    _, number, areas = torch.unique(places, dim=1, return_inverse=True, return_counts=True)
    inside = logits.movedim(1, -1)[counted][:, 1:]
    means = inside.new_zeros(len(areas), inside.shape[1]).index_add(0, number, inside) / areas[:, None]
    subtypes = areas.new_zeros(len(areas)).index_put((number,), labels[counted] - 1)
    large = areas >= LEAST_AREA_PX
    if not large.any():
        return logits.sum() * 0
    return functional.cross_entropy(means[large], subtypes[large])


def train_judge(cohort: Cohort, config: JudgeConfig, out: Path, *, size_px: int, seed: int) -> Path:
    """Train a judge on the training part of a cohort; a finished one is left as it is.

    Returns
    -------
    Path
        The checkpoint folder, ``out``.

    Raises
    ------
    MismatchError
        ``out`` belongs to another run.
    """
    run = TrainingRun(cohort=cohort, kind="judge", config=config, out=out, size_px=size_px, seed=seed)
    if run.finished():
        return out
    sampler = run.sampler(config.sampling)
    judge = run.initialised(lambda: Judge(config, cohort.taxonomy.num_labels))
    batches = PatchBatches(sampler, config.training.batch_size)
    fit(judge, batches, out, config.training, ema_decay=config.ema_decay, label="judge")
    return run.save(judge.state_dict(), {"missing_subtypes": list(sampler.missing_subtypes)})


def load_judge(folder: Path, device: Device = "auto") -> tuple[Judge, CheckpointHeader]:
    """Load a judge made by :func:`train_judge`, for use on a device; ``auto`` is the GPU where there is one."""
    header, state = load_checkpoint(folder, "judge")
    judge = Judge(build_stored(JudgeConfig, header.config, folder), header.taxonomy.num_labels)
    judge.load_state_dict(state)
    return judge.eval().to(choose_device(device)), header


@torch.no_grad()
def describe(judge: Judge, patches: Sequence[Patch], batch_size: int = BATCH) -> np.ndarray:
    """Return the features of patches, (n, d) float64."""
    batches = image_batches(patches, batch_size, judge.device)
    return np.concatenate([judge.features(images).double().cpu().numpy() for images, _ in batches])


def image_batches(
    patches: Sequence[Patch], batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, list[Patch]]]:
    """Yield images (B, H, W, 3) uint8 on the device, with their patches."""
    for first in range(0, len(patches), batch_size):
        part = [patches[i] for i in range(first, min(first + batch_size, len(patches)))]
        yield torch.from_numpy(np.stack([p.image for p in part])).to(device), part


def _normalised(images: Tensor) -> Tensor:
    return ((images.float() / 255 - GREY_MEAN) / GREY_SD).permute(0, 3, 1, 2)
