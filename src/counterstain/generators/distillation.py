"""A diffusion network that draws in 1 to 8 steps: progressive distillation (Salimans & Ho 2022).

A student learns to take two steps of its teacher at once; it then becomes the teacher of the next student, until few
steps are left. The first teacher draws with classifier-free guidance, which the student takes over, so that it needs
one evaluation a step (Meng et al. 2023). Each step is one of DDIM without noise, on a quadratic grid of timesteps.

Shapes: B = batch, z = latent channels, h, w = rows and columns of the latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from counterstain.devices import fused_optimizers
from counterstain.generators.conditioning import Condition
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.diffusion_config import DiffusionConfig, DistillationConfig, SamplerConfig
from counterstain.generators.pipeline import power_spacing
from counterstain.generators.samplers import FEW_STEP_POWER, fresh_noise
from counterstain.seeding import torch_generator
from counterstain.training import Trainable

Levels = tuple[Tensor, Tensor]  # alpha, sigma: (B, 1, 1, 1) each; latents are alpha x clean + sigma x noise


def student_config(teacher: DiffusionConfig, config: DistillationConfig) -> DiffusionConfig:
    """Return the configuration of the student's checkpoint.

    A teacher that predicts noise gets a student that predicts the velocity: noise says little about the image where
    there is little else, and few steps begin there.
    """
    kind = "v_prediction" if teacher.noise.prediction == "epsilon" else teacher.noise.prediction
    changes: dict[str, Any] = {
        "training": config.training.model_copy(update={"steps": config.halvings * config.training.steps}),
        "noise": teacher.noise.model_copy(update={"prediction": kind}),
        "sampler": SamplerConfig(name="few_step", steps=config.steps, compute_batch=teacher.sampler.compute_batch),
        "latent_pool": config.latent_pool,
        "condition_dropout": 0.0,
        "lr": config.lr,
        "lr_scaling": "none",
        "warmup_steps": config.warmup_steps,
        "ema_decay": None,
    }
    return teacher.model_copy(update=changes)


class Distillation(Trainable):
    """Trains ``student``, of :func:`student_config`, from the weights of ``teacher``; ``seed`` draws steps and noise.

    The halving follows from the number of the training step. The teacher is used up: later students are copied into it.
    """

    def __init__(self, config: DistillationConfig, teacher: Diffusion, student: Diffusion, seed: int = 0) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        student.load_state_dict(teacher.state_dict())
        if student.style is not None:  # a style must mean the same to student and teacher
            student.style.requires_grad_(requires_grad=False)
        self.student = student
        self.teacher = teacher.requires_grad_(requires_grad=False)
        noise = student.config.noise
        self.timesteps = power_spacing(noise.timesteps, config.teacher_steps, FEW_STEP_POWER)
        alphas = DDPMScheduler(**noise.scheduler_settings()).alphas_cumprod[self.timesteps]
        # Alpha and sigma at the teacher's steps, and at the end, where the image is clean.
        self._alphas = torch.cat([alphas.sqrt(), torch.ones(1)])
        self._sigmas = torch.cat([(1 - alphas).sqrt(), torch.zeros(1)])

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compare one step of the student with two of the teacher, in clean latents, weighted by max(SNR, 1)."""
        halving, within = divmod(int(batch["step"]), self.config.training.steps)
        if halving and not within:  # the student is the teacher of the next one
            self.teacher.load_state_dict(self.student.state_dict())
        latents, condition = self.student.clean_latents(batch), self.student.training_condition(batch)
        noisy, first = self._noised(latents, batch, halving)
        before, stride = self._levels(first), 2**halving
        with torch.no_grad():
            middle = self._taught(noisy, first, first + stride, condition, halving)
            reached = self._taught(middle, first + stride, first + 2 * stride, condition, halving)
            target = _target_of_one_step(noisy, reached, before, self._levels(first + 2 * stride))
        prediction = self.student.predict(noisy, self._timesteps(first), condition).float()
        clean, _ = _clean_and_noise(prediction, noisy, before, self.student.config.noise.prediction)
        weight = (before[0] / before[1]).square().clamp(min=1.0)
        return {"loss": (weight * (clean - target).square()).mean()}

    def networks(self) -> Iterable[nn.Module]:
        """Return student and teacher."""
        return (self.student.unet, self.teacher.unet)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the student."""
        fused = (self.device.type == "cuda" and fused_optimizers(self.config.training)) or None
        return [torch.optim.Adam(self.student.unet.parameters(), self.config.lr, fused=fused)]

    def learning_rate(self, step: int) -> float:
        """Rise, then fall to 0, in each halving."""
        within = step % self.config.training.steps
        return min(1.0, (within + 1) / (self.config.warmup_steps + 1)) * (1 - within / self.config.training.steps)

    def _noised(self, latents: Tensor, batch: dict[str, Tensor], halving: int) -> tuple[Tensor, Tensor]:
        """Noise latents to a step of the student's grid, (B,) numbers on the first teacher's grid."""
        step, stride = int(batch["step"]), 2 ** (halving + 1)
        generators = [torch_generator(self.seed, "distillation", step, p) for p in batch["position"].tolist()]
        chosen = [torch.randint(self.config.teacher_steps // stride, (), generator=g) for g in generators]
        first = torch.stack(chosen).to(latents.device) * stride
        noise = fresh_noise(latents.shape[1:], generators).to(latents)
        alpha, sigma = self._levels(first)
        # Drawing begins with pure noise, whatever little signal the noising process leaves there.
        begins = first[:, None, None, None] == 0
        return torch.where(begins, noise, alpha * latents + sigma * noise), first

    def _taught(self, noisy: Tensor, now: Tensor, following: Tensor, condition: Condition, halving: int) -> Tensor:
        """Take one step of the teacher from one number on its grid to another."""
        timesteps = self._timesteps(now)
        prediction = self.teacher.predict(noisy, timesteps, condition).float()
        if halving == 0 and self.config.guidance != 1.0:
            without = self.teacher.predict(noisy, timesteps, condition.without_labels()).float()
            low, high = self.config.guidance_interval
            level = timesteps / self.student.config.noise.timesteps
            scale = torch.where((level >= low) & (level <= high), self.config.guidance, 1.0)[:, None, None, None]
            prediction = without + scale * (prediction - without)
        kind = (self.student if halving else self.teacher).config.noise.prediction
        clean, noise = _clean_and_noise(prediction, noisy, self._levels(now), kind)
        alpha, sigma = self._levels(following)
        return alpha * clean + sigma * noise

    def _timesteps(self, numbers: Tensor) -> Tensor:
        return torch.tensor(self.timesteps, device=numbers.device)[numbers]

    def _levels(self, numbers: Tensor) -> Levels:
        alpha, sigma = (part[numbers.cpu()].to(numbers.device) for part in (self._alphas, self._sigmas))
        return alpha[:, None, None, None], sigma[:, None, None, None]


def _clean_and_noise(prediction: Tensor, noisy: Tensor, levels: Levels, kind: str) -> tuple[Tensor, Tensor]:
    """Turn what a network predicts, (B, z, h, w), into clean latents and noise."""
    alpha, sigma = levels
    if kind == "epsilon":
        return (noisy - sigma * prediction) / alpha, prediction
    clean = prediction if kind == "sample" else alpha * noisy - sigma * prediction
    return clean, (noisy - alpha * clean) / sigma


def _target_of_one_step(noisy: Tensor, reached: Tensor, before: Levels, after: Levels) -> Tensor:
    """Return the clean latents that lead from ``noisy`` to ``reached`` in one step of DDIM (Salimans & Ho 2022)."""
    ratio = after[1] / before[1]
    return (reached - ratio * noisy) / (after[0] - ratio * before[0])
