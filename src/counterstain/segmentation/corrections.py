"""Labels of synthetic patches, corrected while a segmenter trains.

Pixels on which a segmenter of real patches disagrees are ignored; the borders of instances follow a moving average of
the segmenter itself.

Shapes: B = batch, H, W = rows and columns in pixels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterstain.checkpoints import read_header
from counterstain.data.sampling import PatchSource, stack
from counterstain.devices import Batch, device_of, place
from counterstain.errors import InputError
from counterstain.segmentation.mixing import MixedPatches
from counterstain.segmentation.model import Segmenter, load_segmenter, loss_by_pixel
from counterstain.segmentation.segmenter_config import SegmenterConfig
from counterstain.taxonomy import BACKGROUND, IGNORE
from counterstain.training import Batches

COUNTED_PATCHES = 512  # from which losses on real patches are estimated
TEACHER_DECAY = 0.999  # of the moving average that corrects borders, once it has warmed up
TEACHER_STARTS = 0.5  # share of the steps before it does
TEACHER_IS_SURE = 0.9  # probability of a pixel's class from which on it does


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """Which labels are corrected; ``ignore_above`` 0 and ``border_um`` 0 are off."""

    critic: Path | None
    ignore_above: float
    border_um: float

    def __post_init__(self) -> None:
        if (self.critic is None) != (self.ignore_above == 0):
            raise InputError("critic and ignore_above need each other: give both or neither")

    def record(self) -> dict[str, Any]:
        """Return what identifies the corrections that are on."""
        strengths = {"ignore_above": self.ignore_above, "border_um": self.border_um}
        given: dict[str, Any] = {name: value for name, value in strengths.items() if value}
        return given if self.critic is None else given | {"critic": read_header(self.critic).sha256}

    def of(
        self, segmenter: Segmenter, real: PatchSource, config: SegmenterConfig, *, steps: int, mpp: float
    ) -> LabelCorrection | None:
        """Return what corrects the labels that a segmenter trains on; None where nothing does."""
        if self.critic is None and not self.border_um:
            return None
        return LabelCorrection(
            critic=None if self.critic is None else Critic.of(self.critic, real, config, self.ignore_above),
            teacher=copy.deepcopy(segmenter) if self.border_um else None,
            border_px=max(1, round(self.border_um / mpp)),
            first_step=round(TEACHER_STARTS * steps),
        )


@dataclass(frozen=True, slots=True)
class MarkedBatches:
    """Batches that also say which of their patches are synthetic: ``synthetic`` (B,) bool."""

    batches: Batches
    patches: MixedPatches
    batch_size: int

    def __call__(self, step: int) -> Batch:
        """Return a step's batch."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        marks = torch.tensor([self.patches.is_synthetic(place) for place in places])
        return self.batches(step) | {"synthetic": marks}


class Critic(nn.Module):
    """A segmenter of real patches, and the loss of a pixel of each label, (256,) float, above which it disagrees."""

    def __init__(self, segmenter: Segmenter, limits: Tensor) -> None:
        super().__init__()
        self.segmenter = segmenter.requires_grad_(False)
        self.limits: Tensor
        self.register_buffer("limits", limits)

    @classmethod
    @torch.no_grad()
    def of(cls, folder: Path, real: PatchSource, config: SegmenterConfig, ignore_above: float) -> Critic:
        """Open a segmenter and take its mean loss on each label of real patches; no limit where there is no pixel."""
        segmenter = place(load_segmenter(folder)[0], device_of(config.training))
        sums, pixels = torch.zeros(256), torch.zeros(256)
        size = config.training.batch_size
        for first in range(0, COUNTED_PATCHES, size):
            batch = stack([real[i] for i in range(first, first + size)], ("images", "labels"))
            labels = batch["labels"].long().ravel()
            losses = loss_by_pixel(segmenter(batch["images"].to(segmenter.device)).float().cpu(), batch["labels"])
            sums.index_add_(0, labels, losses.ravel())
            pixels += torch.bincount(labels, minlength=256)
        means = torch.where(pixels > 0, sums / pixels, torch.inf)
        return cls(segmenter.cpu(), ignore_above * means)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return where the segmenter disagrees with labels, (B, H, W) bool."""
        return loss_by_pixel(self.segmenter(images).float(), labels) > self.limits[labels.long()]


class LabelCorrection(nn.Module):
    """Corrects the labels of the synthetic patches of a batch in training; real ones keep theirs.

    ``border_px`` is how far from the border of an instance the ``teacher`` corrects, from ``first_step`` on.
    """

    def __init__(self, *, critic: Critic | None, teacher: Segmenter | None, border_px: int, first_step: int) -> None:
        super().__init__()
        self.critic, self.teacher = critic, None if teacher is None else teacher.requires_grad_(False)
        self.border_px, self.first_step = border_px, first_step
        self._step = -1

    @torch.no_grad()
    def forward(self, batch: Batch, network: nn.Module) -> Tensor:
        """Return the labels (B, H, W) uint8 of a batch that ``network`` is trained on."""
        self.eval()
        images, labels, step = batch["images"], batch["labels"], int(batch["step"])
        corrected = labels
        if self.teacher is not None:
            if step != self._step:  # once for all micro-batches
                _follow(self.teacher.network, network, step)
                self._step = step
            if step >= self.first_step:
                tumour = self.teacher(images).float().softmax(1)[:, 1:].sum(1)
                corrected = border_labels(labels, tumour, self.border_px)
        if self.critic is not None:
            corrected = torch.where(self.critic(images, corrected), IGNORE, corrected)
        return torch.where(batch["synthetic"][:, None, None], corrected, labels).to(torch.uint8)


def border_labels(labels: Tensor, tumour: Tensor, border_px: int) -> Tensor:
    """Return labels that follow a probability of tumour, (B, H, W) float, near the borders where it is sure.

    ``labels`` (B, H, W) uint8: pixels up to ``border_px`` from one of the other class may change it, to background or
    to a subtype that lies so near. Pixels to be ignored, and borders between subtypes, stay.
    """
    known = torch.where(labels == IGNORE, BACKGROUND, labels).float()[:, None]
    edge = 2 * border_px + 1
    nearby = functional.max_pool2d(known, edge, 1, border_px)[:, 0]
    all_tumour = -functional.max_pool2d(-known, edge, 1, border_px)[:, 0] > BACKGROUND
    band = (nearby > BACKGROUND) & ~all_tumour & (labels != IGNORE)
    inside = torch.where(labels == BACKGROUND, nearby.to(labels.dtype), labels)
    followed = torch.where(tumour > 0.5, inside, BACKGROUND).to(labels.dtype)
    return torch.where(band & ((tumour - 0.5).abs() >= TEACHER_IS_SURE - 0.5), followed, labels)


def _follow(average: nn.Module, network: nn.Module, step: int) -> None:
    """Move an average of weights and statistics towards those of a network."""
    weight = 1 - min(TEACHER_DECAY, (1 + step) / (10 + step)) if step else 1.0
    for mean, value in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value.detach(), weight)
        else:
            mean.copy_(value)
