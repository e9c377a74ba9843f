"""The first stage of latent diffusion: a VQ or KL autoencoder with a patch GAN (Rombach et al. 2022, appendix G).

Shapes: B = batch, z = latent channels, H, W = rows and columns in pixels, h, w = H, W divided by the factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, VQModel
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional

from counterstain.generators.autoencoder_config import AutoencoderConfig
from counterstain.generators.codebook import CodebookUpkeep, usage_of
from counterstain.generators.conditioning import to_tensor
from counterstain.generators.networks.discriminators import PatchDiscriminator, hinge_discriminator_loss
from counterstain.generators.networks.linear_autoencoder import LinearAutoencoder
from counterstain.generators.perceptual import lpips_distance
from counterstain.seeding import torch_generator
from counterstain.training import fused_optimizers


def build_network(config: AutoencoderConfig) -> nn.Module:
    """Build diffusers' ``VQModel`` or ``AutoencoderKL``, or the linear autoencoder."""
    if config.kind == "linear":
        return LinearAutoencoder(config.factor, config.latent_channels)
    levels = len(config.widths)
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.widths,
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.channels if config.channels <= 32 else math.gcd(32, config.channels),
        "mid_block_add_attention": config.attention,
    }
    if config.kind == "vq":
        network: nn.Module = VQModel(
            num_vq_embeddings=config.codebook_size, vq_embed_dim=config.latent_channels, **settings
        )
    else:
        network = AutoencoderKL(**settings)
    return network


@dataclass(frozen=True)
class _Reconstruction:
    decoded: Tensor  # (B, 3, H, W)
    regulariser: Tensor  # weighted
    latents: Tensor  # (B, z, h, w), before quantisation
    codes: Tensor | None = None  # (B·h·w,)


class Autoencoder(LightningModule):
    """Encoder, decoder and, in training, the patch GAN's discriminator.

    Parameters
    ----------
    config : AutoencoderConfig
    size_px : int
        Edge of the training patches, a multiple of the factor.
    seed : int
        Of the latents drawn in training (``kl``).
    """

    def __init__(self, config: AutoencoderConfig, size_px: int, seed: int = 0) -> None:
        super().__init__()
        config.check_size(size_px)
        self.automatic_optimization = False
        self.config, self.seed = config, seed
        self.network = build_network(config)
        self.codebook = self._codebook_upkeep()
        self.discriminator = PatchDiscriminator(config.discriminator_width) if config.adversarial_weight else None
        self.optimizers_per_step = 2 if self.discriminator else 1
        # In a list, so that the fixed network is neither trained nor saved.
        self._lpips = [lpips_distance(config.lpips_weights)] if config.lpips_weight else []

    def _codebook_upkeep(self) -> CodebookUpkeep | None:
        config, network = self.config, cast("Any", self.network)
        averaged = config.codebook_update == "average"
        if config.kind != "vq" or not (averaged or config.revive_codes_below):
            return None
        codes = network.quantize.embedding.weight
        codes.requires_grad_(not averaged)
        return CodebookUpkeep(codes, config.codebook_decay, averaged=averaged, revive_below=config.revive_codes_below)

    def begin_from_given_codes(self) -> None:
        """Let the upkeep of the codebook begin from codes that were loaded without one, or it would forget them."""
        if self.codebook is not None:
            self.codebook.restart(cast("Any", self.network).quantize.embedding.weight)

    @property
    def lpips(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """LPIPS, where it is part of the loss."""
        return self._lpips[0].to(self.device) if self._lpips else None

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), -1..1 -> latents (B, z, h, w): before quantisation, or the Gaussians' means."""
        network: Any = self.network
        encoded = network.encode(images)
        if self.config.kind == "linear":
            return torch.as_tensor(encoded)
        latents: Tensor = encoded.latents if self.config.kind == "vq" else encoded.latent_dist.mode()
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, z, h, w) -> images (B, 3, H, W), about -1..1; ``vq`` quantises first."""
        network: Any = self.network
        decoded = network.decode(latents)
        images: Tensor = decoded if self.config.kind == "linear" else decoded.sample
        return images

    def fit_components(self, batches: Iterable[Tensor]) -> float:
        """Find the components of the linear autoencoder from images (B, H, W, 3) uint8; return the variance kept."""
        assert isinstance(self.network, LinearAutoencoder)
        return self.network.fit(to_tensor(images) for images in batches)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One step of the autoencoder, then one of the discriminator."""
        del batch_idx
        real, step = self._cropped(to_tensor(batch["images"])), int(batch["step"])
        optimizers: Any = self.optimizers()
        first = optimizers[0] if self.discriminator else optimizers
        self._set_rates(optimizers if self.discriminator else [optimizers], step)
        found = self._reconstruct(real, batch)
        loss, logged = self._loss(real, found, step)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        if self.codebook is not None and found.codes is not None:
            codes = cast("Any", self.network).quantize.embedding.weight.data
            generator = torch_generator(self.seed, "revived codes", step)
            logged["codes_revived"] = self.codebook.update(codes, found.latents, found.codes, generator)
        if self.discriminator is not None:
            adversarial = step >= self.config.adversarial_start
            logged["loss_d"] = self._discriminator_step(optimizers[1], real, found.decoded.detach(), adversarial)
        logged["psnr"] = 10 * torch.log10(4.0 / functional.mse_loss(found.decoded.detach(), real))
        if found.codes is not None:
            logged["codebook_usage"], logged["codebook_perplexity"] = usage_of(found.codes, self.config.codebook_size)
        device = self.device  # where processes can add them up
        self.log_dict({n: torch.as_tensor(value, dtype=torch.float32, device=device) for n, value in logged.items()})

    def _loss(self, real: Tensor, found: _Reconstruction, step: int) -> tuple[Tensor, dict[str, Any]]:
        """Return the autoencoder's loss, and its parts for the record."""
        distance = (real - found.decoded).abs().mean()
        logged: dict[str, Any] = {"loss_l1": distance.detach(), "loss_regulariser": found.regulariser.detach()}
        if self.lpips is not None:
            perceptual = self.lpips(real, found.decoded).mean()
            distance = distance + self.config.lpips_weight * perceptual
            logged["loss_lpips"] = perceptual.detach()
        loss = distance + found.regulariser
        if self.discriminator is not None and step >= self.config.adversarial_start:
            gan = -self.discriminator(found.decoded).mean()
            weight = self._adaptive_weight(distance, gan)
            loss = loss + self.config.adversarial_weight * weight * gan
            logged |= {"loss_gan": gan.detach(), "adaptive_weight": weight}
        return loss, logged

    def configure_optimizers(self) -> Any:
        """Adam for the autoencoder and, with a GAN, for the discriminator."""
        parts = [self.network] if self.discriminator is None else [self.network, self.discriminator]
        fused = fused_optimizers(self.config.training)
        return [
            torch.optim.Adam(part.parameters(), self.config.scaled_lr, self.config.betas, fused=fused) for part in parts
        ]

    def _set_rates(self, optimizers: Any, step: int) -> None:
        falling = 0.5 * (1 + math.cos(math.pi * step / self.config.training.steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.scaled_lr * (falling if self.config.lr_schedule == "cosine" else 1.0)

    def _cropped(self, images: Tensor) -> Tensor:
        if self.config.crop_px is None:
            return images
        start = (images.shape[-1] - self.config.crop_px) // 2
        return images[..., start : start + self.config.crop_px, start : start + self.config.crop_px]

    def _reconstruct(self, real: Tensor, batch: dict[str, Tensor]) -> _Reconstruction:
        network: Any = self.network
        if self.config.kind == "vq":
            latents = network.encode(real).latents
            quantised, loss, (_, _, codes) = network.quantize(latents)
            decoded = network.decode(quantised, force_not_quantize=True).sample
            return _Reconstruction(decoded, self.config.codebook_weight * loss, latents, codes)
        gaussians = network.encode(real).latent_dist
        noise = torch.stack([self._noise(gaussians.mean[0], batch, place) for place in batch["position"].tolist()])
        latents = gaussians.mean + gaussians.std * noise.to(real)
        divergence = gaussians.kl().mean() / real[0].numel()
        return _Reconstruction(network.decode(latents).sample, self.config.kl_weight * divergence, latents)

    def _noise(self, like: Tensor, batch: dict[str, Tensor], position: int) -> Tensor:
        return torch.randn(like.shape, generator=torch_generator(self.seed, "latent", int(batch["step"]), position))

    def _adaptive_weight(self, distance: Tensor, gan: Tensor) -> Tensor:
        # Esser et al. 2021, equation 7: the ratio of the two gradients at the decoder's last layer.
        network: Any = self.network
        last = network.decoder.conv_out.weight
        of_distance = torch.autograd.grad(distance, last, retain_graph=True)[0].norm()
        of_gan = torch.autograd.grad(gan, last, retain_graph=True)[0].norm()
        weight: Tensor = of_distance / (of_gan + 1e-4)
        return weight.clamp(0.0, 1e4).detach()

    def _discriminator_step(self, optimizer: Any, real: Tensor, decoded: Tensor, adversarial: bool) -> Tensor:
        assert self.discriminator is not None
        loss = 0.5 * hinge_discriminator_loss(self.discriminator(real), self.discriminator(decoded))
        loss = loss if adversarial else 0.0 * loss
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach()
