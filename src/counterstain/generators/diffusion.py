"""Latent diffusion conditioned on label masks (Rombach et al. 2022): the denoiser, its loss, and the batches of latents
that it learns from.

Shapes: B = batch, z = latent channels, h, w = rows and columns of the latents, S = length of a style vector.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional

from counterstain.checkpoints import POOL_FOLDER, mapped_tensors, save_tensors
from counterstain.data.sampling import PatchBatches, PatchSampler, stack
from counterstain.devices import fused_optimizers, place, rank, started_processes
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.conditioning import (
    Condition,
    draw_redrawn,
    kept_samples,
    nuclei_shown,
    surroundings,
    to_tensor,
)
from counterstain.generators.diffusion_config import DiffusionConfig, WindowsConfig
from counterstain.generators.pipeline import StyleNetwork, nuclei_channels, one_hot, shrink
from counterstain.generators.samplers import fresh_noise
from counterstain.generators.style import StyleReferences, references_of
from counterstain.generators.windows import WindowGrid, in_tiles
from counterstain.progress import bar
from counterstain.seeding import torch_generator
from counterstain.training import Batches, Trainable, cosine

ENCODE_BATCH = 64  # patches that are encoded at once, and that a file of a pool holds
WAIT_S = 0.5  # between looks for the files of other processes
TILE_OVERLAP_PX = 64  # what tiles of the first stage share, blended
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023


def build_denoiser(config: DiffusionConfig, latent_channels: int, condition_channels: int) -> UNet2DModel:
    """Build diffusers' UNet: latents and condition in, prediction out."""
    widths = tuple(config.channels * m for m in config.multipliers)
    with_attention = [len(widths) - i <= config.attention_scales for i in range(len(widths))]
    return UNet2DModel(
        in_channels=latent_channels + condition_channels,
        out_channels=latent_channels,
        block_out_channels=widths,
        layers_per_block=config.blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in with_attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(with_attention)),
        attention_head_dim=max(1, widths[-1] // config.heads),
        norm_num_groups=math.gcd(32, config.channels),
        class_embed_type="identity" if config.style else None,  # a style's embedding is added to the timestep's
    )


class Diffusion(Trainable):
    """A denoiser of the latents of a trained first stage, which is kept fixed.

    ``num_labels`` counts background and every subtype; timesteps, noise and dropout of the training follow ``seed``.
    """

    latent_mean: Tensor
    latent_sd: Tensor

    def __init__(self, config: DiffusionConfig, first_stage: Autoencoder, num_labels: int, seed: int = 0) -> None:
        super().__init__()
        self.config, self.num_labels, self.seed = config, num_labels, seed
        self.latent_channels, self.factor = first_stage.config.latent_channels, first_stage.config.factor
        nuclei = nuclei_channels(self.factor) if config.counterstain else 0
        context = self.latent_channels + 1 if config.context_share else 0
        self.unet = build_denoiser(config, self.latent_channels, num_labels + nuclei + context)
        style = config.style
        self.style = StyleNetwork(style.width, style.code, 4 * config.channels) if style else None
        self.tiles: WindowsConfig | None = None  # for images larger than those of the training
        self.register_buffer("latent_mean", torch.zeros(self.latent_channels))
        self.register_buffer("latent_sd", torch.ones(self.latent_channels))
        # In a list, so that the fixed network is neither trained nor averaged.
        self._first_stage = [first_stage.eval().requires_grad_(requires_grad=False)]
        with torch.device("cpu"):  # even where the weights are yet to come
            self._noising = DDPMScheduler(**config.noise.scheduler_settings())

    @property
    def first_stage(self) -> Autoencoder:
        """The autoencoder, on the denoiser's device."""
        return place(self._first_stage[0], self.device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 -> normalised latents (B, z, h, w)."""
        tensor = to_tensor(images)
        grid = self._tiling(*(size // self.factor for size in tensor.shape[2:]))
        latents = in_tiles(self.first_stage.encode, tensor, grid, reads=self.factor, blend=self._blends)
        return (latents - self.latent_mean[:, None, None]) / self.latent_sd[:, None, None]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, z, h, w) -> images (B, 3, H, W) float, about -1..1."""
        plain = latents * self.latent_sd[:, None, None] + self.latent_mean[:, None, None]
        grid = self._tiling(*latents.shape[2:])
        return in_tiles(self.first_stage.decode, plain, grid, writes=self.factor, blend=self._blends)

    @property
    def _blends(self) -> bool:
        return self.first_stage.config.kind != "linear"  # its blocks do not see each other: tiles agree

    def _tiling(self, height: int, width: int) -> WindowGrid:
        """Tiles of the first stage over (height, width) latents; one for all where no tiles are asked for."""
        if self.tiles is None:
            return WindowGrid.over(height, width, max(height, width), 0)
        overlap = TILE_OVERLAP_PX if self._blends else 0
        return WindowGrid.over(height, width, self.tiles.decode_px // self.factor, overlap // self.factor)

    def condition(
        self,
        label_masks: Tensor,
        images: Tensor | None = None,
        redraw: Tensor | None = None,
        styles: Tensor | None = None,
    ) -> Condition:
        """Return all that the network is shown when it draws masks (B, H, W) uint8.

        Networks that are shown nuclei keep those of ``images`` (B, H, W, 3) uint8, of which ``redraw`` (B, H, W) bool
        is drawn anew (without it nothing is kept); networks that know ``styles`` (B, S) are told where there is none.
        """
        labels = self._labels(label_masks)
        nuclei = context = style = None
        if self.config.counterstain is not None:
            nuclei = nuclei_shown(images, self.config.counterstain, self.factor, labels)
        if self.config.context_share and images is not None and redraw is not None:
            context = surroundings(self.encode, images, redraw, self.factor)
        elif self.config.context_share:
            nothing = labels.new_zeros((len(labels), self.latent_channels, *labels.shape[2:]))
            context = torch.cat([nothing, torch.ones_like(labels[:, :1])], dim=1)
        if self.style is not None:
            style = labels.new_zeros(len(labels), self.style.length) if styles is None else styles.to(labels)
        return Condition(labels=labels, nuclei=nuclei, context=context, style=style)

    def training_condition(self, batch: dict[str, Tensor], keep: Tensor | None = None) -> Condition:
        """Return all that the network is shown in training, the labels only where ``keep``, (B, 1, 1, 1), is 1."""
        labels = self._labels(batch["labels"])
        nuclei = context = style = None
        if (shown := self.config.counterstain) is not None:
            nuclei = batch.get("counterstain")
            if nuclei is None:
                nuclei = nuclei_shown(batch["images"], shown, self.factor, labels)
            kept = kept_samples(batch, self.seed, "counterstain", shown.dropout).to(labels)
            nuclei = nuclei.to(labels) * kept[:, None, None, None]
        if self.config.context_share:
            context = batch.get("context")
            if context is None:
                context = self.training_context(batch, int(batch["step"]), batch["position"].tolist())
        if self.style is not None and self.config.style is not None:
            styles: Tensor = self.style(batch["style_seen"], batch["style_stain"])
            kept = kept_samples(batch, self.seed, "style", self.config.style.dropout)
            style = (styles * kept[:, None].to(styles)).to(labels)
        return Condition(labels=labels if keep is None else labels * keep, nuclei=nuclei, context=context, style=style)

    def training_context(self, batch: dict[str, Tensor], step: int, positions: Sequence[int]) -> Tensor:
        """Choose what is redrawn in each patch of a batch and return the rest, (B, z + 1, h, w)."""
        generators = [torch_generator(self.seed, "context", step, p) for p in positions]
        redraw = draw_redrawn(batch["instances"], self.config.context_share, 2 * self.factor, generators)
        return surroundings(self.encode, batch["images"], redraw, self.factor)

    def _labels(self, label_masks: Tensor) -> Tensor:
        return shrink(one_hot(label_masks, self.num_labels), self.factor, self.config.condition)

    def clean_latents(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the latents (B, z, h, w) of a batch that holds ``latents`` or ``images``."""
        return batch["latents"] if "latents" in batch else self.encode(batch["images"])

    def predict(self, latents: Tensor, timesteps: Tensor | int, condition: Condition) -> Tensor:
        """Run the network on noisy latents (B, z, h, w)."""
        style = None if self.style is None else self.style.embedding(condition.style)
        prediction: Tensor = self.unet(torch.cat([latents, condition.cat()], dim=1), timesteps, style).sample
        return prediction

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Noise the latents, predict, compare; the batch holds ``latents`` or ``images``, and ``labels``."""
        latents = self.clean_latents(batch)
        timesteps, noise, keep = self._draws(batch, latents)
        noisy = self._noising.add_noise(latents, noise, timesteps)
        prediction = self.predict(noisy, timesteps, self.training_condition(batch, keep))
        return {"loss": self._distance(prediction, self._target(latents, noise, timesteps), timesteps)}

    @torch.no_grad()
    def squared_errors(self, latents: Tensor, noise: Tensor, timestep: int, condition: Condition) -> Tensor:
        """Return how far the prediction for latents (B, z, h, w) with this noise is off, (B,): a mean of squares."""
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        prediction = self.predict(self._noising.add_noise(latents, noise, timesteps), timesteps, condition)
        return (prediction - self._target(latents, noise, timesteps)).pow(2).flatten(1).mean(1)

    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        target = {"epsilon": noise, "sample": latents}.get(self.config.noise.prediction)
        return self._noising.get_velocity(latents, noise, timesteps) if target is None else target

    def networks(self) -> Iterable[nn.Module]:
        """Return the denoiser, what encodes styles, and the fixed encoder of patches."""
        return (*self.children(), *self.first_stage.encoders())

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW without decay, which is Adam."""
        weights = [*self.unet.parameters(), *(self.style.parameters() if self.style else ())]
        fused = fused_optimizers(self.config.training)
        return [torch.optim.AdamW(weights, self.config.scaled_lr, weight_decay=0.0, fused=fused)]

    def learning_rate(self, step: int) -> float:
        """Warm-up, then constant or cosine."""
        rising = min(1.0, (step + 1) / (self.config.warmup_steps + 1))
        return rising * (cosine(step, self.config.training.steps) if self.config.lr_schedule == "cosine" else 1.0)

    def _draws(self, batch: dict[str, Tensor], latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps (B,), noise (B, z, h, w) and whether each sample keeps its mask, (B, 1, 1, 1)."""
        step = int(batch["step"])
        generators = [torch_generator(self.seed, "noise", step, p) for p in batch["position"].tolist()]
        timesteps = [torch.randint(self.config.noise.timesteps, (), generator=g) for g in generators]
        keep = [torch.rand((), generator=g) >= self.config.condition_dropout for g in generators]
        noise = fresh_noise(latents.shape[1:], generators)
        kept = torch.stack(keep).float()[:, None, None, None]
        ahead = partial(Tensor.to, non_blocking=True)  # or every step would wait for the GPU to catch up
        return ahead(torch.stack(timesteps), self.device), ahead(noise, latents), ahead(kept, self.device)

    def _distance(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        if self.config.loss == "l1":
            return functional.l1_loss(prediction, target)
        squared = (prediction - target).pow(2).flatten(1).mean(1)
        if self.config.loss == "min-snr":
            alphas = self._noising.alphas_cumprod.to(timesteps.device)[timesteps]
            snr = alphas / (1 - alphas)
            per_target = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
            weight = snr.clamp(max=MIN_SNR_GAMMA) / per_target[self.config.noise.prediction].clamp(min=1e-8)
            squared = squared * weight
        return squared.mean()


@torch.no_grad()
def measure_latents(model: Diffusion, sampler: PatchSampler, patches: int = 256) -> None:
    """Set the mean and standard deviation of the latents' channels, as ``normalise_latents`` says."""
    batches = (stack([sampler[i] for i in range(n, n + 16)], ["images"])["images"] for n in range(0, patches, 16))
    latents = torch.cat([model.encode(images.to(model.device)) for images in batches])
    sd = latents.std((0, 2, 3))
    if model.config.normalise_latents == "all":
        sd = sd.pow(2).mean().sqrt().expand_as(sd)
    model.latent_mean.copy_(latents.mean((0, 2, 3)))
    model.latent_sd.copy_(sd.clamp(min=1e-6))


def diffusion_batches(model: Diffusion, sampler: PatchSampler, size_px: int, seed: int, folder: Path) -> Batches:
    """Return the function step -> batch of patches, with references.

    Where the configuration says so, they are encoded once, into the training's ``folder``.
    """
    config, batch_size = model.config, model.config.training.batch_size
    references = None if config.style is None else references_of(sampler.cohort, size_px, seed)
    if config.latent_pool is not None:
        return _pooled(model, sampler, config.latent_pool, references, folder / POOL_FOLDER)
    parts = ("images", "labels", *(("instances",) if config.context_share else ()))
    if config.style is None or references is None:
        return PatchBatches(sampler, batch_size, parts)
    count = config.style.references

    def batch(step: int) -> dict[str, Tensor]:
        numbers = range(step * batch_size, (step + 1) * batch_size)
        patches = [sampler[i] for i in numbers]
        return stack(patches, parts) | references.described(references.choose_for(patches, numbers, count))

    return batch


def _pooled(
    model: Diffusion, sampler: PatchSampler, pool: int, references: StyleReferences | None, folder: Path
) -> Batches:
    """Encode the first ``pool`` patches once, on disk; batches are runs of a fresh shuffle for each pass.

    The files are mapped into memory, which all processes and workers share. Processes that share a training encode
    every n-th file each; an interrupted call keeps those that it finished.
    """
    batch_size = model.config.training.batch_size
    runs = [range(first, min(first + ENCODE_BATCH, pool)) for first in range(0, pool, ENCODE_BATCH)]
    files = [folder / f"{members[0]:09d}.pt" for members in runs]
    with bar("encoding", pool) if rank() == 0 else nullcontext(lambda _: None) as advance:
        for number, (file, members) in enumerate(zip(files, runs, strict=True)):
            if number % started_processes() == rank() and not file.exists():
                save_tensors(file, _encoded(model, sampler, members, references))
            advance(len(members))
    while not all(file.exists() for file in files):
        time.sleep(WAIT_S)
    encoded = [mapped_tensors(file) for file in files]

    @lru_cache(maxsize=2)
    def order(turn: int) -> Tensor:
        return torch.randperm(pool, generator=torch_generator(model.seed, "pool", turn))

    def batch(step: int) -> dict[str, Tensor]:
        numbers = range(step * batch_size, (step + 1) * batch_size)
        places = [divmod(int(order(n // pool)[n % pool]), ENCODE_BATCH) for n in numbers]
        found = {name: torch.cat([encoded[file][name][i : i + 1] for file, i in places]) for name in encoded[0]}
        return found if references is None else found | references.described(found.pop("references"))

    return batch


def _encoded(
    model: Diffusion, sampler: PatchSampler, members: range, references: StyleReferences | None
) -> dict[str, Tensor]:
    """Return what a pool keeps of some patches."""
    patches, config = [sampler[i] for i in members], model.config
    part = {name: tensor.to(model.device) for name, tensor in stack(patches).items()}
    kept = {"latents": model.encode(part["images"]), "labels": part["labels"]}
    if config.style is not None and references is not None:
        kept["references"] = references.choose_for(patches, members, config.style.references)
    if config.counterstain is not None:
        kept["counterstain"] = nuclei_shown(part["images"], config.counterstain, model.factor, part["labels"]).half()
    if config.context_share:
        kept["context"] = model.training_context(part, 0, members)
    return {name: tensor.cpu() for name, tensor in kept.items()}
