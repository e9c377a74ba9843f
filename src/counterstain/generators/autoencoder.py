"""The first stage of latent diffusion: a VQ or KL autoencoder with a patch GAN and the upkeep of its codebook (Rombach
et al. 2022, appendix G), or principal components that need no training.

Shapes: B = batch, K = codes, z = latent channels, h, w = rows and columns of the latents, n = B·h·w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, distributed, nn
from torch.nn import functional

from counterstain.checkpoints import rebuilt
from counterstain.config import build_stored
from counterstain.devices import fused_optimizers, place
from counterstain.generators.conditioning import to_tensor
from counterstain.generators.diffusion_config import ADAM_BETAS, AutoencoderConfig
from counterstain.generators.networks import (
    PatchDiscriminator,
    hinge_discriminator_loss,
    lpips_distance,
)
from counterstain.generators.pipeline import LinearAutoencoder
from counterstain.generators.samplers import fresh_noise
from counterstain.seeding import torch_generator
from counterstain.training import Minimise, Trainable

CODEBOOK_DECAY = 0.99  # of the moving averages of codes and of their use
SMOOTHING = 1e-5  # of the usage, so that a code without latents is not divided by 0


class CodebookUpkeep(nn.Module):
    """Follows how often each of the codes (K, z) is used, by moving averages, and changes them after a training step.

    ``averaged`` codes are moving averages of the latents that chose them (van den Oord et al. 2017, appendix A.1).
    Codes used less often than ``revive_below`` / K are set to latents of the batch (Dhariwal et al. 2020, section 3.1,
    with a threshold relative to the fair share); None = never.
    """

    usage: Tensor  # (K,): moving average of K · (share of the latents that chose a code): 1 = as often as all others
    sums: Tensor

    def __init__(self, codes: Tensor, decay: float, *, averaged: bool, revive_below: float | None) -> None:
        super().__init__()
        self.decay, self.averaged, self.revive_below = decay, averaged, revive_below
        self.register_buffer("usage", torch.ones(len(codes), device=codes.device))
        self.register_buffer("sums", codes.detach().clone())

    @torch.no_grad()
    def update(self, codebook: Tensor, latents: Tensor, chosen: Tensor, generator: torch.Generator) -> int:
        """Change ``codebook`` (K, z) in place after a step; return how many codes were revived.

        ``chosen`` (n,) are the codes of the latents (B, z, h, w), in the order B, h, w; ``generator`` picks the latents
        that revived codes are set to.
        """
        flat = latents.detach().float().movedim(1, -1).flatten(0, -2)  # (n, z)
        counts = torch.bincount(chosen.flatten(), minlength=len(codebook)).to(flat)
        sums = torch.zeros_like(self.sums, dtype=flat.dtype).index_add_(0, chosen.flatten(), flat)
        share = len(codebook) / _over_all_devices(torch.tensor(float(len(flat)), device=flat.device))
        self.usage.lerp_(_over_all_devices(counts) * share, 1 - self.decay)
        self.sums.lerp_(_over_all_devices(sums) * share, 1 - self.decay)
        if self.averaged:
            smooth = (self.usage + SMOOTHING) / (1 + SMOOTHING)
            codebook.copy_(self.sums / smooth[:, None])
        return 0 if self.revive_below is None else self._revive(codebook, flat, self.revive_below, generator)

    def _revive(self, codebook: Tensor, latents: Tensor, threshold: float, generator: torch.Generator) -> int:
        dead = (self.usage < threshold).nonzero().flatten()
        if not len(dead):
            return 0
        picked = torch.randint(len(latents), (len(dead),), generator=generator).to(latents.device)
        fresh = latents[picked]
        if _spread():
            distributed.broadcast(fresh, 0)  # the latents differ from device to device
        codebook[dead] = fresh.to(codebook.dtype)
        self.sums[dead] = fresh
        self.usage[dead] = 1.0  # time to be chosen before they are judged again
        return len(dead)


def usage_of(chosen: Tensor, size: int) -> tuple[float, float]:
    """Return the share of ``size`` codes that were chosen at all, and their perplexity.

    The perplexity is the exponential of the entropy of the choices: as many codes, used equally, would do.
    """
    counts = torch.bincount(chosen.flatten().cpu(), minlength=size).double()
    shares = counts[counts > 0] / counts.sum()
    return len(shares) / size, float(torch.exp(-(shares * shares.log()).sum()))


def _spread() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _over_all_devices(tensor: Tensor) -> Tensor:
    if _spread():
        distributed.all_reduce(tensor)
    return tensor


def build_network(config: AutoencoderConfig) -> nn.Module:
    """Build diffusers' ``VQModel`` or ``AutoencoderKL``, or the linear autoencoder."""
    network: nn.Module
    if config.kind == "linear":
        network = LinearAutoencoder(config.factor, config.latent_channels)
        return network
    levels = len(config.widths)
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.widths,
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.channels if config.channels <= 32 else math.gcd(32, config.channels),
        "mid_block_add_attention": config.attention,
    }
    if config.kind == "vq":
        settings |= {"num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.latent_channels}
    if config.kind == "kl":
        settings |= dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), not config.plain_latents)
    network = VQModel(**settings) if config.kind == "vq" else AutoencoderKL(**settings)
    return network


@dataclass(frozen=True)
class _Reconstruction:
    decoded: Tensor  # (B, 3, H, W)
    regulariser: Tensor  # weighted
    latents: Tensor  # (B, z, h, w), before quantisation
    codes: Tensor | None = None  # (B·h·w,)


class Autoencoder(Trainable):
    """Encoder, decoder and, in training, the patch GAN's discriminator, for patches of ``size_px``, whose latents are
    drawn by ``seed`` in training (``kl``).
    """

    updates_itself = True

    def __init__(self, config: AutoencoderConfig, size_px: int, seed: int = 0) -> None:
        super().__init__()
        config.check_size(size_px)
        self.config, self.seed = config, seed
        self.network: Any = build_network(config)
        self.codebook = self._codebook_upkeep()
        self.discriminator = PatchDiscriminator(config.discriminator_width) if config.adversarial_weight else None
        # In a list, so that the fixed network is neither trained nor saved.
        self._lpips = [lpips_distance(config.lpips_weights)] if config.lpips_weight else []

    def _codebook_upkeep(self) -> CodebookUpkeep | None:
        config, averaged = self.config, self.config.codebook_update == "average"
        if config.kind != "vq" or not (averaged or config.revive_codes_below):
            return None
        codes = self.network.quantize.embedding.weight
        codes.requires_grad_(not averaged)
        return CodebookUpkeep(codes, CODEBOOK_DECAY, averaged=averaged, revive_below=config.revive_codes_below)

    def begin_from_given_codes(self) -> None:
        """Let the upkeep of the codebook begin from codes that were loaded without one, or it would forget them."""
        if self.codebook is not None:
            self.codebook = self._codebook_upkeep()

    @property
    def lpips(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """LPIPS, where it is part of the loss."""
        return place(self._lpips[0], self.device) if self._lpips else None

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), -1..1 -> latents (B, z, h, w): before quantisation, or the Gaussians' means."""
        encoded = self.network.encode(images)
        if self.config.kind == "linear":
            return torch.as_tensor(encoded)
        latents: Tensor = encoded.latents if self.config.kind == "vq" else encoded.latent_dist.mode()
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, z, h, w) -> images (B, 3, H, W), about -1..1; ``vq`` quantises first."""
        decoded = self.network.decode(latents)
        images: Tensor = decoded if self.config.kind == "linear" else decoded.sample
        return images

    @torch.no_grad()
    def fit_components(self, batches: Iterable[Tensor]) -> float:
        """Find the components of a linear autoencoder from images (B, H, W, 3) uint8; return the share of the variance
        that they keep.

        Batches are seen one at a time: their scatter matrices are added up (Chan et al. 1979).
        """
        network, f = self.network, self.config.factor
        count, mean, scatter = 0, torch.zeros(3 * f * f).double(), torch.zeros(3 * f * f, 3 * f * f).double()
        for images in batches:
            blocks = functional.unfold(to_tensor(images).double(), f, stride=f).movedim(1, 2).reshape(-1, 3 * f * f)
            shift = blocks.mean(0) - mean
            centred = blocks - blocks.mean(0)
            total = count + len(blocks)
            scatter += centred.T @ centred + torch.outer(shift, shift) * count * len(blocks) / total
            mean += shift * len(blocks) / total
            count = total
        variances, components = torch.linalg.eigh(scatter)
        kept = components[:, -network.basis.shape[0] :].flip(1).T
        # The sign of a component is arbitrary: let its largest entry be positive, on every machine.
        largest = kept.gather(1, kept.abs().argmax(1, keepdim=True))
        network.basis.copy_((kept * largest.sign()).reshape(network.basis.shape))
        network.mean.copy_(mean.reshape(network.mean.shape))
        return float(variances[-network.basis.shape[0] :].sum() / variances.sum())

    def training_step(self, batch: dict[str, Tensor], minimise: Minimise) -> dict[str, Any]:
        """Update the autoencoder, then the discriminator."""
        real, step = to_tensor(batch["images"]), int(batch["step"])
        found = self._reconstruct(real, batch)
        loss, logged = self._loss(real, found, step)
        minimise(loss, 0)
        if self.codebook is not None and found.codes is not None:
            codes = self.network.quantize.embedding.weight.data
            generator = torch_generator(self.seed, "revived codes", step)
            logged["codes_revived"] = self.codebook.update(codes, found.latents, found.codes, generator)
        if self.discriminator is not None:
            decoded = found.decoded.detach()
            loss_d = 0.5 * hinge_discriminator_loss(self.discriminator(real), self.discriminator(decoded))
            logged["loss_d"] = loss_d if step >= self.config.adversarial_start else 0.0 * loss_d
            minimise(logged["loss_d"], 1)
        logged["psnr"] = 10 * torch.log10(4.0 / functional.mse_loss(found.decoded.detach(), real))
        if found.codes is not None:
            logged["codebook_usage"], logged["codebook_perplexity"] = usage_of(found.codes, self.config.codebook_size)
        return logged

    def _loss(self, real: Tensor, found: _Reconstruction, step: int) -> tuple[Tensor, dict[str, Any]]:
        distance = (real - found.decoded).abs().mean()
        logged: dict[str, Any] = {"loss_l1": distance.detach(), "loss_regulariser": found.regulariser.detach()}
        if self.lpips is not None:
            perceptual = self.lpips(found.decoded, real).mean()
            distance = distance + self.config.lpips_weight * perceptual
            logged["loss_lpips"] = perceptual.detach()
        loss = distance + found.regulariser
        if self.discriminator is not None and step >= self.config.adversarial_start:
            gan = -self.discriminator(found.decoded).mean()
            weight = self._adaptive_weight(distance, gan)
            loss = loss + self.config.adversarial_weight * weight * gan
            logged |= {"loss_gan": gan.detach(), "adaptive_weight": weight}
        return loss, logged

    def encoders(self) -> Iterable[nn.Module]:
        """Return what :meth:`encode` calls; nothing of a linear autoencoder, which is one convolution."""
        return () if self.config.kind == "linear" else (self.network.encoder,)

    def networks(self) -> Iterable[nn.Module]:
        """Return encoder, decoder and discriminator; diffusers' network around the first two is not called itself."""
        judge = () if self.discriminator is None else (self.discriminator,)
        return (*self.encoders(), self.network.decoder, *judge)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the autoencoder and, with a GAN, for the discriminator."""
        parts = [self.network] if self.discriminator is None else [self.network, self.discriminator]
        fused = fused_optimizers(self.config.training)
        return [torch.optim.Adam(part.parameters(), self.config.scaled_lr, ADAM_BETAS, fused=fused) for part in parts]

    def _reconstruct(self, real: Tensor, batch: dict[str, Tensor]) -> _Reconstruction:
        network = self.network
        if self.config.kind == "vq":
            latents = network.encode(real).latents
            quantised, loss, (_, _, codes) = network.quantize(latents)
            decoded = network.decode(quantised, force_not_quantize=True).sample
            return _Reconstruction(decoded, loss, latents, codes)
        gaussians = network.encode(real).latent_dist
        keys = [("latent", int(batch["step"]), position) for position in batch["position"].tolist()]
        noise = fresh_noise(gaussians.mean.shape[1:], [torch_generator(self.seed, *key) for key in keys])
        latents = gaussians.mean + gaussians.std * noise.to(real, non_blocking=True)
        divergence = gaussians.kl().mean() / real[0].numel()
        return _Reconstruction(network.decode(latents).sample, self.config.kl_weight * divergence, latents)

    def _adaptive_weight(self, distance: Tensor, gan: Tensor) -> Tensor:
        # Esser et al. 2021, equation 7: the ratio of the two gradients at the decoder's last layer.
        last = self.network.decoder.conv_out.weight
        of_distance = torch.autograd.grad(distance, last, retain_graph=True)[0].norm()
        of_gan = torch.autograd.grad(gan, last, retain_graph=True)[0].norm()
        weight: Tensor = of_distance / (of_gan + 1e-4)
        return weight.clamp(0.0, 1e4).detach()


def rebuilt_first_stage(settings: Any, state: Mapping[str, Tensor], folder: Path, size_px: int) -> Autoencoder:
    """Make a trained first stage out of what a checkpoint knows of it, without what only its training needs."""
    config = build_stored(AutoencoderConfig, settings, folder).for_use()
    return rebuilt(lambda: Autoencoder(config, size_px), state, folder, spare=("discriminator", "codebook"))
