"""From noise to latents: one loop over any of diffusers' schedulers, each sample with noise of its own.

Shapes: B = batch, z = latent channels, h, w = rows and columns of the latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from counterstain.errors import ConfigError
from counterstain.generators.diffusion_config import NoiseConfig, SamplerConfig

FEW_STEP_POWER = 2.0  # quadratic (Song et al. 2021)
Denoiser = Callable[[Tensor, int], Tensor]  # noisy latents (B, z, h, w), timestep -> the network's prediction


class Blend(Protocol):
    """Puts back what inpainting keeps."""

    def __call__(self, latents: Tensor, timestep: int | None) -> Tensor:
        """Return the latents, at a timestep (None = clean), with what is kept in its place."""
        ...

    def renoise(self) -> None:
        """Draw new noise for what is kept, before stretches of steps are taken again."""
        ...


def build_scheduler(noise: NoiseConfig, sampler: SamplerConfig) -> Any:
    """Build the scheduler of a sampler with its timesteps set."""
    settings = noise.scheduler_settings()
    if sampler.name == "ddim":
        spacing = "trailing" if noise.zero_terminal_snr else "leading"
        scheduler: Any = _Ddim(
            **settings, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing=spacing
        )
    elif sampler.name == "unipc":
        scheduler = UniPCMultistepScheduler(**settings, timestep_spacing="trailing")
    else:  # of first order, DPM-Solver++ is DDIM without noise that ends at the clean image
        order = 1 if sampler.name == "few_step" else 2
        scheduler = DPMSolverMultistepScheduler(
            **settings, solver_order=order, algorithm_type="dpmsolver++", timestep_spacing="trailing"
        )
    begin(scheduler, noise, sampler)
    return scheduler


class _Ddim(DDIMScheduler):  # type: ignore[misc]
    """DDIM whose first step after pure noise survives rounding.

    With eta 1 the fresh noise of that step has all the variance there is, and what is left for the direction is
    1 - alpha - variance = 0: a little less on some machines, and its root is no number.
    """

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        variance: Tensor = super()._get_variance(timestep, prev_timestep)
        before = self.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else self.final_alpha_cumprod
        return variance.minimum((1 - 1e-6) * (1 - before))


def begin(scheduler: Any, noise: NoiseConfig, sampler: SamplerConfig) -> None:
    """Set a scheduler's timesteps and forget the predictions of earlier steps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array__ implementation doesn't accept a copy keyword")
        scheduler.set_timesteps(sampler.steps)
    if sampler.name == "ddim":
        # Floating point gives some numbers of steps one too many, at timestep -1.
        scheduler.timesteps = scheduler.timesteps[: sampler.steps]
        return
    power = FEW_STEP_POWER if sampler.name == "few_step" else sampler.spacing_power
    scheduler.timesteps = torch.tensor(power_spacing(noise.timesteps, sampler.steps, power))
    alphas = scheduler.alphas_cumprod[scheduler.timesteps]
    scheduler.sigmas = torch.cat([((1 - alphas) / alphas).sqrt(), torch.zeros(1)])


def power_spacing(timesteps: int, steps: int, power: float) -> list[int]:
    """Return ``steps`` falling timesteps from T - 1 on, at T (1 - i / steps) ** power - 1.

    Grids of the same power nest: that of half as many steps is every second entry, wherever the grid is not so dense
    that neighbours would be equal; those are moved apart.

    Raises
    ------
    ConfigError
        There are fewer timesteps than steps.

    Examples
    --------
    >>> power_spacing(1000, 4, 1.0), power_spacing(1000, 4, 2.0)
    ([999, 749, 499, 249], [999, 561, 249, 61])
    """
    if steps > timesteps:
        raise ConfigError(f"sampler.steps {steps}: more than noise.timesteps {timesteps}; use fewer steps")
    chosen: list[int] = []
    for left in range(1, steps + 1):
        exact = int(timesteps * (left / steps) ** power + 0.5) - 1
        chosen.append(max(exact, chosen[-1] + 1 if chosen else 0))
    return chosen[::-1]


def sample(
    denoise: Denoiser,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    noise: NoiseConfig,
    sampler: SamplerConfig,
    *,
    device: torch.device,
    blend: Blend | None = None,
    origin: Tensor | None = None,
    walk: Sequence[int] | None = None,
    scheduler: Any | None = None,
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
    origin : (B, z, h, w), optional
        Clean latents to begin from, noised to the walk's first step; None = begin from noise alone.
    walk : sequence of int, optional
        Numbers of the steps in the order in which they are taken, the end (``steps``) last; a smaller number after a
        larger one noises the latents back to that step. None = each step once.
    scheduler : optional
        Of :func:`build_scheduler` for the same settings, where ``blend`` uses it too; None = built here.

    Returns
    -------
    (B, z, h, w) float tensor
    """
    scheduler = build_scheduler(noise, sampler) if scheduler is None else scheduler
    timesteps = [int(t) for t in scheduler.timesteps]
    walk = range(len(timesteps) + 1) if walk is None else walk

    def noised(clean: Tensor, kept: Tensor) -> Tensor:
        fresh = fresh_noise(shape, generators).to(device)
        return kept.sqrt() * clean + (1 - kept).sqrt() * fresh

    alphas = scheduler.alphas_cumprod
    if origin is None:
        latents = fresh_noise(shape, generators).to(device) * scheduler.init_noise_sigma
    else:
        latents = noised(origin, alphas[timesteps[walk[0]]])
    for now, following in pairwise(walk):
        if following < now:
            latents = noised(latents, alphas[timesteps[following]] / alphas[timesteps[now]])
            begin(scheduler, noise, sampler)
            if blend is not None:
                blend.renoise()
        else:
            prediction = denoise(scheduler.scale_model_input(latents, timesteps[now]), timesteps[now])
            extra: dict[str, Any] = {}
            if sampler.name == "ddim" and sampler.eta > 0:
                extra = {"eta": sampler.eta, "variance_noise": fresh_noise(shape, generators).to(device)}
            latents = scheduler.step(prediction, scheduler.timesteps[now], latents, **extra).prev_sample
        if blend is not None:
            latents = blend(latents, timesteps[following] if following < len(timesteps) else None)
    return torch.as_tensor(latents)


def fresh_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Draw standard normal noise, one sample from each generator, on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
