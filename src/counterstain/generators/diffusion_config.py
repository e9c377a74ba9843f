"""Settings of latent diffusion: the noise, the denoiser and its training."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from counterstain.config import Config
from counterstain.data.sampling import SamplingConfig
from counterstain.errors import ConfigError
from counterstain.generators.counterstain_config import CounterstainConfig
from counterstain.generators.drawing_config import InpaintingConfig, SamplerConfig, WindowsConfig
from counterstain.generators.style_config import StyleConfig
from counterstain.training_config import TrainingConfig

Shrinking = Literal["area", "bilinear"]


class NoiseConfig(Config):
    """The noising process, and what the network predicts of it."""

    timesteps: Annotated[int, Field(ge=2)] = 1000
    """T."""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.0015
    """Variance added in the first step."""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.0205
    """Variance added in the last step."""
    schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"] = "scaled_linear"
    """How the variances grow; ``scaled_linear`` is linear in their square roots (Rombach et al. 2022)."""
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network predicts: the noise, the velocity, or the clean latents (Salimans & Ho 2022)."""
    zero_terminal_snr: bool = False
    """Whether the last step is pure noise (Lin et al. 2024); not with ``epsilon``."""

    def scheduler_settings(self) -> dict[str, Any]:
        """Return the arguments that all of diffusers' schedulers share."""
        return {
            "num_train_timesteps": self.timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.schedule,
            "prediction_type": self.prediction,
            "rescale_betas_zero_snr": self.zero_terminal_snr,
        }


class DiffusionConfig(Config):
    """The denoiser's network, noise, loss and training."""

    training: TrainingConfig
    """Steps, batch size, device."""
    sampling: SamplingConfig = SamplingConfig()
    """Which patches it trains on."""
    channels: Annotated[int, Field(ge=8)] = 64
    """Features at the latents' full size."""
    multipliers: Annotated[tuple[int, ...], Field(min_length=2)] = (1, 4, 8)
    """Features at each scale, as multiples of ``channels``."""
    blocks: Annotated[int, Field(ge=1)] = 2
    """Residual blocks at each scale."""
    attention_scales: Annotated[int, Field(ge=0)] = 0
    """How many of the lowest scales have attention; the middle block always has."""
    heads: Annotated[int, Field(ge=1)] = 8
    """Attention heads."""
    condition: Shrinking = "area"
    """How the label mask is brought to the size of the latents."""
    condition_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of training samples without a mask, for classifier-free guidance."""
    style: StyleConfig | None = None
    """Also show the network the style of a reference patch; None = no such input."""
    counterstain: CounterstainConfig | None = None
    """Also show the network the nuclei of the real patch, so that a relabelled instance keeps them; None = no such
    input. For subtypes that a stain tells apart."""
    context_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of training samples that redraw some instances and are shown the rest in extra channels, for inpainting
    (Rombach et al. 2022); 0 = the network has no such channels. Whole images are drawn as before."""
    normalise_latents: Literal["none", "channel", "all"] = "channel"
    """Bring the latents to mean 0 and standard deviation 1 before noise is added: channel by channel, or all channels
    by the same factor, which keeps the ratios between principal components."""
    latent_pool: Annotated[int, Field(ge=1)] | None = None
    """Encode so many patches once and train on these; None = encode every batch anew."""
    noise: NoiseConfig = NoiseConfig()
    """The noising process."""
    loss: Literal["l1", "l2", "min-snr"] = "l2"
    """Distance between prediction and target; ``min-snr`` is l2 weighted by min(SNR, 5) (Hang et al. 2023)."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate."""
    lr_scaling: Literal["none", "batch"] = "none"
    """``batch`` multiplies the rate by the batch size, as CompVis/latent-diffusion does."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Whether the rate falls to 0 along a cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.9999
    """Draw with an average of the weights; None = the last weights."""
    sampler: SamplerConfig = SamplerConfig()
    """How images are drawn."""
    inpainting: InpaintingConfig = InpaintingConfig()
    """What inpainting redraws and keeps."""
    windows: WindowsConfig = WindowsConfig()
    """How images larger than the training patches are drawn."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.noise.zero_terminal_snr and self.noise.prediction == "epsilon":
            raise ValueError("noise.zero_terminal_snr needs noise.prediction: v_prediction or sample")
        if self.sampler.guidance != 1.0 and not self.condition_dropout:
            raise ValueError("sampler.guidance other than 1 needs condition_dropout above 0")
        if self.sampler.steps > self.noise.timesteps:
            raise ValueError(f"sampler.steps {self.sampler.steps}: there are {self.noise.timesteps} noise.timesteps")
        return self

    def at(self, mpp: float) -> DiffusionConfig:
        """Return these settings with widths in pixels, at a scale in micrometres per pixel."""
        shown = self.counterstain
        return self if shown is None else self.model_copy(update={"counterstain": shown.at(mpp)})

    def check_size(self, size_px: int, factor: int) -> None:
        """Raise ConfigError where patches of that edge cannot be halved as often as a first stage and this do."""
        unit = factor * self.halvings
        if size_px % unit:
            raise ConfigError(f"size_px {size_px}: this denoiser and its first stage need a multiple of {unit}")

    @property
    def halvings(self) -> int:
        """By how much the denoiser shrinks latents at most: their edge is a multiple of it."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def scaled_lr(self) -> float:
        """The rate that the optimiser gets."""
        return self.lr * (self.training.batch_size if self.lr_scaling == "batch" else 1)
