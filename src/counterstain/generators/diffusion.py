"""Latent diffusion conditioned on label masks (Rombach et al. 2022), for whole images and for inpainting.

Shapes: B = batch, L = labels, z = latent channels, h, w = rows and columns of the latents, H, W = of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from lightning.pytorch import LightningModule
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from counterstain.checkpoints import CheckpointHeader, load_checkpoint
from counterstain.config import Config, build
from counterstain.data.patches import Patch
from counterstain.data.sampling import SamplingConfig
from counterstain.errors import ConfigError, InputError
from counterstain.generators.autoencoder import Autoencoder, AutoencoderConfig
from counterstain.generators.conditioning import Shrinking, one_hot, shrink, to_images, to_tensor
from counterstain.generators.inpainting import InpaintingConfig, blend_known, composite, latent_redraw_mask
from counterstain.generators.interface import Method, evaluation_device, fixed_batches, on_device
from counterstain.generators.networks.style_encoder import StyleNetwork
from counterstain.generators.samplers import Denoiser, NoiseConfig, SamplerConfig, build_scheduler, fresh_noise, sample
from counterstain.generators.style import StyleConfig, describe
from counterstain.generators.windows import WindowGrid, WindowsConfig, extended, in_tiles, windowed
from counterstain.seeding import torch_generator
from counterstain.training import TrainingConfig, fused_optimizers

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023


class DiffusionConfig(Config):
    """The denoiser's network, noise, loss and training."""

    training: TrainingConfig
    """Steps, batch size, device."""
    sampling: SamplingConfig = SamplingConfig()
    """Which patches it trains on."""
    channels: Annotated[int, Field(ge=8)] = 64
    """Features at the latents' full size."""
    multipliers: Annotated[tuple[int, ...], Field(min_length=2)] = (1, 4, 8)
    """Features at each scale, as multiples of ``channels``."""
    blocks: Annotated[int, Field(ge=1)] = 2
    """Residual blocks at each scale."""
    attention_scales: Annotated[int, Field(ge=0)] = 0
    """How many of the lowest scales have attention; the middle block always has."""
    heads: Annotated[int, Field(ge=1)] = 8
    """Attention heads."""
    condition: Shrinking = "area"
    """How the label mask is brought to the size of the latents."""
    condition_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of training samples without a mask, for classifier-free guidance."""
    style: StyleConfig | None = None
    """Also show the network the style of a reference patch; None = no such input."""
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
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
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
        return self

    @property
    def scaled_lr(self) -> float:
        """The rate that the optimiser gets."""
        return self.lr * (self.training.batch_size if self.lr_scaling == "batch" else 1)


def build_denoiser(config: DiffusionConfig, latent_channels: int, num_labels: int) -> UNet2DModel:
    """Build diffusers' UNet: latents and condition in, prediction out."""
    widths = tuple(config.channels * m for m in config.multipliers)
    with_attention = [len(widths) - i <= config.attention_scales for i in range(len(widths))]
    return UNet2DModel(
        in_channels=latent_channels + num_labels,
        out_channels=latent_channels,
        block_out_channels=widths,
        layers_per_block=config.blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in with_attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(with_attention)),
        attention_head_dim=max(1, widths[-1] // config.heads),
        norm_num_groups=math.gcd(32, config.channels),
        class_embed_type="identity" if config.style else None,  # a style's embedding is added to the timestep's
    )


class Diffusion(LightningModule):
    """A denoiser of the latents of a trained autoencoder.

    Parameters
    ----------
    config : DiffusionConfig
    first_stage : Autoencoder
        Trained; it is kept fixed.
    num_labels : int
        Background and every subtype.
    seed : int
        Of timesteps, noise and dropout in training.
    """

    latent_mean: Tensor
    latent_sd: Tensor

    def __init__(self, config: DiffusionConfig, first_stage: Autoencoder, num_labels: int, seed: int = 0) -> None:
        super().__init__()
        self.config, self.num_labels, self.seed = config, num_labels, seed
        self.latent_channels, self.factor = first_stage.config.latent_channels, first_stage.config.factor
        self.unet = build_denoiser(config, self.latent_channels, num_labels)
        style = config.style
        self.style = StyleNetwork(style.width, style.code, 4 * config.channels) if style else None
        self.tiles: WindowsConfig | None = None  # for images larger than those of the training
        self.register_buffer("latent_mean", torch.zeros(self.latent_channels))
        self.register_buffer("latent_sd", torch.ones(self.latent_channels))
        # In a list, so that the fixed network is neither trained nor averaged.
        self._first_stage = [first_stage.eval().requires_grad_(requires_grad=False)]
        self._noising = DDPMScheduler(**config.noise.scheduler_settings())

    @property
    def first_stage(self) -> Autoencoder:
        """The autoencoder, on the denoiser's device."""
        return self._first_stage[0].to(self.device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 -> normalised latents (B, z, h, w)."""
        tensor = to_tensor(images)
        height, width = (size // self.factor for size in tensor.shape[2:])
        latents = in_tiles(
            self.first_stage.encode, tensor, self._tiling(height, width), reads=self.factor, blend=self._blends
        )
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
        overlap = self.tiles.decode_overlap_px if self._blends else 0
        return WindowGrid.over(height, width, self.tiles.decode_px // self.factor, overlap // self.factor)

    def condition(self, label_masks: Tensor) -> Tensor:
        """Labels (B, H, W) -> (B, L, h, w) float."""
        return shrink(one_hot(label_masks, self.num_labels), self.factor, self.config.condition)

    def without_labels(self, condition: Tensor) -> Tensor:
        """Take the labels out of a condition and leave what else is in it."""
        return torch.cat([torch.zeros_like(condition[:, : self.num_labels]), condition[:, self.num_labels :]], dim=1)

    def styled(self, condition: Tensor, styles: Tensor | None) -> Tensor:
        """Append styles (B, S), or that there is none, to the condition of a network that takes styles."""
        if self.style is None:
            return condition
        given = condition.new_zeros(len(condition), self.style.length) if styles is None else styles.to(condition)
        return self.style.beside(condition, given)

    def predict(self, latents: Tensor, timesteps: Tensor | int, condition: Tensor) -> Tensor:
        """Run the network on noisy latents (B, z, h, w)."""
        shown, style = (condition, None) if self.style is None else self.style.split(condition)
        prediction: Tensor = self.unet(torch.cat([latents, shown], dim=1), timesteps, style).sample
        return prediction

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Compute and log the loss of a batch."""
        del batch_idx
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Noise the latents, predict, compare; the batch holds ``latents`` or ``images``, and ``labels``."""
        latents = batch["latents"] if "latents" in batch else self.encode(batch["images"])
        timesteps, noise, keep = self._draws(batch, latents)
        noisy = self._noising.add_noise(latents, noise, timesteps)
        condition = self.styled(self.condition(batch["labels"]) * keep, self._training_styles(batch))
        prediction = self.predict(noisy, timesteps, condition)
        targets: dict[str, Callable[[], Tensor]] = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: self._noising.get_velocity(latents, noise, timesteps),
            "sample": lambda: latents,
        }
        target = targets[self.config.noise.prediction]()
        return self._distance(prediction, target, timesteps)

    def configure_optimizers(self) -> Any:
        """AdamW (Adam without decay), warm-up, then constant or cosine."""
        config = self.config
        optimizer = torch.optim.AdamW(
            [*self.unet.parameters(), *(self.style.parameters() if self.style else ())],
            config.scaled_lr,
            weight_decay=config.weight_decay,
            fused=fused_optimizers(config.training),
        )

        def rate(step: int) -> float:
            rising = min(1.0, (step + 1) / (config.warmup_steps + 1))
            falling = 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.training.steps)))
            return rising * (falling if config.lr_schedule == "cosine" else 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _draws(self, batch: dict[str, Tensor], latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps (B,), noise (B, z, h, w) and whether each sample keeps its mask, (B, 1, 1, 1)."""
        step = int(batch["step"])
        generators = [torch_generator(self.seed, "noise", step, p) for p in batch["position"].tolist()]
        timesteps = [torch.randint(self.config.noise.timesteps, (), generator=g) for g in generators]
        keep = [torch.rand((), generator=g) >= self.config.condition_dropout for g in generators]
        noise = fresh_noise(latents.shape[1:], generators)
        kept = torch.stack(keep).float()[:, None, None, None]
        return torch.stack(timesteps).to(self.device), noise.to(latents), kept.to(self.device)

    def _training_styles(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Styles (B, S) of a batch's references, some of them dropped."""
        if self.style is None or self.config.style is None:
            return None
        step, dropout = int(batch["step"]), self.config.style.dropout
        generators = [torch_generator(self.seed, "style", step, p) for p in batch["position"].tolist()]
        kept = torch.stack([torch.rand((), generator=g) >= dropout for g in generators]).float()
        styles: Tensor = self.style(batch["style_seen"], batch["style_stain"])
        return styles * kept[:, None].to(styles)

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

    def draw_with(
        self, sampler: SamplerConfig, inpainting: InpaintingConfig, windows: WindowsConfig | None = None
    ) -> None:
        """Change how images are drawn; images larger than ``trained_px`` (None = any) are drawn in windows.

        Raises
        ------
        ConfigError
            Guidance is asked of a network that never trained without a mask, or windows that it cannot halve as often
            as it must.
        """
        if sampler.guidance != 1.0 and not self.model.config.condition_dropout:
            raise ConfigError("sampler.guidance: this network was trained without condition_dropout; use 1")
        self.sampler, self.inpainting = sampler, inpainting
        self.windows = windows or self.model.config.windows
        unit = self.model.factor * 2 ** (len(self.model.config.multipliers) - 1)
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
        settings = build(AutoencoderConfig, header.notes["first_stage"], folder)
        first_stage = Autoencoder(settings.for_use(), header.size_px)
        first_stage.load_state_dict(
            {k.removeprefix("first_stage."): v for k, v in state.items() if k.startswith("first_stage.")}
        )
        model = Diffusion(build(DiffusionConfig, header.config, folder), first_stage, header.taxonomy.num_labels)
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith("first_stage.")})
        return cls(model, method, sampler=sampler, inpainting=inpainting, trained_px=header.size_px), header

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
        codes = [self.model.style(*(part.to(device) for part in describe([patch]))) for patch in references]
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
            images = redraw = None
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
        condition = model.condition(on_device(label_masks, device))
        condition = model.styled(condition, None if styles is None else on_device(styles, device))
        shape = (model.latent_channels, *condition.shape[2:])
        blend = None
        if images is not None and redraw is not None:
            mask = latent_redraw_mask(on_device(redraw, device), model.factor, self.inpainting.dilation_px)
            known = model.encode(on_device(images, device))
            noise = fresh_noise(shape, [torch_generator(seed, "known") for seed in seeds]).to(device)
            blend = blend_known(known, mask, noise, build_scheduler(model.config.noise, self.sampler))
        generators = [torch_generator(seed, "sample") for seed in seeds]
        latents = sample(
            self._denoiser(condition),
            shape,
            generators,
            model.config.noise,
            self.sampler,
            device=device,
            blend=blend,
        )
        return to_images(model.decode(latents))

    def _guided(self, latents: Tensor, timestep: int, condition: Tensor) -> Tensor:
        low, high = self.sampler.guidance_interval
        inside = low <= timestep / self.model.config.noise.timesteps <= high
        if self.sampler.guidance == 1.0 or not inside:
            return self.model.predict(latents, timestep, condition)
        conditions = torch.cat([condition, self.model.without_labels(condition)])
        both = self.model.predict(torch.cat([latents, latents]), timestep, conditions)
        with_mask, without = both.chunk(2)
        return without + self.sampler.guidance * (with_mask - without)
