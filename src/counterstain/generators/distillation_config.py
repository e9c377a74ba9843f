"""Settings of few-step drawing."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from counterstain.config import Config
from counterstain.training_config import TrainingConfig


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
