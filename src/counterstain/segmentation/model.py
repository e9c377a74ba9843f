"""The segmenter: a network that separates the tissue class from background, its losses and its first weights.

Shapes: B = batch, H, W = rows and columns in pixels. Images enter as uint8 and are normalised inside the network, so
that no caller can forget it.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterstain.checkpoints import (
    WEIGHTS_FILE,
    CheckpointHeader,
    is_finished,
    load_checkpoint,
    patients_behind,
    read_header,
    read_state,
    rebuilt,
)
from counterstain.config import build_stored
from counterstain.data.split import NOBODY, PATIENTS_SEEN_FILE
from counterstain.devices import fused_optimizers, summed
from counterstain.errors import ConfigError, InputError
from counterstain.hub import answers
from counterstain.seeding import derive
from counterstain.segmentation.segmenter_config import ADAM_BETAS, SegmenterConfig
from counterstain.segmentation.timm_networks import weights_in, without_classifier
from counterstain.storage import sha256_of
from counterstain.taxonomy import IGNORE
from counterstain.training import Trainable, cosine

IMAGENET = "imagenet"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_SD = (0.229, 0.224, 0.225)
ENCODER_PREFIX = "network.encoder."  # of its tensors' names in a segmenter or judge
DEEPEST = 5
TRANSFORMER_DEPTH, TRANSFORMER_PATCH_PX = 4, 16  # of encoders of dpt
DECODER_CHANNELS = (256, 128, 64, 32, 16)
DECODERS_WITH_CHANNELS = ("unet", "unetplusplus", "manet")


class Segmenter(Trainable):
    """A network with two outputs per pixel, background and tumour, or (``classes: subtypes``) one for every label.

    ``num_labels`` are those of the taxonomy, ``steps`` is the length of the training, for the learning-rate schedule;
    ``seed`` that of dropout; ``label_weights`` (256,) float the weight in the losses of a pixel of each label, 1 by
    default. A ``correction`` that is set for the training changes labels of synthetic patches. Raises ConfigError where
    the settings describe no network.
    """

    def __init__(
        self,
        config: SegmenterConfig,
        *,
        num_labels: int = 2,
        steps: int = 1,
        seed: int = 0,
        label_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config, self.steps, self.seed = config, steps, seed
        self.network = _network(config, config.outputs(num_labels))
        self.mean: Tensor
        self.sd: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("sd", torch.tensor(IMAGENET_SD), persistent=False)
        self.label_weights: Tensor | None
        self.register_buffer("label_weights", label_weights, persistent=False)
        self.correction: nn.Module | None = None  # batch, network -> labels (B, H, W) uint8

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 -> logits (B, C, H, W) of background and tumour, or of every label."""
        normalised = (images.float() / 255 - self.mean) / self.sd
        return self.network(normalised.permute(0, 3, 1, 2))  # type: ignore[no-any-return]

    def tumour_logits(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8, on any device -> logits of tumour (B, H, W) float on the network's device.

        Those of a segmenter that tells K subtypes are (B, K, H, W): of each subtype over background.
        """
        if self.device.type == "cuda" and not images.is_cuda:
            images = images.pin_memory()  # then the copy does not wait for the batch before
        logits: Tensor = self(images.to(self.device, non_blocking=True)).float()
        if self.config.classes == "subtypes":
            return logits[:, 1:] - logits[:, :1]
        return logits[:, 1] - logits[:, 0]

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dice and cross-entropy of a batch, and their weighted sum."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            # Dropout draws from the global state: give it one that depends on the step alone.
            torch.manual_seed(derive(self.seed, "dropout", int(batch["step"]), int(batch["position"][0])))
            logits = self(batch["images"]).float()
        labels = batch["labels"] if self.correction is None else self.correction(batch, self.network)
        dice, cross_entropy = self._losses(logits, labels)
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
        trained = self.network.parameters()
        return [kind(trained, config.lr, ADAM_BETAS, weight_decay=config.weight_decay, fused=fused)]

    def networks(self) -> Iterable[nn.Module]:
        """Return the network without what corrects labels."""
        return [self.network]

    def learning_rate(self, step: int) -> float:
        """Constant, or falling to 0 along a cosine."""
        return 1.0 if self.config.lr_schedule == "constant" else cosine(step, self.steps)


def loss_by_pixel(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each pixel, (B, H, W) float, whether its label is to be ignored or not."""
    return functional.cross_entropy(logits, _classes(labels, logits.shape[1]), reduction="none")


def dice_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return 1 - soft Dice, averaged over the C classes, over all pixels of the batch together.

    ``logits`` (B, C, H, W) float; ``labels`` (B, H, W) uint8: 0 = background, 255 = ignored, anything else is tumour
    for two classes and one of the others for more; ``weights`` (B, H, W) float of the pixels, 1 by default.
    """
    kept = labels != IGNORE
    predicted = logits.softmax(1).movedim(1, -1)[kept]  # (pixels, C)
    truth = functional.one_hot(_classes(labels, logits.shape[1])[kept], logits.shape[1]).to(predicted.dtype)
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
    by_pixel = loss_by_pixel(logits, labels)
    if weights is not None:
        by_pixel = by_pixel * weights
    sums = summed(torch.stack([(by_pixel * kept).sum(), kept.sum()]))
    return sums[0] / sums[1].clamp(min=1)


def load_segmenter(folder: str | Path) -> tuple[Segmenter, CheckpointHeader]:
    """Load a trained segmenter, ready for inference on the CPU; errors as of ``load_checkpoint``."""
    header, state = load_checkpoint(Path(folder), "segmenter")
    config = build_stored(SegmenterConfig, header.config, folder)
    options: dict[str, Any] = {"num_labels": header.taxonomy.num_labels, "seed": header.seed}
    return rebuilt(lambda: Segmenter(config, **options), state, Path(folder)).eval(), header


def _classes(labels: Tensor, count: int) -> Tensor:
    """Return the class of each pixel among ``count``; of two, all subtypes are the second."""
    return labels.clamp(max=count - 1).long()


def _network(config: SegmenterConfig, outputs: int) -> nn.Module:
    depth = config.encoder_depth
    if depth < DEEPEST and not config.encoder.startswith("tu-"):
        raise ConfigError(
            f"encoder_depth {depth}: {config.encoder} would keep its deeper stages, untrained; use timm's encoder "
            f"(tu-{config.encoder}) or {DEEPEST}"
        )
    if config.encoder_options and not config.encoder.startswith("tu-"):
        raise ConfigError(f"encoder_options: {config.encoder} takes none; they are for timm's encoders (tu-…)")
    options: dict[str, Any] = {"encoder_depth": depth, **config.encoder_options}
    if config.architecture == "dpt":
        if depth != TRANSFORMER_DEPTH:
            raise ConfigError(f"encoder_depth {depth}: dpt reads a transformer at {TRANSFORMER_DEPTH} depths, so set 4")
        options |= {"dynamic_img_size": True, "num_classes": 0}
    if config.architecture == "fpn":
        options["upsampling"] = 2 ** (depth - 3)  # from its finest map to the image
    if config.architecture in DECODERS_WITH_CHANNELS:
        options["decoder_channels"] = config.decoder_channels or DECODER_CHANNELS[-depth:]
    elif config.decoder_channels is not None:
        raise ConfigError(
            f"decoder_channels: {config.architecture} has a fixed number; leave them out, or use "
            f"{' or '.join(DECODERS_WITH_CHANNELS)}"
        )
    network = build_network(config.architecture, config.encoder, classes=outputs, **options)
    if config.architecture == "dpt" and set(network.encoder.output_strides) != {TRANSFORMER_PATCH_PX}:
        found = network.encoder.output_strides[0]
        raise ConfigError(
            f"encoder {config.encoder}: its patches are {found} px wide, dpt takes {TRANSFORMER_PATCH_PX} px only"
        )
    placed: nn.Module = network.to(memory_format=torch.channels_last)
    return placed


def build_network(architecture: str, encoder: str, **options: Any) -> Any:
    """Build a network of segmentation_models_pytorch with random weights; nothing is downloaded.

    Raises ConfigError where there is no such encoder, or it does not fit the architecture.
    """
    import segmentation_models_pytorch as smp
    import timm

    if not (timm.is_model(encoder[3:]) if encoder.startswith("tu-") else encoder in smp.encoders.encoders):
        known = [*smp.encoders.encoders, *(f"tu-{name}" for name in timm.list_models())]
        near = " or ".join(difflib.get_close_matches(encoder, known, n=3))
        raise ConfigError(f"encoder {encoder!r}: unknown; did you mean {near or 'resnet34'}?")
    try:
        network: Any = smp.create_model(architecture, encoder, encoder_weights=None, **options)
    except Exception as error:  # each of a thousand networks of timm has its own way to say that it does not fit
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "for vision transformers set architecture to dpt" if "downsampling" in reason else "try resnet34"
        raise ConfigError(f"encoder {encoder!r}: makes no {architecture} ({reason}); {remedy}") from error
    return network


def encoder_patients(config: SegmenterConfig) -> set[str]:
    """Return the patients whose tissue is in the weights that an encoder starts from.

    They are known of a segmenter or judge of ours. Of any other file, ``config.encoder_patients`` or the file
    ``patients_seen.txt`` beside it must name them.

    Raises InputError where there is no such file, or nobody says what its network was trained on.
    """
    if config.encoder_weights in {None, IMAGENET}:
        return set()
    path = Path(str(config.encoder_weights))
    folder = _checkpoint_of(path)
    if folder is not None:
        return set(read_header(folder).patients_seen)
    if path.is_dir():
        weights_in(path)
    elif not path.is_file():
        raise InputError(f"encoder_weights {path}: no such weights file, or folder of a trained segmenter")
    return set(patients_behind(path, config.encoder_patients, f"encoder_weights {path}", "encoder_patients"))


def _checkpoint_of(path: Path) -> Path | None:
    """Return the checkpoint that a path names: its folder, or the weights in it."""
    folder = path if path.is_dir() else path.parent
    return folder if (path.is_dir() or path.name == WEIGHTS_FILE) and is_finished(folder) else None


def load_encoder_weights(encoder: nn.Module, config: SegmenterConfig) -> str:
    """Load the weights that an encoder starts from: ImageNet's, those of a file or a trained segmenter, or none.

    Returns what the encoder starts from, for the record.

    Raises InputError where ImageNet's weights cannot be downloaded; the file is missing, no state dict or of another
    network.
    """
    if config.encoder_weights is None:
        return "random"
    if config.encoder_weights == IMAGENET and config.architecture == "dpt":
        raise InputError("encoder_weights imagenet: not for dpt; give a file, a folder of timm, or null")
    if config.encoder_weights == IMAGENET:
        _load(encoder, _imagenet(config.encoder), config)
        return IMAGENET
    path = Path(config.encoder_weights)
    folder = _checkpoint_of(path)
    if folder is None:
        claimed = config.encoder_patients == NOBODY and not (path.parent / PATIENTS_SEEN_FILE).exists()
        path = weights_in(path) if path.is_dir() else path
        state = read_state(path, "encoder_weights")
        if config.architecture == "dpt":  # timm's whole network inside smp's encoder
            state = {f"model.{name}": value for name, value in without_classifier(encoder.model, state).items()}
        _load(encoder, state, config)
        return f"{path.name} sha256:{sha256_of(path)}" + (
            " (said to have seen none of the patients)" if claimed else ""
        )
    header, state = load_checkpoint(folder, read_header(folder).kind)
    parts = ((name.partition(ENCODER_PREFIX), value) for name, value in state.items())
    _load(encoder, {name: value for (before, found, name), value in parts if found and not before}, config)
    return f"encoder of the {header.kind} {folder.name} sha256:{header.sha256}"


@functools.cache
def _imagenet(name: str) -> dict[str, Tensor]:
    """Fetch ImageNet weights once per process: from the cache, or from the Hub if it answers at all."""
    from huggingface_hub import constants
    from segmentation_models_pytorch.encoders import get_encoder

    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or not answers(constants.ENDPOINT)  # then the cache only, without retries
        encoder = get_encoder(name, weights=True if name.startswith("tu-") else IMAGENET)
    except OSError as error:
        raise InputError(
            f"encoder_weights imagenet: the weights of {name} cannot be downloaded here; give the path of a local "
            "file, or set segmenter.encoder_weights=null to start from random weights"
        ) from error
    except (KeyError, RuntimeError) as error:
        raise InputError(f"encoder_weights imagenet: there are none for {name}; set it to null") from error
    finally:
        constants.HF_HUB_OFFLINE = offline
    return dict(encoder.state_dict())


def _load(encoder: nn.Module, state: dict[str, Tensor], config: SegmenterConfig) -> None:
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        source = f"encoder_weights {config.encoder_weights}"
        raise InputError(f"{source}: do not fit encoder {config.encoder} ({detail})") from error
