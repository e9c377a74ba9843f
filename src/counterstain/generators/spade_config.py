"""Settings of SPADE."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from counterstain.config import Config
from counterstain.data.sampling import SamplingConfig
from counterstain.errors import ConfigError
from counterstain.generators.diffusion_config import CounterstainConfig
from counterstain.training_config import TrainingConfig

UPSAMPLINGS = 5  # `num_upsampling_layers normal`
ADAM_BETAS = (0.0, 0.9)
FEATURE_WEIGHT = 10.0  # of feature matching
KL_WEIGHT = 0.05  # of the Kullback-Leibler term of the VAE


class SpadeConfig(Config):
    """SPADE's networks, losses and training; the defaults are those of the published implementation."""

    training: TrainingConfig
    """Steps, batch size, device."""
    sampling: SamplingConfig = SamplingConfig()
    """Which patches it trains on."""
    generator_width: Annotated[int, Field(ge=4, le=4096)] = 64
    """Features of the generator's last block (``ngf``); also the first layer of the encoder."""
    discriminator_width: Annotated[int, Field(ge=4, le=4096)] = 64
    """Features of the discriminator's first layer (``ndf``)."""
    hidden: Annotated[int, Field(ge=4, le=4096)] = 128
    """Width of the networks that modulate."""
    latent: Annotated[int, Field(ge=1, le=65_536)] = 256
    """Length of the style code."""
    edge_channel: bool = True
    """Whether the networks see the borders between instances."""
    noise_channels: Annotated[int, Field(ge=0, le=1024)] = 0
    """Channels of pixel noise that the generator sees beside the labels (Schönfeld et al. 2021, OASIS, section 3.3);
    without it (0, as published) nuclei of flat areas tend to lie at the same places in every image."""
    counterstain: CounterstainConfig | None = None
    """Show generator and discriminator the nuclei of the real patch; None = labels alone, as published."""
    use_vae: bool = True
    """Whether an encoder learns the style codes; without it codes are random in training too."""
    lr_generator: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate of generator and encoder."""
    lr_discriminator: Annotated[float, Field(gt=0)] = 4e-4
    """Learning rate of the discriminator (TTUR, Heusel et al. 2017: higher than the generator's)."""
    l1_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the L1 distance to the real image; not part of SPADE, a help for trainings of minutes."""
    vgg_weight: Annotated[float, Field(ge=0)] = 10.0
    """Weight of the VGG19 term; 0 needs no ImageNet weights."""
    vgg_weights: str = "imagenet"
    """``imagenet`` or the path of VGG19's state dict; ``random`` only to take times."""
    initial_gain: Annotated[float, Field(gt=0)] | None = 0.02
    """Start from Glorot's normal distribution times this, and biases of 0; None = torch's own start."""
    monitor_masks: Annotated[int, Field(ge=0)] = 8
    """Masks that are drawn while training, to watch for codes without effect, white images, repeated texture."""
    monitor_every_steps: Annotated[int, Field(ge=1)] = 1000
    """Distance of these figures; they are taken at the end in any case."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Draw with an average of the generator's weights; None = the last weights, as published."""
    compute_batch: Annotated[int, Field(ge=1, le=4096)] = 16
    """Images drawn at once."""

    def check_size(self, size_px: int) -> None:
        """Raise ConfigError where patches of that edge cannot be drawn."""
        if size_px % 2**UPSAMPLINGS:
            raise ConfigError(f"size_px {size_px}: SPADE draws patches whose edge is a multiple of {2**UPSAMPLINGS}")

    def at(self, mpp: float) -> SpadeConfig:
        """Return these settings with widths in pixels, at a scale in micrometres per pixel."""
        shown = self.counterstain
        return self if shown is None else self.model_copy(update={"counterstain": shown.at(mpp)})
