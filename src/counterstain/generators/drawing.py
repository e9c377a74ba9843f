"""Drawing with a trained latent diffusion model: whole images and redrawn instances, of any size.

Shapes: B = batch, n = images asked for, L = labels, S = style values, z = latent channels, h, w = rows and columns of
the latents, H, W = of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from counterstain.checkpoints import CheckpointHeader, load_checkpoint
from counterstain.config import build_stored
from counterstain.data.patches import Patch
from counterstain.errors import ConfigError, InputError
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.autoencoder_config import AutoencoderConfig
from counterstain.generators.conditioning import to_images
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.diffusion_config import (
    CounterstainConfig,
    DiffusionConfig,
    InpaintingConfig,
    SamplerConfig,
    WindowsConfig,
)
from counterstain.generators.inpainting import KnownLatents, composite, dilated, latent_redraw_mask, step_walk
from counterstain.generators.interface import evaluation_device, fixed_batches, on_device
from counterstain.generators.methods import Method
from counterstain.generators.samplers import Denoiser, build_scheduler, sample
from counterstain.generators.style import describe
from counterstain.generators.windows import WindowGrid, extended, windowed
from counterstain.seeding import torch_generator


class DiffusionGenerator:
    """A trained diffusion model that draws whole images (``diffusion``) or redraws instances (``inpainting``)."""

    def __init__(
        self,
        model: Diffusion,
        method: Literal["diffusion", "inpainting"] = "diffusion",
        *,
        sampler: SamplerConfig | None = None,
        inpainting: InpaintingConfig | None = None,
        device: torch.device | None = None,
        trained_px: int | None = None,
    ) -> None:
        self.model = model.eval().to(device or evaluation_device())
        self.method: Method = method
        self.trained_px = trained_px
        self.draw_with(sampler or model.config.sampler, inpainting or model.config.inpainting)

    @property
    def counterstain(self) -> CounterstainConfig | None:
        """How images are shown the nuclei of the real ones; None = they are not."""
        return self.model.config.counterstain

    def draw_with(
        self, sampler: SamplerConfig, inpainting: InpaintingConfig, windows: WindowsConfig | None = None
    ) -> None:
        """Change how images are drawn; images larger than ``trained_px`` (None = any) are drawn in windows.

        Raises
        ------
        ConfigError
            Guidance is asked of a network that never trained without a mask, few steps of one that is not distilled,
            more steps than it has, or windows that it cannot halve as often as it must.
        """
        own = self.model.config.sampler
        if own.name == "few_step":  # it can draw in this way alone
            sampler = own.model_copy(update={"compute_batch": sampler.compute_batch})
        elif sampler.name == "few_step":
            raise ConfigError(
                "sampler.name few_step: this network is not distilled; run 'counterstain train distilled'"
            )
        if sampler.guidance != 1.0 and not self.model.config.condition_dropout:
            raise ConfigError("sampler.guidance: this network was trained without condition_dropout; use 1")
        if sampler.steps > self.model.config.noise.timesteps:
            raise ConfigError(f"sampler.steps {sampler.steps}: this network has {self.model.config.noise.timesteps}")
        self.sampler, self.inpainting = sampler, inpainting
        self.windows = windows or self.model.config.windows
        unit = self.model.factor * self.model.config.halvings
        if (self.windows.window_px or 0) % unit:
            raise ConfigError(f"windows.window_px {self.windows.window_px}: must be a multiple of {unit}")
        self.model.tiles = self.windows if self.trained_px else None

    @classmethod
    def load(
        cls,
        folder: Path,
        method: Literal["diffusion", "inpainting"] = "diffusion",
        *,
        sampler: SamplerConfig | None = None,
        inpainting: InpaintingConfig | None = None,
    ) -> tuple[Self, CheckpointHeader]:
        """Load a checkpoint made by :func:`counterstain.generators.train.train_diffusion`."""
        header, state = load_checkpoint(folder, "diffusion")
        settings = build_stored(AutoencoderConfig, header.notes["first_stage"], folder)
        first_stage = Autoencoder(settings.for_use(), header.size_px)
        first_stage.load_state_dict(
            {k.removeprefix("first_stage."): v for k, v in state.items() if k.startswith("first_stage.")}
        )
        model = Diffusion(build_stored(DiffusionConfig, header.config, folder), first_stage, header.taxonomy.num_labels)
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith("first_stage.")})
        return cls(model, method, sampler=sampler, inpainting=inpainting, trained_px=header.size_px), header

    @property
    def references_per_style(self) -> int:
        """How many references' styles were averaged in training; 1 without styles."""
        style = self.model.config.style
        return 1 if style is None else style.references

    @torch.no_grad()
    def style_codes(self, references: Sequence[Patch]) -> np.ndarray:
        """Return the styles of reference patches, (n, S) float, for :meth:`generate`.

        Raises
        ------
        ConfigError
            The network was trained without styles.
        """
        if self.model.style is None:
            raise ConfigError("synthesis.style: this network was trained without styles; train it with diffusion.style")
        device = self.model.device
        # One by one: a style must not round differently in other company.
        codes = []
        for patch in references:
            described = describe([patch], self.trained_px or len(patch.image))
            codes.append(self.model.style(*(part[None].to(device) for part in described)))
        return torch.cat(codes).cpu().numpy()

    @torch.no_grad()
    def generate(
        self,
        label_masks: np.ndarray,
        seeds: Sequence[int],
        images: np.ndarray | None = None,
        redraw: np.ndarray | None = None,
        *,
        instances: np.ndarray | None = None,
        slides: Sequence[str] | None = None,
        styles: np.ndarray | None = None,
    ) -> np.ndarray:
        """Draw images; inpainting needs ``images`` and ``redraw``; ``styles`` come from :meth:`style_codes`."""
        del instances, slides
        if self.method == "diffusion":
            redraw = None
            images = images if self.counterstain else None
        elif images is None or redraw is None:
            raise InputError("inpainting needs the real images and which pixels to redraw")
        height, width = label_masks.shape[1:]
        arrays = self._extended(label_masks, images, redraw)
        one_window = self._window_px is None or arrays[0].shape[1:] == (self._window_px, self._window_px)
        # Of larger images one at a time: its windows fill the batches.
        batch = self.sampler.compute_batch if one_window else 1
        drawn = np.concatenate(list(fixed_batches(self._draw, batch, seeds, *arrays, styles)))[:, :height, :width]
        if images is not None and redraw is not None and self.inpainting.composite:
            drawn = composite(drawn, images, redraw)
        return drawn

    @property
    def _window_px(self) -> int | None:
        return None if self.trained_px is None else self.windows.window_px or self.trained_px

    def _extended(
        self, label_masks: np.ndarray, images: np.ndarray | None, redraw: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Bring all to a size that is at least a window and a whole number of latents."""
        if self._window_px is None:
            return label_masks, images, redraw
        size = self._window_px, self.model.factor
        return (
            extended(label_masks, *size),
            None if images is None else extended(images, *size, by_edges=True),
            None if redraw is None else extended(redraw, *size),
        )

    def _denoiser(self, condition: Tensor) -> Denoiser:
        """Return the guided network for a condition, in windows where it is larger than one."""
        height, width = condition.shape[2:]
        window = max(height, width) if self._window_px is None else self._window_px // self.model.factor
        grid = WindowGrid.over(height, width, window, round(window * self.windows.overlap))
        if len(grid) == 1:
            return lambda latents, timestep: self._guided(latents, timestep, condition)
        return windowed(self._guided, condition, grid, self.sampler.compute_batch)

    def _draw(
        self,
        seeds: Sequence[int],
        label_masks: np.ndarray,
        images: np.ndarray | None,
        redraw: np.ndarray | None,
        styles: np.ndarray | None,
    ) -> np.ndarray:
        model, device = self.model, self.model.device
        real = None if images is None else on_device(images, device)
        condition = model.with_counterstain(model.condition(on_device(label_masks, device)), real)
        shape = (model.latent_channels, *condition.shape[2:])
        if real is None or redraw is None:
            condition, inpainting = model.with_context(condition), {}
        else:
            redrawn = dilated(on_device(redraw, device), self.inpainting.dilation_px)
            condition = model.with_context(condition, real, redrawn)
            inpainting = self._redrawing(model.encode(real), redrawn, seeds)
        condition = model.styled(condition, None if styles is None else on_device(styles, device))
        latents = sample(
            self._denoiser(condition),
            shape,
            [torch_generator(seed, "sample") for seed in seeds],
            model.config.noise,
            self.sampler,
            device=device,
            **inpainting,
        )
        return to_images(model.decode(latents))

    def _redrawing(self, known: Tensor, redrawn: Tensor, seeds: Sequence[int]) -> dict[str, Any]:
        """Return what :func:`sample` needs to keep the latents ``known`` outside the pixels ``redrawn``."""
        mask = latent_redraw_mask(redrawn, self.model.factor, 0)
        scheduler = build_scheduler(self.model.config.noise, self.sampler)
        return {
            "blend": KnownLatents(known, mask, [torch_generator(seed, "known") for seed in seeds], scheduler),
            "origin": known if self.inpainting.start == "original" else None,
            "walk": step_walk(self.sampler.steps, self.inpainting),
        }

    def _guided(self, latents: Tensor, timestep: int, condition: Tensor) -> Tensor:
        low, high = self.sampler.guidance_interval
        inside = low <= timestep / self.model.config.noise.timesteps <= high
        if self.sampler.guidance == 1.0 or not inside:
            return self.model.predict(latents, timestep, condition)
        conditions = torch.cat([condition, self.model.without_labels(condition)])
        both = self.model.predict(torch.cat([latents, latents]), timestep, conditions)
        with_mask, without = both.chunk(2)
        return without + self.sampler.guidance * (with_mask - without)
