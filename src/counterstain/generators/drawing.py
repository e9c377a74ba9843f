"""Drawing with a trained latent diffusion model: whole images and redrawn instances, of any size.

Shapes: B = batch, n = references, S = style values, z = latent channels, h, w = rows and columns of the latents, H, W =
of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from counterstain.checkpoints import CheckpointHeader, load_checkpoint, rebuilt
from counterstain.config import build, build_stored
from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.data.sampling import stack
from counterstain.devices import choose_device, place
from counterstain.errors import ConfigError, InputError, MismatchError
from counterstain.generators.autoencoder import rebuilt_first_stage
from counterstain.generators.conditioning import Condition, dilated, latent_redraw_mask
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.diffusion_config import (
    DiffusionConfig,
    InpaintingConfig,
    SamplerConfig,
    WindowsConfig,
)
from counterstain.generators.interface import DrawRequest, fixed_batches, on_device, stacked
from counterstain.generators.pipeline import to_images
from counterstain.generators.samplers import Denoiser, KnownLatents, fresh_noise, sample, step_walk
from counterstain.generators.style import describe
from counterstain.generators.windows import WindowGrid, extended, windowed
from counterstain.seeding import torch_generator

DrawnAs = Literal["diffusion", "inpainting"]
LOSS_STEPS, LOSS_BATCH = 8, 32  # timesteps at which losses are taken, and patches at once


class DiffusionGenerator:
    """A trained diffusion model that draws whole images (``diffusion``) or redraws instances (``inpainting``)."""

    def __init__(
        self,
        model: Diffusion,
        method: DrawnAs = "diffusion",
        *,
        sampler: SamplerConfig | None = None,
        inpainting: InpaintingConfig | None = None,
        windows: WindowsConfig | None = None,
        device: torch.device | None = None,
        trained_px: int | None = None,
        header: CheckpointHeader | None = None,
    ) -> None:
        self.model = place(model.eval(), device or choose_device())
        self.method, self.trained_px, self.header = method, trained_px, header
        own = model.config
        self.draw_with(sampler or own.sampler, inpainting or own.inpainting, windows or own.windows)
        self.references_per_style = 1 if own.style is None else own.style.references

    @property
    def settings(self) -> dict[str, Any]:
        """How it draws, for the record."""
        parts: dict[str, Any] = {"sampler": self.sampler, "windows": self.windows}
        if self.method == "inpainting":
            parts["inpainting"] = self.inpainting
        if self.model.config.counterstain is not None:
            parts["counterstain"] = self.model.config.counterstain
        return {name: part.model_dump(mode="json") for name, part in parts.items()}

    def draw_with(self, sampler: SamplerConfig, inpainting: InpaintingConfig, windows: WindowsConfig) -> None:
        """Change how images are drawn; images larger than ``trained_px`` (None = any) are drawn in windows.

        Raises ConfigError where guidance is asked of a network that never trained without a mask, few steps of one that
        is not distilled, more steps than it has, or windows that it cannot halve as often as it must.
        """
        config = self.model.config
        if config.sampler.name == "few_step":  # it can draw in this way alone
            sampler = config.sampler.model_copy(update={"compute_batch": sampler.compute_batch})
        elif sampler.name == "few_step":
            raise ConfigError(
                "sampler.name few_step: this network is not distilled; run 'counterstain train distilled'"
            )
        if sampler.guidance != 1.0 and not config.condition_dropout:
            raise ConfigError("sampler.guidance: this network was trained without condition_dropout; use 1")
        if sampler.steps > config.noise.timesteps:
            raise ConfigError(f"sampler.steps {sampler.steps}: this network has {config.noise.timesteps}")
        unit = self.model.factor * config.halvings
        if (windows.window_px or 0) % unit:
            raise ConfigError(f"windows.window_px {windows.window_px}: must be a multiple of {unit}")
        self.sampler, self.inpainting, self.windows = sampler, inpainting, windows
        self.model.tiles = windows if self.trained_px else None

    @property
    def guidance(self) -> float | None:
        """Its classifier-free guidance; None of a distilled network, or one that never trained without a mask."""
        config = self.model.config
        return self.sampler.guidance if config.condition_dropout and config.sampler.name != "few_step" else None

    def guided(self, guidance: float) -> Self:
        """Return the same generator, with the same network, and another guidance."""
        other = copy(self)
        other.draw_with(self.sampler.model_copy(update={"guidance": guidance}), self.inpainting, self.windows)
        return other

    @classmethod
    def load(cls, folder: Path, method: DrawnAs = "diffusion", **drawing: Any) -> Self:
        """Load a checkpoint made by :func:`counterstain.generators.train.train_diffusion`.

        ``drawing`` are ``sampler``, ``inpainting`` and ``windows``; the checkpoint's own where not given.
        """
        header, state = load_checkpoint(folder, "diffusion")
        of_first = {name: state.pop(name) for name in list(state) if name.startswith("first_stage.")}
        stage_state = {name.removeprefix("first_stage."): value for name, value in of_first.items()}
        first_stage = rebuilt_first_stage(header.notes.get("first_stage"), stage_state, folder, header.size_px)
        config, labels = build_stored(DiffusionConfig, header.config, folder), header.taxonomy.num_labels
        model = rebuilt(lambda: Diffusion(config, first_stage, labels), state, folder)
        return cls(model, method, trained_px=header.size_px, header=header, **drawing)

    @torch.no_grad()
    def style_codes(self, references: Sequence[Patch]) -> np.ndarray:
        """Return the styles of reference patches, (n, S) float; ConfigError of a network trained without styles."""
        if self.model.style is None:
            raise ConfigError("synthesis.style: this network was trained without styles; train it with diffusion.style")
        codes = []
        for patch in references:  # one by one: a style must not round differently in other company
            described = describe([patch], self.trained_px or len(patch.image))
            codes.append(self.model.style(*(part[None].to(self.model.device) for part in described)))
        return torch.cat(codes).cpu().numpy()

    @torch.no_grad()
    def patch_losses(self, patches: Sequence[Patch], seed: int) -> np.ndarray:
        """Return the mean squared error of the denoiser on real patches of its own size, (n, LOSS_STEPS) float.

        Timesteps are spread evenly; each has one noise, the same for all patches. Labels, and nuclei where the network
        is shown them, are given; no surroundings and no style.
        """
        last, model = self.model.config.noise.timesteps, self.model

        def errors(part: list[Patch]) -> np.ndarray:
            tensors = {name: tensor.to(model.device) for name, tensor in stack(part, ("images", "labels")).items()}
            latents = model.encode(tensors["images"])
            condition = model.condition(tensors["labels"], tensors["images"])
            columns = []
            for number in range(LOSS_STEPS):
                noise = fresh_noise(latents.shape[1:], [torch_generator(seed, "loss", number)]).to(latents)
                timestep = (2 * number + 1) * last // (2 * LOSS_STEPS)
                columns.append(model.squared_errors(latents, noise.expand_as(latents), timestep, condition))
            return torch.stack(columns, dim=1).double().cpu().numpy()

        return np.stack(fixed_batches(errors, LOSS_BATCH, patches))

    @torch.no_grad()
    def draw(self, requests: Sequence[DrawRequest]) -> list[np.ndarray]:
        """Draw images; inpainting needs the real image and what of it is drawn anew, or raises InputError.

        The masks of one call have the same size, or MismatchError is raised.
        """
        if len({request.mask.shape for request in requests}) > 1:
            raise MismatchError("the masks of one call differ in size; draw each size in a call of its own")
        needed = [self._needed(request) for request in requests]
        size = needed[0].mask.shape if needed else ()
        one_window = self._window_px is None or size == (self._window_px, self._window_px)
        # Of larger images one at a time: its windows fill the batches.
        drawn = fixed_batches(self._draw, self.sampler.compute_batch if one_window else 1, needed)
        return [self._finished(request, image) for request, image in zip(requests, drawn, strict=True)]

    @property
    def _window_px(self) -> int | None:
        return None if self.trained_px is None else self.windows.window_px or self.trained_px

    def _needed(self, request: DrawRequest) -> DrawRequest:
        """Return what is drawn from, of a size that is at least a window and a whole number of latents."""
        mask, image, redraw = request.mask, request.image, request.redraw
        if self.method == "diffusion":
            redraw = None
            image = image if self.model.config.counterstain else None
        elif image is None or redraw is None:
            raise InputError("inpainting needs the real images and which pixels to redraw")
        if self._window_px is not None:
            size = self._window_px, self.model.factor
            mask = extended(mask, *size)
            image = None if image is None else extended(image, *size, by_edges=True)
            redraw = None if redraw is None else extended(redraw, *size)
        return DrawRequest(mask=mask, seed=request.seed, image=image, redraw=redraw, style=request.style)

    def _finished(self, request: DrawRequest, image: np.ndarray) -> np.ndarray:
        """Return an image of the size that was asked for, with the original's own pixels where they are kept."""
        height, width = request.mask.shape
        image = image[:height, :width]
        if self.method == "diffusion" or not self.inpainting.composite:
            return image
        assert request.image is not None
        assert request.redraw is not None
        return np.where(request.redraw[..., None], image, request.image)

    def _draw(self, requests: Sequence[DrawRequest]) -> np.ndarray:
        model, device, seeds = self.model, self.model.device, [request.seed for request in requests]
        masks, images, redraw, styles = (
            None if array is None else on_device(array, device)
            for array in (stacked(requests, field) for field in ("mask", "image", "redraw", "style"))
        )
        assert masks is not None
        inpainting: dict[str, Any] = {}
        if images is not None and redraw is not None:
            redraw, known = dilated(redraw, self.inpainting.dilation_px), model.encode(images)
            noise = [torch_generator(seed, "known") for seed in seeds]
            inpainting = {
                "blend": KnownLatents(known, latent_redraw_mask(redraw, model.factor), noise),
                "origin": known if self.inpainting.start == "original" else None,
                "walk": step_walk(self.sampler.steps, self.inpainting),
            }
        condition = model.condition(masks, images, redraw, styles)
        latents = sample(
            self._denoiser(condition),
            (model.latent_channels, *condition.labels.shape[2:]),
            [torch_generator(seed, "sample") for seed in seeds],
            model.config.noise,
            self.sampler,
            device=device,
            **inpainting,
        )
        return to_images(model.decode(latents))

    def _denoiser(self, condition: Condition) -> Denoiser:
        """Return the guided network for a condition, in windows where it is larger than one."""
        height, width = condition.labels.shape[2:]
        window = max(height, width) if self._window_px is None else self._window_px // self.model.factor
        grid = WindowGrid.over(height, width, window, round(window * self.windows.overlap))
        if len(grid) == 1:
            return lambda latents, timestep: self._guided(latents, timestep, condition)
        return windowed(self._guided, condition, grid, self.sampler.compute_batch)

    def _guided(self, latents: Tensor, timestep: int, condition: Condition) -> Tensor:
        low, high = self.sampler.guidance_interval
        inside = low <= timestep / self.model.config.noise.timesteps <= high
        if self.sampler.guidance == 1.0 or not inside:
            return self.model.predict(latents, timestep, condition)
        both = condition.followed_by(condition.without_labels())
        with_mask, without = self.model.predict(torch.cat([latents, latents]), timestep, both).chunk(2)
        return without + self.sampler.guidance * (with_mask - without)


def open_diffusion(checkpoint: Path, _: Cohort, settings: Mapping[str, Any], *, method: DrawnAs) -> DiffusionGenerator:
    """Open a checkpoint to draw whole images or to inpaint, with settings as plain values."""
    kinds: dict[str, type[Any]] = {"sampler": SamplerConfig, "inpainting": InpaintingConfig, "windows": WindowsConfig}
    given = {name: build(kinds[name], value, f"diffusion.{name}") for name, value in settings.items()}
    return DiffusionGenerator.load(checkpoint, method, **given)
