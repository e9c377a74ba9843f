"""What generated images are worth: fidelity, adherence to the asked subtype, copies; here the settings of the judge."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from counterstain.config import Config
from counterstain.data.sampling import SamplingConfig
from counterstain.segmentation.segmenter_config import Channels, EncoderName
from counterstain.training_config import TrainingConfig

NOVEL = 0.01  # of real patches are nearer to tissue of another patient than what a novelty filter lets pass


class JudgeConfig(Config):
    """The judge's network and training."""

    training: TrainingConfig = TrainingConfig(steps=3000, batch_size=32)
    """Steps, batch size, device."""
    sampling: SamplingConfig = SamplingConfig(background_share=0.1, stain_jitter=0.05)
    """Which real patches it learns from; subtypes are drawn equally often."""
    encoder: EncoderName = "tu-resnet18"
    """Encoder, by its name in segmentation_models_pytorch; it starts without weights from elsewhere."""
    decoder_channels: Annotated[tuple[Channels, ...], Field(min_length=5, max_length=5)] = (128, 64, 48, 32, 16)
    """Channels of the decoder's five blocks."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Highest learning rate; it falls to 0 along a cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the rate rises from 0."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.99
    """Judge with an average of the weights; null = the last ones."""


class JudgeFilterConfig(Config):
    """What a judge must agree on for an image to be kept."""

    agreement: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of an image's redrawn instances that must look like the subtype that was asked for."""
    min_area_px: Annotated[int, Field(ge=1)] = 64
    """Instances that show fewer pixels are not judged; an image without a judged instance is kept."""
    masks: Annotated[int, Field(ge=1, le=100)] = 4
    """Masks tried at most for one patch, each as often as ``synthesis.attempts`` says; the last image is then kept and
    counted as never passed."""
