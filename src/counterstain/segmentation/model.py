"""The segmenter: a network that separates the tissue class from background, its losses and its first weights.

Shapes: B = batch, H, W = rows and columns in pixels. Images enter as uint8 and are normalised inside the network, so
that no caller can forget it.
"""

from __future__ import annotations

import difflib
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterstain.checkpoints import CheckpointHeader, load_checkpoint, read_state
from counterstain.config import build_stored
from counterstain.devices import summed
from counterstain.errors import ConfigError, InputError
from counterstain.seeding import derive
from counterstain.segmentation.segmenter_config import ADAM_BETAS, SegmenterConfig
from counterstain.storage import sha256_of
from counterstain.taxonomy import BACKGROUND, IGNORE
from counterstain.training import Trainable, cosine, fused_optimizers

IMAGENET = "imagenet"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_SD = (0.229, 0.224, 0.225)
DEEPEST = 5
DECODER_CHANNELS = (256, 128, 64, 32, 16)
DECODERS_WITH_CHANNELS = ("unet", "unetplusplus", "manet")


class Segmenter(Trainable):
    """A network with two outputs per pixel, background and tumour.

    ``steps`` is the length of the training, for the learning-rate schedule; ``seed`` that of dropout; ``label_weights``
    (256,) float the weight in the losses of a pixel of each label, 1 by default. Raises ConfigError where the settings
    describe no network.
    """

    def __init__(
        self, config: SegmenterConfig, *, steps: int = 1, seed: int = 0, label_weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config, self.steps, self.seed = config, steps, seed
        self.network = _network(config)
        self.mean: Tensor
        self.sd: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("sd", torch.tensor(IMAGENET_SD), persistent=False)
        self.label_weights: Tensor | None
        self.register_buffer("label_weights", label_weights, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 -> logits (B, 2, H, W) of background and tumour."""
        normalised = (images.float() / 255 - self.mean) / self.sd
        return self.network(normalised.permute(0, 3, 1, 2))  # type: ignore[no-any-return]

    def tumour_logits(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8, on any device -> logits of tumour (B, H, W) float on the network's device."""
        logits: Tensor = self(images.to(self.device)).float()
        return logits[:, 1] - logits[:, 0]

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dice and cross-entropy of a batch, and their weighted sum."""
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
        return {"loss": loss, "loss_dice": dice, "loss_cross_entropy": cross_entropy}

    def _losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        weights = None if self.label_weights is None else self.label_weights[labels.long()]
        return dice_loss(logits, labels, weights), cross_entropy_loss(logits, labels, weights)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam or AdamW."""
        config = self.config
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        fused = fused_optimizers(config.training)
        return [kind(self.parameters(), config.lr, ADAM_BETAS, weight_decay=config.weight_decay, fused=fused)]

    def learning_rate(self, step: int) -> float:
        """Constant, or falling to 0 along a cosine."""
        return 1.0 if self.config.lr_schedule == "constant" else cosine(step, self.steps)


def dice_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return 1 - soft Dice, averaged over background and tumour, over all pixels of the batch together.

    ``logits`` (B, 2, H, W) float; ``labels`` (B, H, W) uint8: 0 = background, 255 = ignored, anything else is tumour;
    ``weights`` (B, H, W) float of the pixels, 1 by default.
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
    """Return the mean cross-entropy over the pixels that are not ignored; 0 if all are (shapes as above)."""
    kept = labels != IGNORE
    by_pixel = functional.cross_entropy(logits, _tumour(labels), reduction="none")
    if weights is not None:
        by_pixel = by_pixel * weights
    sums = summed(torch.stack([(by_pixel * kept).sum(), kept.sum()]))
    return sums[0] / sums[1].clamp(min=1)


def load_segmenter(folder: str | Path) -> tuple[Segmenter, CheckpointHeader]:
    """Load a trained segmenter, ready for inference on the CPU; errors as of ``load_checkpoint``."""
    header, state = load_checkpoint(Path(folder), "segmenter")
    segmenter = Segmenter(build_stored(SegmenterConfig, header.config, folder), seed=header.seed)
    segmenter.load_state_dict(state)
    return segmenter.eval(), header


def _tumour(labels: Tensor) -> Tensor:
    return (labels != BACKGROUND).long()


def _network(config: SegmenterConfig) -> nn.Module:
    import segmentation_models_pytorch as smp

    known = list(smp.encoders.encoders)
    if config.encoder not in known and not config.encoder.startswith("tu-"):
        near = " or ".join(difflib.get_close_matches(config.encoder, known, n=3))
        raise ConfigError(f"encoder {config.encoder!r}: unknown; did you mean {near or 'resnet34'}?")
    depth = config.encoder_depth
    if depth < DEEPEST and not config.encoder.startswith("tu-"):
        raise ConfigError(
            f"encoder_depth {depth}: {config.encoder} would keep its deeper stages, untrained; use timm's encoder "
            f"(tu-{config.encoder}) or {DEEPEST}"
        )
    options: dict[str, Any] = {"encoder_depth": depth}
    if config.architecture == "fpn":
        options["upsampling"] = 2 ** (depth - 3)  # from its finest map to the image
    if config.architecture in DECODERS_WITH_CHANNELS:
        options["decoder_channels"] = config.decoder_channels or DECODER_CHANNELS[-depth:]
    elif config.decoder_channels is not None:
        raise ConfigError(
            f"decoder_channels: {config.architecture} has a fixed number; leave them out, or use "
            f"{' or '.join(DECODERS_WITH_CHANNELS)}"
        )
    network: Any = smp.create_model(config.architecture, config.encoder, encoder_weights=None, classes=2, **options)
    return network.to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


def load_encoder_weights(encoder: nn.Module, name: str, weights: str | None) -> str:
    """Load the weights that an encoder starts from: ImageNet's, those of a local file, or none.

    Parameters
    ----------
    name : str
        Of the encoder in segmentation_models_pytorch, for example ``resnet34``.
    weights : str, optional
        ``imagenet``, the path of a state dict (safetensors, or PyTorch's own read with ``weights_only``), or None.
        If ImageNet weights cannot be downloaded, the encoder stays random, with a notice on standard error.

    Returns
    -------
    str
        What the encoder starts from, for the record.

    Raises
    ------
    InputError
        The file is missing, is not a state dict or belongs to another network.
    """
    if weights is None:
        return "random"
    if weights != IMAGENET:
        path = Path(weights)
        _load(encoder, read_state(path, "encoder_weights"), name, weights)
        return f"{path.name} sha256:{sha256_of(path)}"
    state = _imagenet(name)
    if state is None:
        return "random (imagenet weights could not be downloaded)"
    _load(encoder, state, name, weights)
    return IMAGENET


@functools.cache
def _imagenet(name: str) -> dict[str, Tensor] | None:
    """Download ImageNet weights once per process; None without a connection."""
    from segmentation_models_pytorch.encoders import get_encoder

    try:
        encoder = get_encoder(name, weights=True if name.startswith("tu-") else IMAGENET)
    except OSError:
        sys.stderr.write(
            f"notice: ImageNet weights of {name} cannot be downloaded here; the encoder starts from random weights "
            "(encoder_weights takes the path of a local file)\n"
        )
        return None
    except KeyError as error:
        raise InputError(f"encoder_weights imagenet: there are none for {name}; set it to null") from error
    state: dict[str, Tensor] = encoder.state_dict()
    return state


def _load(encoder: nn.Module, state: dict[str, Tensor], name: str, source: str) -> None:
    try:
        encoder.load_state_dict(dict(state))
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"encoder_weights {source}: do not fit encoder {name} ({detail})") from error
