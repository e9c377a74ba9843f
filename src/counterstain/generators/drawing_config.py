"""How a trained denoiser draws: the sampler, what inpainting keeps, images larger than its training patches.

These belong to what is drawn, not to the network: other settings need no other training.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from counterstain.config import Config


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
    compute_batch: Annotated[int, Field(ge=1)] = 16
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

    window_px: Annotated[int, Field(ge=32)] | None = None
    """Edge of a window; None = of the training patches."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a window's edge that the next window covers again, at least; more is smoother and slower."""
    decode_px: Annotated[int, Field(ge=64)] = 512
    """Edge of the tiles in which the first stage encodes and decodes larger images."""
    decode_overlap_px: Annotated[int, Field(ge=0)] = 64
    """Pixels that such tiles share, blended; a linear first stage needs none."""
