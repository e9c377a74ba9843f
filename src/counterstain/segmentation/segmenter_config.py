"""Settings of the segmenter: network, losses, optimiser, training data and sliding windows."""

from __future__ import annotations

import re
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from counterstain.config import Config
from counterstain.data.sampling import NETWORK_PX, CopyPasteConfig, SamplingConfig
from counterstain.errors import ConfigError
from counterstain.segmentation.mixing import MixingConfig
from counterstain.training_config import TrainingConfig


def _no_address(name: str) -> str:
    """Refuse names by which timm would fetch a network from elsewhere, such as ``hf-hub:...``."""
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError("expected the name of a network in segmentation_models_pytorch or, with tu-, in timm")
    return name


EncoderName = Annotated[str, AfterValidator(_no_address)]
Channels = Annotated[int, Field(ge=1, le=2048)]
MOST_BATCH_PX = 2**28  # of all windows of a batch: 3 GB as numbers
ADAM_BETAS = (0.9, 0.999)


class Windows(NamedTuple):
    """How regions are cut into windows."""

    size_px: int  # edge of a window
    overlap_px: int  # pixels that neighbouring windows share at least
    batch_size: int  # windows in a batch


class InferenceConfig(Config):
    """How regions are cut into windows."""

    window_px: Annotated[int, Field(ge=32, multiple_of=32)] | None = None
    """Edge of the windows, a multiple of 32; null = the edge of the training patches."""
    overlap_px: Annotated[int, Field(ge=0)] | None = None
    """Pixels that neighbouring windows share at least; null = a quarter of the window."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Windows in a batch."""

    def windows(self, patch_px: int) -> Windows:
        """Return the windows of a segmenter with training patches of that edge.

        Raises ConfigError where the overlap is as large as the window, or a batch of windows larger than memory.
        """
        window = self.window_px or patch_px
        overlap = window // 4 if self.overlap_px is None else self.overlap_px
        if overlap >= window:
            raise ConfigError(f"overlap_px {overlap}: expected less than the window of {window} px")
        if self.batch_size * window**2 > MOST_BATCH_PX:
            most = MOST_BATCH_PX // window**2
            remedy = f"give a batch_size of {most} at most" if most else "give a smaller window_px"
            raise ConfigError(f"batch_size {self.batch_size}: too many windows of {window} px for one batch; {remedy}")
        return Windows(window, overlap, self.batch_size)


class SegmenterConfig(Config):
    """The segmenter's network, losses, optimiser and data."""

    training: TrainingConfig = TrainingConfig(steps=2000)
    """Steps, batch size, device."""
    sampling: SamplingConfig = SamplingConfig()
    """Which real patches it trains on, and how all patches are augmented."""
    mixing: MixingConfig = MixingConfig()
    """What an amount of synthetic patches means."""
    inference: InferenceConfig = InferenceConfig()
    """How regions are cut into windows in evaluation and prediction."""
    classes: Annotated[Literal["tissue", "subtypes"], Field(exclude_if=lambda classes: classes == "tissue")] = "tissue"
    """What it tells apart: the tissue class and background, as in the paper, or background and every subtype, as
    ``counterstain score`` needs. The probability of the tissue class is then 1 - that of background."""
    architecture: Literal["unet", "unetplusplus", "manet", "fpn", "linknet", "deeplabv3plus", "dpt"] = "unet"
    """Decoder, by its name in segmentation_models_pytorch. ``dpt`` is for vision transformers with patches of 16 px
    (``tu-vit_…_patch16_224``), with an ``encoder_depth`` of 4."""
    encoder: EncoderName = "resnet34"
    """Encoder, by its name in segmentation_models_pytorch; ``tu-…`` are timm's."""
    encoder_weights: str | None = "imagenet"
    """What the encoder starts from: ``imagenet``, the path of a state dict, the folder of a trained segmenter or of a
    network that timm saved, or null (random weights)."""
    encoder_options: dict[str, bool | int | float] = Field(default_factory=dict, exclude_if=lambda given: not given)
    """Arguments of timm's network (``tu-…``) that its name does not say, such as ``{init_values: 1.0e-5}``."""
    encoder_patients: str | None = None
    """Whose tissue was seen by the network that a state dict is from: ``none``, or the path of a text file with one
    patient per line. A trained segmenter knows it."""
    encoder_depth: Annotated[int, Field(ge=3, le=5)] = 5
    """How often the encoder halves a patch; deeper stages are left out. In patches of 32 px the last two of five stages
    see 2 x 2 pixels and one pixel, and cost half of the time."""
    decoder_channels: Annotated[tuple[Channels, ...], Field(min_length=3, max_length=5)] | None = None
    """Channels of the decoder's blocks, one per halving, from the deepest; null = the library's (256, 128, 64, 32, 16),
    or as many of the last ones as there are blocks."""
    dice_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the Dice loss, computed over the whole batch."""
    cross_entropy_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy."""
    subtype_weighting: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight the pixels of a subtype by its inverse frequency in training to this power: at 1 all subtypes have equal
    total weights, 0 is off. The mean weight of the tissue class stays 1, like background's."""
    mixup_alpha: Annotated[float, Field(gt=0)] | None = None
    """Mixup: blend the patches of a batch in pairs, with a share drawn from Beta(alpha, alpha); null = off."""
    copy_paste: CopyPasteConfig | None = None
    """Paste instances of other training regions onto the background of real patches; null = off."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or Adam with decoupled weight decay."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Learning rate, at the start if it falls."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """``cosine`` lets the learning rate fall to zero over the training."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the optimiser."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Evaluate an exponential average of the weights; null = the last ones."""

    def outputs(self, num_labels: int) -> int:
        """Return the outputs per pixel of a network for a taxonomy with so many labels."""
        return num_labels if self.classes == "subtypes" else 2

    def check_size(self, size_px: int) -> None:
        """Raise ConfigError if patches of that edge cannot be segmented."""
        if size_px % NETWORK_PX:
            raise ConfigError(f"size_px {size_px}: a segmenter needs patches whose edge is a multiple of {NETWORK_PX}")
        self.inference.windows(size_px)

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if not self.dice_weight and not self.cross_entropy_weight:
            raise ValueError("dice_weight and cross_entropy_weight are both 0: nothing would be learnt")
        return self

    @model_validator(mode="after")
    def _a_block_for_each_halving(self) -> Self:
        if self.decoder_channels is not None and len(self.decoder_channels) != self.encoder_depth:
            raise ValueError(
                f"decoder_channels: {len(self.decoder_channels)} numbers for an encoder_depth of {self.encoder_depth}; "
                f"give {self.encoder_depth}"
            )
        return self
