"""Settings of the first stage of latent diffusion."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from counterstain.config import Config
from counterstain.data.sampling import SamplingConfig
from counterstain.errors import ConfigError
from counterstain.training_config import TrainingConfig

ADAM_BETAS = (0.5, 0.9)


class AutoencoderConfig(Config):
    """The autoencoder's networks, losses and training."""

    training: TrainingConfig
    """Steps, batch size, device."""
    sampling: SamplingConfig = SamplingConfig()
    """Which patches it trains on."""
    kind: Literal["vq", "kl", "linear"] = "vq"
    """Quantised latents; Gaussian ones with a Kullback-Leibler penalty; or principal components of pixel blocks,
    which need no training (``training`` then says how many patches they are found from, 4,096 at most)."""
    factor: Literal[2, 4, 8] = 4
    """How many times smaller latents are than the image, along each edge."""
    channels: Annotated[int, Field(ge=8)] = 128
    """Features at full size."""
    multipliers: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    """Features at each size, as multiples of ``channels``; None = they double at every halving."""
    blocks: Annotated[int, Field(ge=1)] = 2
    """Residual blocks at each size."""
    attention: bool = True
    """Attention in the middle block."""
    latent_channels: Annotated[int, Field(ge=1)] = 3
    """z."""
    codebook_size: Annotated[int, Field(ge=2)] = 8192
    """Number of codes (``vq``)."""
    codebook_update: Literal["gradient", "average"] = "gradient"
    """Whether codes follow the gradient, or are moving averages of the latents that choose them (``vq``)."""
    revive_codes_below: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Set codes used less often than this share of 1 / ``codebook_size`` to latents of the batch, for example 0.03;
    None = never, as published."""
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6
    """Weight of the Kullback-Leibler term of ``kl``, summed over the latents, beside the distance, summed over all
    values of the image (as CompVis/latent-diffusion does)."""
    lpips_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of LPIPS; 0 needs no ImageNet weights."""
    lpips_weights: str = "imagenet"
    """``imagenet`` or the path of VGG16's state dict."""
    adversarial_weight: Annotated[float, Field(ge=0)] = 0.75
    """Weight of the patch GAN, on top of the adaptive one; 0 = no GAN."""
    adversarial_start: Annotated[int, Field(ge=0)] = 0
    """Step at which the GAN sets in."""
    validation_patches: Annotated[int, Field(ge=0)] = 64
    """Patches of the validation part on which PSNR, SSIM, LPIPS and the use of the codebook are taken; 0 = none."""
    validate_every_steps: Annotated[int, Field(ge=1)] = 1000
    """Distance of these figures; they are taken at the end in any case."""
    discriminator_width: Annotated[int, Field(ge=4)] = 64
    """Features of the discriminator's first layer."""
    lr: Annotated[float, Field(gt=0)] = 4.5e-6
    """Learning rate of both optimisers."""
    lr_scaling: Literal["none", "batch"] = "none"
    """``batch`` multiplies the rate by the batch size, as CompVis/latent-diffusion does."""

    @model_validator(mode="after")
    def _enough_pixels(self) -> Self:
        if self.kind == "linear" and self.latent_channels > 3 * self.factor**2:
            raise ValueError(
                f"latent_channels: blocks of {self.factor} x {self.factor} have {3 * self.factor**2} values"
            )
        return self

    @model_validator(mode="after")
    def _a_width_for_every_size(self) -> Self:
        if self.multipliers is not None and len(self.multipliers) != self.factor.bit_length():
            raise ValueError(f"multipliers: factor {self.factor} needs {self.factor.bit_length()} of them")
        return self

    def check_size(self, size_px: int) -> None:
        """Raise ConfigError where it cannot be trained on patches of that edge."""
        if size_px % self.factor:
            raise ConfigError(f"size_px {size_px}: must be a multiple of the autoencoder's factor {self.factor}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Features at each size, the full one first."""
        multipliers = self.multipliers or [2**i for i in range(self.factor.bit_length())]
        return tuple(self.channels * m for m in multipliers)

    def for_use(self) -> Self:
        """Return the same network without what only its training needs."""
        return self.model_copy(
            update={
                "lpips_weight": 0.0,
                "adversarial_weight": 0.0,
                "codebook_update": "gradient",
                "revive_codes_below": None,
            }
        )

    @property
    def scaled_lr(self) -> float:
        """The rate that the optimisers get."""
        return self.lr * (self.training.batch_size if self.lr_scaling == "batch" else 1)
