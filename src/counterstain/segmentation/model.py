"""Weights of pixels by subtype: rare subtypes count more in the losses.

Shapes: K = number of subtypes; tables have an entry for each label 0 … K, 0 = background.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional

from counterstain.checkpoints import CheckpointHeader, load_checkpoint
from counterstain.config import build_stored
from counterstain.data.sampling import PatchSource
from counterstain.errors import ConfigError
from counterstain.processes import summed
from counterstain.seeding import derive, numpy_generator
from counterstain.segmentation.segmenter_config import SegmenterConfig
from counterstain.taxonomy import BACKGROUND, IGNORE
from counterstain.training import Batch, Batches, fused_optimizers

COUNTED_PATCHES = 512


def label_weights(pixels: np.ndarray, strength: float) -> np.ndarray:
    """Return the weight of a pixel of every label.

    Parameters
    ----------
    pixels : (K + 1,) array
        How many pixels of each label the training shows.
    strength : float
        Exponent of the inverse frequency: 1 lets every subtype weigh the same in sum, 0 changes nothing.

    Returns
    -------
    (K + 1,) float array
        1 for background and for subtypes that do not occur; the mean over all pixels of subtypes is 1, so that the
        balance of the tissue class against background stays as it is.
    """
    weights = np.ones(len(pixels))
    present = np.flatnonzero(pixels[1:]) + 1
    if len(present):
        frequency = pixels[present] / pixels[present].sum()
        inverse = frequency**-strength
        weights[present] = inverse / (frequency * inverse).sum()
    return weights


def count_labels(source: PatchSource, total: int, num_labels: int) -> np.ndarray:
    """Count the pixels of every label in patches that are spread evenly over the first ``total`` of a stream.

    Returns
    -------
    (K + 1,) int64 array
        Pixels to be ignored are left out.
    """
    pixels = np.zeros(256, np.int64)
    for index in np.unique(np.linspace(0, total - 1, min(total, COUNTED_PATCHES)).astype(np.int64)).tolist():
        pixels += np.bincount(source[index].label_mask.ravel(), minlength=256)
    return pixels[BACKGROUND:num_labels]


# Mixup: each patch of a batch is blended with another one, and the losses are blended alike.
#
# Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018).


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


# The segmenter: an encoder-decoder network that tells the tissue class from background, and its losses.
#
# Shapes: B = batch, H, W = rows and columns in pixels. Images enter as uint8 and are normalised inside, so that no
# caller can forget it.

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_SD = (0.229, 0.224, 0.225)
DEEPEST = 5
DECODER_CHANNELS = (256, 128, 64, 32, 16)
DECODERS_WITH_CHANNELS = ("unet", "unetplusplus", "manet")


class Segmenter(LightningModule):
    """A network with two outputs, background and tumour.

    Parameters
    ----------
    config : SegmenterConfig
    steps : int
        Length of the training, for the learning rate's schedule.
    seed : int
        Of dropout, in networks that have it.
    label_weights : (256,) float tensor, optional
        Weight of a pixel of each label in the losses; 1 for all if not given.

    Raises
    ------
    ConfigError
        No such encoder, or channels for a decoder that has none to choose.
    """

    def __init__(
        self, config: SegmenterConfig, *, steps: int = 1, seed: int = 0, label_weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config, self.steps, self.seed = config, steps, seed
        self.network = _network(config).to(memory_format=torch.channels_last)
        self.mean: Tensor
        self.sd: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("sd", torch.tensor(IMAGENET_SD), persistent=False)
        self.label_weights: Tensor | None
        self.register_buffer("label_weights", label_weights, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 -> logits (B, 2, H, W) of background and tumour."""
        normalised = (images.float() / 255 - self.mean) / self.sd
        logits: Tensor = self.network(normalised.permute(0, 3, 1, 2))
        return logits

    def tumour_logits(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8, on any device -> logits of tumour (B, H, W) float on the network's device."""
        logits: Tensor = self(images.to(self.device)).float()
        return logits[:, 1] - logits[:, 0]

    def probabilities(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8, on any device -> probability of tumour (B, H, W) float."""
        return torch.sigmoid(self.tumour_logits(images))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Dice and cross-entropy of a batch; logs them and their weighted sum."""
        del batch_idx
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            # Dropout draws from the global state: give it one that depends on the step alone.
            torch.manual_seed(derive(self.seed, "dropout", int(batch["step"]), int(batch["position"][0])))
            logits = self(batch["images"]).float()
        dice, cross_entropy = self._losses(logits, batch["labels"])
        if "mixed_labels" in batch:
            share = batch["kept_share"][0]
            mixed_dice, mixed_cross_entropy = self._losses(logits, batch["mixed_labels"])
            dice = share * dice + (1 - share) * mixed_dice
            cross_entropy = share * cross_entropy + (1 - share) * mixed_cross_entropy
        loss = self.config.dice_weight * dice + self.config.cross_entropy_weight * cross_entropy
        self.log_dict({"loss": loss, "loss_dice": dice, "loss_cross_entropy": cross_entropy})
        return loss

    def _losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        weights = None if self.label_weights is None else self.label_weights[labels.long()]
        return dice_loss(logits, labels, weights), cross_entropy_loss(logits, labels, weights)

    def configure_optimizers(self) -> Any:
        """Adam or AdamW, with the learning rate's schedule."""
        config = self.config
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        optimizer = kind(
            self.parameters(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=fused_optimizers(config.training),
        )
        if config.lr_schedule == "constant":
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._cosine)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _cosine(self, step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))


def dice_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return 1 - soft Dice, averaged over background and tumour, all pixels of the batch taken together.

    Parameters
    ----------
    logits : (B, 2, H, W) float
    labels : (B, H, W) uint8
        0 = background, 255 = left out, anything else is tumour.
    weights : (B, H, W) float, optional
        How much each pixel counts; 1 if not given.
    """
    kept = labels != IGNORE
    predicted = logits.softmax(1).movedim(1, -1)[kept]  # (pixels, 2)
    truth = functional.one_hot(_tumour(labels)[kept], 2).to(predicted.dtype)
    overlap, total = predicted * truth, predicted + truth
    if weights is not None:
        counted = weights[kept][:, None]
        overlap, total = overlap * counted, total * counted
    sums = summed(torch.stack([overlap.sum(0), total.sum(0)]))
    # One pixel on either side: a class that is absent and not predicted costs nothing.
    return 1 - ((2 * sums[0] + 1) / (sums[1] + 1)).mean()


def cross_entropy_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy over the pixels that are not left out; 0 where all are (shapes as above)."""
    kept = labels != IGNORE
    by_pixel = functional.cross_entropy(logits, _tumour(labels), reduction="none")
    if weights is not None:
        by_pixel = by_pixel * weights
    sums = summed(torch.stack([(by_pixel * kept).sum(), kept.sum()]))
    return sums[0] / sums[1].clamp(min=1)


def load_segmenter(folder: Path) -> tuple[Segmenter, CheckpointHeader]:
    """Load a trained segmenter, ready for inference on the CPU.

    Raises
    ------
    InputError
        There is no finished checkpoint.
    MismatchError
        It is not that of a segmenter.
    """
    header, state = load_checkpoint(folder, "segmenter")
    segmenter = Segmenter(build_stored(SegmenterConfig, header.config, folder), seed=header.seed)
    segmenter.load_state_dict(state)
    return segmenter.eval(), header


def _tumour(labels: Tensor) -> Tensor:
    return (labels != BACKGROUND).long()


def _network(config: SegmenterConfig) -> nn.Module:
    import segmentation_models_pytorch as smp

    known = list(smp.encoders.encoders)
    if config.encoder not in known and not config.encoder.startswith("tu-"):
        near = difflib.get_close_matches(config.encoder, known, n=3)
        raise ConfigError(f"encoder {config.encoder!r}: unknown; {_or(near) or 'for example resnet34'} is known")
    depth = config.encoder_depth
    if depth < DEEPEST and not config.encoder.startswith("tu-"):
        raise ConfigError(
            f"encoder_depth {depth}: {config.encoder} keeps its deeper stages, untrained; use timm's encoder "
            f"(tu-{config.encoder}) or {DEEPEST}"
        )
    options: dict[str, Any] = {"encoder_depth": depth}
    if config.architecture == "fpn":
        options["upsampling"] = 2 ** (depth - 3)  # from its finest map to the image
    if config.architecture in DECODERS_WITH_CHANNELS:
        options["decoder_channels"] = config.decoder_channels or DECODER_CHANNELS[-depth:]
    elif config.decoder_channels is not None:
        raise ConfigError(
            f"decoder_channels: {config.architecture} has none to choose; leave them out, "
            f"or use {_or(DECODERS_WITH_CHANNELS)}"
        )
    network: nn.Module = smp.create_model(
        config.architecture, config.encoder, encoder_weights=None, classes=2, **options
    )
    return network


def _or(names: list[str] | tuple[str, ...]) -> str:
    return " or ".join(names)
