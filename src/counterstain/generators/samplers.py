"""From noise to latents: one loop over any of diffusers' schedulers, each sample with noise of its own.

Shapes: B = batch, z = latent channels, h, w = rows and columns of the latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from pydantic import Field
from torch import Tensor

from counterstain.config import Config

Denoiser = Callable[[Tensor, int], Tensor]  # noisy latents (B, z, h, w), timestep -> the network's prediction
Blend = Callable[[Tensor, int | None], Tensor]  # latents, the timestep they are at (None = clean) -> latents


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


class SamplerConfig(Config):
    """How images are drawn."""

    name: Literal["ddim", "dpmsolver++", "unipc"] = "dpmsolver++"
    """DDIM (Song et al. 2021), DPM-Solver++ 2M (Lu et al. 2022) or UniPC (Zhao et al. 2023)."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    """Evaluations of the network (twice as many with guidance)."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fresh noise in each DDIM step: 0 = none, 1 = as much as in DDPM."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance (Ho & Salimans 2022): 1 = none; needs a network trained with condition dropout."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the noise levels, 0 = clean, 1 = pure noise, where guidance acts (Kynkäänniemi et al. 2024)."""
    compute_batch: Annotated[int, Field(ge=1)] = 16
    """Images drawn at once."""


def build_scheduler(noise: NoiseConfig, sampler: SamplerConfig) -> Any:
    """Build the scheduler of a sampler with its timesteps set."""
    settings = noise.scheduler_settings()
    if sampler.name == "ddim":
        spacing = "trailing" if noise.zero_terminal_snr else "leading"
        scheduler: Any = DDIMScheduler(
            **settings, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing=spacing
        )
    elif sampler.name == "dpmsolver++":
        scheduler = DPMSolverMultistepScheduler(
            **settings, algorithm_type="dpmsolver++", timestep_spacing="trailing", lower_order_final=True
        )
    else:
        scheduler = UniPCMultistepScheduler(**settings, timestep_spacing="trailing")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array__ implementation doesn't accept a copy keyword")
        scheduler.set_timesteps(sampler.steps)
    return scheduler


def sample(
    denoise: Denoiser,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    noise: NoiseConfig,
    sampler: SamplerConfig,
    *,
    device: torch.device,
    blend: Blend | None = None,
) -> Tensor:
    """Draw latents.

    Parameters
    ----------
    denoise : callable
        The network, with condition and guidance applied.
    shape : (z, h, w)
    generators : one per sample
        All noise of a sample comes from its own generator.
    blend : callable, optional
        Applied after each step, for inpainting.

    Returns
    -------
    (B, z, h, w) float tensor
    """
    scheduler = build_scheduler(noise, sampler)
    timesteps = [int(t) for t in scheduler.timesteps]
    latents = fresh_noise(shape, generators).to(device) * scheduler.init_noise_sigma
    for i, timestep in enumerate(timesteps):
        prediction = denoise(scheduler.scale_model_input(latents, timestep), timestep)
        extra: dict[str, Any] = {}
        if sampler.name == "ddim" and sampler.eta > 0:
            extra = {"eta": sampler.eta, "variance_noise": fresh_noise(shape, generators).to(device)}
        latents = scheduler.step(prediction, scheduler.timesteps[i], latents, **extra).prev_sample
        if blend is not None:
            latents = blend(latents, timesteps[i + 1] if i + 1 < len(timesteps) else None)
    return torch.as_tensor(latents)


def fresh_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Draw standard normal noise, one sample from each generator, on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
