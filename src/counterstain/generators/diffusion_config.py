"""Settings of latent diffusion: the first stage, the denoiser and what it is shown, its distillation, and drawing."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from counterstain.config import Config
from counterstain.data.sampling import SamplingConfig
from counterstain.errors import ConfigError
from counterstain.training_config import TrainingConfig

Shrinking = Literal["area", "bilinear"]
Multiplier = Annotated[int, Field(ge=1, le=64)]
NUCLEUS_UM = 8.0
REFERENCES_OF_A_SLIDE = 64  # that those of a style are chosen from
ADAM_BETAS = (0.5, 0.9)  # of the first stage


class SamplerConfig(Config):
    """How images are drawn."""

    name: Literal["ddim", "dpmsolver++", "unipc", "few_step"] = "dpmsolver++"
    """DDIM (Song et al. 2021), DPM-Solver++ 2M (Lu et al. 2022), UniPC (Zhao et al. 2023), or the 1 to 8 steps that a
    distilled network was trained for."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    """Evaluations of the network (twice as many with guidance)."""
    spacing_power: Annotated[float, Field(ge=1, le=5)] = 3.0
    """Steps of DPM-Solver++ and UniPC lie at T (1 - i / steps) ** power: 1 = evenly in time, larger = closer together
    towards the clean image, where few even steps lose fine variation. ``ddim`` is always even, ``few_step`` has 2."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fresh noise in each DDIM step: 0 = none, 1 = as much as in DDPM."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance (Ho & Salimans 2022): 1 = none; needs a network trained with condition dropout."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the noise levels, 0 = clean, 1 = pure noise, where guidance acts (Kynkäänniemi et al. 2024)."""
    compute_batch: Annotated[int, Field(ge=1, le=4096)] = 16
    """Images drawn at once."""

    @model_validator(mode="after")
    def _interval_rises(self) -> Self:
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval [{low:g}, {high:g}]: expected 0 <= first <= second <= 1")
        return self


class InpaintingConfig(Config):
    """What is redrawn and what is kept."""

    dilation_px: Annotated[int, Field(ge=0, le=64)] = 0
    """How far the latents are redrawn beyond the instances, against the pull of the old stain at their borders."""
    resamples: Annotated[int, Field(ge=1, le=100)] = 1
    """How often each stretch of steps is walked (r of RePaint, Lugmayr et al. 2022), so that what is redrawn and what
    is kept come to fit; 1 = once. The network is evaluated about so many times as often."""
    jump_length: Annotated[int, Field(ge=1, le=1000)] = 1
    """Steps of such a stretch (j of RePaint); few, where the sampler takes few."""
    start: Literal["noise", "original"] = "noise"
    """Begin from pure noise, or from the original image with noise over it (Meng et al. 2022)."""
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the steps that are taken where ``start`` is ``original``; smaller = closer to the original."""
    composite: bool = True
    """Put the original pixels back outside the instances; False is what the authors' code does."""


class WindowsConfig(Config):
    """How images larger than the training patches are drawn."""

    window_px: Annotated[int, Field(ge=32, le=65_536)] | None = None
    """Edge of a window; None = of the training patches."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a window's edge that the next window covers again, at least; more is smoother and slower."""
    decode_px: Annotated[int, Field(ge=64, le=65_536)] = 512
    """Edge of the tiles in which the first stage encodes and decodes larger images."""


class CounterstainConfig(Config):
    """A denoiser that is also shown where the nuclei of the real patch lie."""

    other_stain: Literal["dab", "eosin"] = "dab"
    """What haematoxylin is unmixed from."""
    shows: Literal["structure", "contrast"] = "structure"
    """Differences to the surroundings in units of their spread, or in optical density. The second keeps how dark nuclei
    are, which neither mask nor style says; it suits where unmixing makes no nucleus paler under another stain."""
    hidden: Annotated[Literal["scaled", "filled"], Field(exclude_if=lambda hidden: hidden == "scaled")] = "scaled"
    """Where the other stain hides haematoxylin: what is measured there, scaled down, or filled in from around. On real
    tissue strong membranes show as lines in the first."""
    local_px: Annotated[float, Field(gt=0, le=256)] | None = None
    """Standard deviation in pixels of the surroundings that haematoxylin is compared with; None = 8 um, about a
    nucleus, at the scale of the cohort."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of training samples without it, so that images can be drawn for masks alone."""

    def at(self, mpp: float) -> CounterstainConfig:
        """Return these settings with a width in pixels, at a scale in micrometres per pixel."""
        return self if self.local_px is not None else self.model_copy(update={"local_px": NUCLEUS_UM / mpp})


class StyleConfig(Config):
    """A denoiser that is also given a style."""

    width: Annotated[int, Field(ge=4, le=1024)] = 32
    """Features of the encoder's first layer."""
    code: Annotated[int, Field(ge=1, le=4096)] = 16
    """Length of the learned code; six statistics of the stain are added to it."""
    references: Annotated[int, Field(ge=1, le=REFERENCES_OF_A_SLIDE)] = 8
    """Reference patches whose styles are averaged. One alone hardly says how strong a slide is stained, and what is
    drawn after it varies less between slides than tissue does."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of training samples without a style, so that images can be drawn without one."""


class StyleChoice(Config):
    """Whose style images are drawn in; slides other than an image's own are drawn by its seed."""

    source: Literal["none", "own", "other", "mixture", "beyond"] = "none"
    """``none``: no style is given (SPADE: a random code; the oracle: ``own``); ``own``: of the slide that the mask is
    from; ``other``: of another training slide; ``mixture``: between two training slides, in any ratio; ``beyond``: from
    one training slide through a second and past it."""
    step: Annotated[float, Field(gt=0, le=2)] = 0.3
    """How far past the second slide ``beyond`` goes, as a share of the way between the two."""


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
    channels: Annotated[int, Field(ge=8, le=4096)] = 128
    """Features at full size."""
    multipliers: Annotated[tuple[Multiplier, ...], Field(min_length=1)] | None = None
    """Features at each size, as multiples of ``channels``; None = they double at every halving."""
    blocks: Annotated[int, Field(ge=1, le=16)] = 2
    """Residual blocks at each size."""
    attention: bool = True
    """Attention in the middle block."""
    latent_channels: Annotated[int, Field(ge=1, le=1024)] = 3
    """z."""
    plain_latents: Annotated[bool, Field(exclude_if=lambda plain: not plain)] = False
    """Leave out the convolutions of size 1 on both sides of the latents (``kl``), as newer first stages do."""
    pretrained: Annotated[str | None, Field(exclude_if=lambda path: path is None)] = None
    """Take a published first stage as it is instead of training one: a folder of diffusers, a single file, or
    OWNER/NAME on the Hub, such as Stable Diffusion's. Its sizes are read off it; ``factor`` must be its own."""
    pretrained_patients: Annotated[str | None, Field(exclude_if=lambda said: said is None)] = None
    """Whose tissue ``pretrained`` was trained on: ``none``, or the path of a text file with one patient per line."""
    codebook_size: Annotated[int, Field(ge=2, le=1_000_000)] = 8192
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
    """``imagenet`` or the path of VGG16's state dict; ``random`` only to take times."""
    adversarial_weight: Annotated[float, Field(ge=0)] = 0.75
    """Weight of the patch GAN, on top of the adaptive one; 0 = no GAN."""
    adversarial_start: Annotated[int, Field(ge=0)] = 0
    """Step at which the GAN sets in."""
    validation_patches: Annotated[int, Field(ge=0)] = 64
    """Patches of the validation part on which PSNR, SSIM, LPIPS and the use of the codebook are taken; 0 = none."""
    validate_every_steps: Annotated[int, Field(ge=1)] = 1000
    """Distance of these figures; they are taken at the end in any case."""
    discriminator_width: Annotated[int, Field(ge=4, le=4096)] = 64
    """Features of the discriminator's first layer."""
    lr: Annotated[float, Field(gt=0)] = 4.5e-6
    """Learning rate of both optimisers."""
    lr_scaling: Literal["none", "batch"] = "none"
    """``batch`` multiplies the rate by the batch size, as CompVis/latent-diffusion does."""

    @model_validator(mode="after")
    def _fits_the_factor(self) -> Self:
        values, sizes = 3 * self.factor**2, self.factor.bit_length()
        if self.kind == "linear" and self.latent_channels > values:
            raise ValueError(f"latent_channels: blocks of {self.factor} x {self.factor} have {values} values")
        if self.multipliers is not None and len(self.multipliers) != sizes:
            raise ValueError(f"multipliers: factor {self.factor} needs {sizes} of them")
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
        unused = {"lpips_weight": 0.0, "adversarial_weight": 0.0, "revive_codes_below": None}
        return self.model_copy(update=unused | {"codebook_update": "gradient"})

    @property
    def scaled_lr(self) -> float:
        """The rate that the optimisers get."""
        return self.lr * (self.training.batch_size if self.lr_scaling == "batch" else 1)


class NoiseConfig(Config):
    """The noising process, and what the network predicts of it."""

    timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
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
    channels: Annotated[int, Field(ge=8, le=4096)] = 64
    """Features at the latents' full size."""
    multipliers: Annotated[tuple[Multiplier, ...], Field(min_length=2, max_length=8)] = (1, 4, 8)
    """Features at each scale, as multiples of ``channels``."""
    blocks: Annotated[int, Field(ge=1, le=16)] = 2
    """Residual blocks at each scale."""
    attention_scales: Annotated[int, Field(ge=0)] = 0
    """How many of the lowest scales have attention; the middle block always has."""
    heads: Annotated[int, Field(ge=1, le=1024)] = 8
    """Attention heads."""
    condition: Shrinking = "area"
    """How the label mask is brought to the size of the latents: ``area`` is the share of each label under a latent, as
    the authors' two bilinear halvings give it; ``bilinear`` is one step to the whole factor, as in earlier versions."""
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


class DistillationConfig(Config):
    """How a trained denoiser is brought to few steps; the rest is the teacher's own configuration."""

    training: TrainingConfig
    """Batch size, device, and the optimiser steps of each halving."""
    teacher_steps: Literal[8, 16, 32] = 32
    """Steps of the first teacher."""
    steps: Literal[1, 2, 4, 8] = 4
    """Steps of the last student."""
    guidance: Annotated[float, Field(ge=0)] = 1.5
    """Guidance of the first teacher; 1 = none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the noise levels where that guidance acts, 0 = clean, 1 = pure noise."""
    latent_pool: Annotated[int, Field(ge=1)] | None = None
    """Encode so many patches once and train on these; None = encode every batch anew."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate at the beginning of each halving; it falls to 0 along a line."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of each halving over which the rate rises from 0."""

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.steps >= self.teacher_steps:
            raise ValueError(f"steps {self.steps}: must be fewer than teacher_steps {self.teacher_steps}")
        return self

    @property
    def halvings(self) -> int:
        """How often the steps are halved."""
        return (self.teacher_steps // self.steps).bit_length() - 1
