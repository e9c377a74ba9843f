"""From noise to latents: one loop over any of diffusers' schedulers, each sample with noise of its own.

Inpainting walks the same loop, and puts what is kept back after each step: blended latents after Rombach et al. 2022
and Avrahami et al. 2023, steps taken again after Lugmayr et al. 2022 (RePaint).

Shapes: B = batch, z = latent channels, h, w = rows and columns of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from counterstain.generators.diffusion_config import InpaintingConfig, NoiseConfig, SamplerConfig
from counterstain.generators.pipeline import Ddim, begin
from counterstain.progress import step_done

FEW_STEP_POWER = 2.0  # quadratic (Song et al. 2021)
Denoiser = Callable[[Tensor, int], Tensor]  # noisy latents (B, z, h, w), timestep -> the network's prediction


def build_scheduler(noise: NoiseConfig, sampler: SamplerConfig) -> Any:
    """Build the scheduler of a sampler with its timesteps set."""
    settings = noise.scheduler_settings() | {"timestep_spacing": "trailing"}
    if sampler.name == "ddim":
        settings["timestep_spacing"] = "trailing" if noise.zero_terminal_snr else "leading"
        scheduler: Any = Ddim(**settings, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    elif sampler.name == "unipc":
        scheduler = UniPCMultistepScheduler(**settings)
    else:  # of first order, DPM-Solver++ is DDIM without noise that ends at the clean image
        order = 1 if sampler.name == "few_step" else 2
        scheduler = DPMSolverMultistepScheduler(**settings, solver_order=order, algorithm_type="dpmsolver++")
    begin(scheduler, sampler.steps, spacing(sampler))
    return scheduler


def spacing(sampler: SamplerConfig) -> float | None:
    """Return the power by which a sampler's steps are spaced; None = evenly."""
    return {"ddim": None, "few_step": FEW_STEP_POWER}.get(sampler.name, sampler.spacing_power)


def step_walk(steps: int, config: InpaintingConfig) -> list[int]:
    """Return the order in which inpainting takes steps, for :func:`sample`.

    With ``resamples`` r and ``jump_length`` j, after every j steps the latents are noised back by j steps, r - 1
    times, and these are taken again, as in the published schedule of RePaint (Lugmayr et al. 2022, appendix B).

    Examples
    --------
    >>> step_walk(4, InpaintingConfig(resamples=2, jump_length=2))
    [0, 1, 2, 3, 1, 2, 3, 4]
    """
    first = steps - max(1, round(steps * config.strength)) if config.start == "original" else 0
    r, j = config.resamples, config.jump_length
    jumps_left = {steps - 1 - left: r - 1 for left in range(0, steps - first - j, j)}
    walk = [first]
    while walk[-1] < steps:
        walk.append(walk[-1] + 1)
        if jumps_left.get(walk[-1], 0):
            jumps_left[walk[-1]] -= 1
            walk.append(walk[-1] - j)
    return walk


class KnownLatents:
    """Puts the known latents (B, z, h, w), noised to the step's level, back where ``mask`` (B, 1, h, w) is 0.

    Their noise, from one generator per sample, stays the same until :meth:`renoise`.
    """

    def __init__(self, known: Tensor, mask: Tensor, generators: Sequence[torch.Generator]) -> None:
        self._known, self._mask, self._generators = known, mask, generators
        self.renoise()

    def renoise(self) -> None:
        """Draw new noise: with the old one, taking steps again would not see more of what is kept."""
        self._noise = fresh_noise(self._known.shape[1:], self._generators).to(self._known)

    def __call__(self, latents: Tensor, timestep: int | None, scheduler: Any) -> Tensor:
        """Blend latents (B, z, h, w) that are at a timestep of a scheduler, None = clean."""
        kept = self._known
        if timestep is not None:
            kept = scheduler.add_noise(kept, self._noise, torch.full((len(kept),), timestep, device=kept.device))
        return self._mask * latents + (1 - self._mask) * kept


def sample(
    denoise: Denoiser,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    noise: NoiseConfig,
    sampler: SamplerConfig,
    *,
    device: torch.device,
    blend: KnownLatents | None = None,
    origin: Tensor | None = None,
    walk: Sequence[int] | None = None,
) -> Tensor:
    """Draw latents, (B, z, h, w) float.

    ``denoise`` is the network with its condition and guidance applied; all noise of a sample comes from its own
    generator. ``blend`` is applied after each step, for inpainting. Clean latents ``origin`` (B, z, h, w) are noised to
    the walk's first step; without them it begins from noise alone. ``walk`` numbers the steps in the order in which
    they are taken, the end (``steps``) last; a smaller number after a larger one noises the latents back to that step;
    None = each once.
    """
    scheduler = build_scheduler(noise, sampler)
    timesteps, alphas = [int(t) for t in scheduler.timesteps], scheduler.alphas_cumprod
    walk = range(len(timesteps) + 1) if walk is None else walk

    def fresh() -> Tensor:
        return fresh_noise(shape, generators).to(device)

    def noised(clean: Tensor, kept: Tensor) -> Tensor:
        return kept.sqrt() * clean + (1 - kept).sqrt() * fresh()

    latents = fresh() * scheduler.init_noise_sigma if origin is None else noised(origin, alphas[timesteps[walk[0]]])
    for done, (now, following) in enumerate(pairwise(walk), 1):
        if following < now:
            latents = noised(latents, alphas[timesteps[following]] / alphas[timesteps[now]])
            begin(scheduler, sampler.steps, spacing(sampler))
            if blend is not None:
                blend.renoise()
        else:
            prediction = denoise(scheduler.scale_model_input(latents, timesteps[now]), timesteps[now])
            extra: dict[str, Any] = {}
            if sampler.name == "ddim" and sampler.eta > 0:
                extra = {"eta": sampler.eta, "variance_noise": fresh()}
            latents = scheduler.step(prediction, scheduler.timesteps[now], latents, **extra).prev_sample
        if blend is not None:
            latents = blend(latents, timesteps[following] if following < len(timesteps) else None, scheduler)
        step_done(done, len(walk) - 1)
    return torch.as_tensor(latents)


def fresh_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Draw standard normal noise, one sample from each generator, on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
