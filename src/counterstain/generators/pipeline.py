"""Draw tissue for label masks with diffusers alone: a custom pipeline, and what diffusers itself lacks for it.

Every exported diffusion checkpoint holds a copy of this file, which plain diffusers loads. It therefore imports nothing
of counterstain; counterstain itself draws with the same functions and networks. Licensed under Apache-2.0.

Shapes: B = batch, L = labels (background and subtypes), f = pixels of a latent's edge, z = latent channels, n =
references of a style, s = edge of what is seen of them, S = length of a style vector (the learned code, six stain
statistics, and 1 where a style is given), H, W = rows and columns in pixels, h, w = of the latents.
"""

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from torch.nn import functional

BACKGROUND, IGNORE = 0, 255
SEEN_PX = 64  # edge of what the encoder of styles sees of a reference
STAIN_VALUES = 6
STYLE_HALVINGS = 4

BLEED = 0.1  # of the other stain's amount is read as haematoxylin
SATURATION = 2.0  # amount of the other stain, in optical density, that hides half of the haematoxylin under it
HIDDEN = 0.3  # amount of the other stain, in optical density, from which on haematoxylin is filled in
STEEPNESS = 4  # of the step between what is seen and what is filled in
LEAST_SEEN = 1e-3
NOISE_UM, FILL_UM = 0.5, 2.5  # standard deviations: noise of pixels, and as far as from a membrane to what lies beside
SPREAD_WIDTH = 4.0  # the spread is taken over so many times the width of the mean
FLAT = 0.02  # added to the spread, in optical density: noise of empty glass is no structure
TYPICAL = 0.5  # difference of nuclei to their surroundings, in optical density
FURTHEST = 3.0  # in units of the spread, or of what is typical
GAUSSIAN_WIDTHS = 3.0  # radius of a kernel in standard deviations


# What the denoiser is shown


def one_hot(label_masks: Tensor, num_labels: int) -> Tensor:
    """Turn labels, (B, H, W) uint8, into (B, L, H, W) float; ignored pixels count as background."""
    labels = torch.where(label_masks == IGNORE, BACKGROUND, label_masks).long()
    return functional.one_hot(labels, num_labels).movedim(-1, 1).float()


def shrink(condition: Tensor, factor: int, how: str) -> Tensor:
    """Bring a condition, (B, L, H, W), to the size of the latents.

    ``area`` gives the share of each label under a latent, ``bilinear`` looks at the four pixels in its middle alone.
    """
    if how == "area" or factor == 1:
        return functional.avg_pool2d(condition, factor)
    return functional.interpolate(condition, scale_factor=1 / factor, mode="bilinear", align_corners=False)


def nuclei_map(images: Tensor, *, amounts: Tensor, local_px: float, um_px: float, shows: str, hidden: str) -> Tensor:
    """Read the nuclei off images (B, H, W, 3) uint8.

    Haematoxylin is unmixed from the other stain and a residual by ``amounts`` (3, 2), which turns optical density into
    amounts of both (Ruifrok & Johnston 2001). Where the other stain is strong the law of absorption fails, and some of
    it is left in what is unmixed; this is taken off, or what is ``hidden`` is ``filled`` in from around, weighted by
    how much of it is seen (normalised convolution, Knutsson & Westin 1993). Of the rest the mean over ``local_px`` is
    taken off; for ``structure`` the difference is divided by its local standard deviation. ``um_px`` are the pixels of
    a micrometre. The result, (B, 1, H, W) float, -1..1, is positive where there is more haematoxylin than around.
    """
    density = -torch.log(images.clamp(min=1).float() / 255)
    unmixed = (density @ amounts.to(images.device)).movedim(-1, 1)
    other = unmixed[:, 1:].clamp(min=0)
    amount = unmixed[:, :1] - BLEED * other
    if hidden == "filled":
        seen = 1 / (1 + (_smooth(other, NOISE_UM * um_px) / HIDDEN).pow(STEEPNESS)) + LEAST_SEEN
        amount = seen * amount + (1 - seen) * _smooth(amount, FILL_UM * um_px, seen)
        difference = amount - _smooth(amount, local_px, seen)
    else:
        amount = amount / (1 + (other / SATURATION).square())
        difference = amount - _smooth(amount, local_px)
    unit: Tensor | float = TYPICAL
    if shows == "structure":
        unit = _smooth(difference.square(), SPREAD_WIDTH * local_px).sqrt() + FLAT
    return (difference / unit).clamp(-FURTHEST, FURTHEST) / FURTHEST


def _smooth(maps: Tensor, sd_px: float, weights: Tensor | None = None) -> Tensor:
    """Convolve (B, 1, H, W) with a Gaussian; pixels count by their weights, those outside the image not at all."""
    if weights is None:
        return _blurred(maps, sd_px) / _blurred(torch.ones_like(maps[:1]), sd_px)
    return _blurred(maps * weights, sd_px) / _blurred(weights, sd_px)


def _blurred(maps: Tensor, sd_px: float) -> Tensor:
    radius = round(GAUSSIAN_WIDTHS * sd_px)
    kernel = torch.exp(-torch.arange(-radius, radius + 1, device=maps.device).float().square() / (2 * sd_px**2))
    kernel /= kernel.sum()
    down = functional.conv2d(maps, kernel[None, None, :, None], padding=(radius, 0))
    return functional.conv2d(down, kernel[None, None, None, :], padding=(0, radius))


def nuclei_channels(factor: int) -> int:
    """Return how many channels of a condition show nuclei."""
    return factor**2 + 1


def nuclei_condition(nuclei: Tensor, factor: int) -> Tensor:
    """Bring a map of nuclei (B, 1, H, W) to the latents' size without loss; (B, f² + 1, h, w), the last channel 1."""
    blocks = functional.pixel_unshuffle(nuclei, factor)
    return torch.cat([blocks, torch.ones_like(blocks[:, :1])], dim=1)


def described(image: np.ndarray, label_mask: np.ndarray, size_px: int) -> tuple[Tensor, Tensor]:
    """Return the background of a reference as optical density, (3, s, s) float, and its statistics, (6,).

    It is brought to one size, that of references of ``size_px``, and at most 64 pixels.
    """
    density = _optical_density(without_tumour(image, label_mask))
    seen = functional.adaptive_avg_pool2d(torch.from_numpy(density).float().movedim(-1, 0), min(SEEN_PX, size_px))
    return seen, torch.from_numpy(stain_statistics(image, label_mask)).float()


def stain_statistics(image: np.ndarray, label_mask: np.ndarray) -> np.ndarray:
    """Return mean and standard deviation of the background's optical density in each colour channel, (6,).

    Only pixels of label 0 count; without any all are 0.
    """
    density = _optical_density(image[label_mask == BACKGROUND])
    return np.concatenate([density.mean(0), density.std(0)]) if len(density) else np.zeros(6)


def _optical_density(image: np.ndarray) -> np.ndarray:
    """Turn (…, 3) uint8 into natural optical density, 0 = white."""
    return np.asarray(-np.log(np.maximum(image, 1) / 255.0))


def without_tumour(image: np.ndarray, label_mask: np.ndarray) -> np.ndarray:
    """Fill all pixels of (H, W, 3) uint8 that are no background with the background's mean (white without any)."""
    background = label_mask == BACKGROUND
    fill = image[background].mean(0) if background.any() else np.full(3, 255.0)
    return np.where(background[..., None], image, fill.round().astype(np.uint8)).astype(np.uint8)


# Networks


class LinearAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A first stage without training: blocks of f x f pixels, projected to z <= 3 f² principal components and back.

    The best linear autoencoder in the squared error (Baldi & Hornik 1989), found in closed form. On tissue at cell
    scale, 8 components of 4 x 4 pixels keep more than a convolutional autoencoder learns in minutes.
    """

    basis: Tensor
    mean: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, factor: int, latent_channels: int) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("basis", torch.zeros(latent_channels, 3, factor, factor))
        self.register_buffer("mean", torch.zeros(3, factor, factor))

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> components (B, z, h, w)."""
        offset = (self.basis * self.mean).sum((1, 2, 3))
        return functional.conv2d(images, self.basis, -offset, stride=self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Components (B, z, h, w) -> images (B, 3, H, W)."""
        blocks = functional.conv_transpose2d(latents, self.basis, stride=self.factor)
        return blocks + self.mean.repeat(1, latents.shape[-2], latents.shape[-1])


class StyleNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Encode references, and embed styles for a denoiser.

    The encoder's first layer has ``width`` features, the learned code ``values``; ``embedded`` is the length of the
    denoiser's embedding of the timestep, to which a style's is added.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, width: int, values: int, embedded: int) -> None:
        super().__init__()
        self.length = values + STAIN_VALUES + 1
        features = [3, *(width * 2**i for i in range(STYLE_HALVINGS))]
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(fin, fout, 3, stride=2, padding=1), nn.GroupNorm(1, fout), nn.SiLU())
                for fin, fout in pairwise(features)
            )
        )
        self.code = nn.Linear(features[-1], values)
        last = nn.Linear(embedded, embedded)
        nn.init.zeros_(last.weight)  # training starts from a network without a style
        nn.init.zeros_(last.bias)
        self.embedding = nn.Sequential(nn.Linear(self.length, embedded), nn.SiLU(), last)

    def forward(self, seen: Tensor, stain: Tensor) -> Tensor:
        """Background as optical density (B, n, 3, s, s) and its statistics (B, n, 6) -> style vectors (B, S)."""
        features = self.encoder(seen.to(stain.dtype).flatten(0, 1)).mean((2, 3))
        code = self.code(features.reshape(*seen.shape[:2], -1).mean(1))
        stain = stain.mean(1)
        return torch.cat([code, stain, torch.ones_like(stain[:, :1])], dim=1)


# From noise to images


class Ddim(DDIMScheduler):  # type: ignore[misc]
    """DDIM that also takes its first step after pure noise.

    With eta 1 the fresh noise of that step has all the variance, and 1 - alpha - variance, of which the root is taken,
    is a little below 0 on some machines.
    """

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        variance: Tensor = super()._get_variance(timestep, prev_timestep)
        before = self.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else self.final_alpha_cumprod
        return variance.minimum((1 - 1e-6) * (1 - before))


def begin(scheduler: Any, steps: int, power: float | None) -> None:
    """Set a scheduler's timesteps, by :func:`power_spacing` or (None) its own, and forget earlier predictions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array__ implementation doesn't accept a copy keyword")
        scheduler.set_timesteps(steps)
    if power is None:
        # Floating point gives some numbers of steps one too many, at timestep -1.
        scheduler.timesteps = scheduler.timesteps[:steps]
        return
    scheduler.timesteps = torch.tensor(power_spacing(scheduler.config.num_train_timesteps, steps, power))
    alphas = scheduler.alphas_cumprod[scheduler.timesteps]
    scheduler.sigmas = torch.cat([((1 - alphas) / alphas).sqrt(), torch.zeros(1)])


def power_spacing(timesteps: int, steps: int, power: float) -> list[int]:
    """Return ``steps`` falling timesteps from T - 1 on, at T (1 - i / steps) ** power - 1; ValueError if T < steps.

    Grids of the same power nest: that of half as many steps is every second entry, wherever the grid is not so dense
    that neighbours would be equal; those are moved apart.

    Examples
    --------
    >>> power_spacing(1000, 4, 1.0), power_spacing(1000, 4, 2.0)
    ([999, 749, 499, 249], [999, 561, 249, 61])
    """
    if steps > timesteps:
        raise ValueError(f"steps {steps}: more than the {timesteps} timesteps of the training; use fewer steps")
    chosen: list[int] = []
    for left in range(1, steps + 1):
        exact = int(timesteps * (left / steps) ** power + 0.5) - 1
        chosen.append(max(exact, chosen[-1] + 1 if chosen else 0))
    return chosen[::-1]


def to_images(tensor: Tensor) -> np.ndarray:
    """Turn (B, 3, H, W) float, -1..1, into (B, H, W, 3) uint8."""
    levels = ((tensor.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return levels.movedim(1, -1).cpu().contiguous().numpy()


class MaskToTissuePipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draw images for label masks.

    ``drawing`` in ``model_index.json`` says how the checkpoint was trained and draws: the names of its ``labels``, edge
    (``size_px``) and ``mpp`` of its training patches, how labels are shrunk (``condition``), mean and standard
    deviation of the latents, ``steps`` and how they are spaced (``power``; null = evenly), the share ``eta`` of fresh
    noise in a step, ``guidance`` and the noise levels where it acts, how ``nuclei`` are read off real images (null =
    the network is shown none), and whether it has channels for the ``surroundings`` of what is redrawn; nothing is kept
    around whole images.
    """

    _optional_components = ("style",)

    def __init__(
        self,
        unet: UNet2DModel,
        vae: ModelMixin,
        scheduler: SchedulerMixin,
        style: ModelMixin | None = None,
        drawing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler, style=style)
        self.register_to_config(drawing=drawing)
        widths = getattr(vae.config, "block_out_channels", None)
        self.factor = int(vae.config.factor) if widths is None else int(2 ** (len(widths) - 1))

    @torch.no_grad()
    def __call__(
        self,
        masks: np.ndarray,
        *,
        images: np.ndarray | None = None,
        references: Sequence[tuple[np.ndarray, np.ndarray]] = (),
        latents: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw an image for each mask (B, H, W) or (H, W) uint8; the output's ``images`` are PIL's, or uint8 arrays.

        Networks that were trained with nuclei keep those of real ``images`` (B, H, W, 3) uint8; those that know styles
        draw in that of ``references``, images (H, W, 3) uint8 with their label masks. The noise to start from is
        ``latents`` (B, z, h, w), or drawn by the generator: one for all, or one for each image.
        """
        condition = self._condition(masks, images, references)
        scheduler, how = self.scheduler, self.config.drawing
        if isinstance(scheduler, DDIMScheduler):
            scheduler = Ddim.from_config(scheduler.config)
        begin(scheduler, steps or how["steps"], how["power"])
        guidance = how["guidance"] if guidance is None else guidance
        shape = (len(condition[0]), self.unet.config.out_channels, *condition[0].shape[2:])
        start = self._noise(shape, generator) if latents is None else latents
        latents = start.to(self.unet.device, self.unet.dtype) * scheduler.init_noise_sigma
        for step in self.progress_bar(scheduler.timesteps):
            noisy, timestep = scheduler.scale_model_input(latents, int(step)), int(step)
            prediction = self._prediction(noisy, timestep, condition, guidance)
            fresh: dict[str, Any] = {}
            if isinstance(scheduler, DDIMScheduler) and how["eta"] > 0:
                fresh = {"eta": how["eta"], "variance_noise": self._noise(shape, generator).to(latents)}
            latents = scheduler.step(prediction, step, latents, **fresh).prev_sample
        sd, mean = (torch.tensor(how[name]).to(latents)[:, None, None] for name in ("latent_sd", "latent_mean"))
        decoded = self.vae.decode(latents * sd + mean)
        drawn = to_images(getattr(decoded, "sample", decoded))
        return ImagePipelineOutput(images=self.numpy_to_pil(drawn / 255) if output_type == "pil" else drawn)

    def _condition(
        self, masks: np.ndarray, images: np.ndarray | None, references: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the labels, the other channels, both (B, any, h, w), and style vectors (B, S)."""
        masks = np.asarray(masks)
        masks = masks[None] if masks.ndim == 2 else masks
        how, device = self.config.drawing, self.unet.device
        names, nuclei = how["labels"], how["nuclei"]
        unit = self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if masks.ndim != 3 or any(edge % unit for edge in masks.shape[1:]):
            raise ValueError(f"masks {masks.shape}: expected (images, rows, columns), both multiples of {unit}")
        if not set(np.unique(masks).tolist()) <= {*range(len(names)), IGNORE}:
            raise ValueError(f"masks: expected 0 to {len(names) - 1} ({', '.join(names)}), or {IGNORE}")
        given = torch.from_numpy(np.ascontiguousarray(masks)).to(device)
        labels = shrink(one_hot(given, len(names)), self.factor, how["condition"])
        extra = [labels[:, :0]]
        if nuclei is None and images is not None:
            raise ValueError("images: this network was trained without nuclei")
        if nuclei is not None and images is None:
            extra.append(labels.new_zeros(len(labels), nuclei_channels(self.factor), *labels.shape[2:]))
        elif nuclei is not None:
            real = torch.from_numpy(np.asarray(images).reshape(*masks.shape, 3)).to(device)
            amounts = torch.tensor(nuclei["amounts"])
            extra.append(nuclei_condition(nuclei_map(real, **nuclei | {"amounts": amounts}), self.factor))
        if how["surroundings"]:  # nothing is kept
            nothing = labels.new_zeros(len(labels), self.unet.config.out_channels, *labels.shape[2:])
            extra += [nothing, torch.ones_like(labels[:, :1])]
        return labels, torch.cat(extra, dim=1), self._style(references, labels)

    def _style(self, references: Sequence[tuple[np.ndarray, np.ndarray]], like: Tensor) -> Tensor | None:
        """Return the mean style of references, for each of a batch (B, S); 0 without any."""
        if self.style is None:
            if references:
                raise ValueError("references: this network was trained without styles")
            return None
        vectors = like.new_zeros(len(like), self.style.length)
        if references:
            parts = (described(image, mask, self.config.drawing["size_px"]) for image, mask in references)
            codes = [self.style(*(part[None, None].to(like.device) for part in pair)) for pair in parts]
            mean = torch.cat(codes).cpu().numpy().mean(0)
            vectors = torch.from_numpy(mean).to(like).expand(len(like), -1)
        return vectors

    def _prediction(
        self, noisy: Tensor, timestep: int, condition: tuple[Tensor, Tensor, Tensor | None], guidance: float
    ) -> Tensor:
        labels, extra, style = condition
        low, high = self.config.drawing["guidance_interval"]
        if guidance == 1.0 or not low <= timestep / self.scheduler.config.num_train_timesteps <= high:
            return self._run(torch.cat([noisy, labels, extra], dim=1), timestep, style)
        both = torch.cat([torch.cat([noisy, shown, extra], dim=1) for shown in (labels, torch.zeros_like(labels))])
        with_mask, without = self._run(both, timestep, None if style is None else torch.cat([style, style])).chunk(2)
        return torch.as_tensor(without + guidance * (with_mask - without))

    def _run(self, noisy: Tensor, timestep: int, style: Tensor | None) -> Tensor:
        embedded = None if style is None else self.style.embedding(style)
        return torch.as_tensor(self.unet(noisy, timestep, embedded).sample)

    def _noise(self, shape: Sequence[int], generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
        if isinstance(generator, Sequence):
            return torch.stack([torch.randn(tuple(shape[1:]), generator=one) for one in generator])
        return torch.randn(tuple(shape), generator=generator)
