"""SPADE with its VAE (Park et al. 2019): a GAN that draws an image for a label mask and a style code.

Shapes: B = batch, C = channels of the condition (labels, edges, and the nuclei with whether they are shown), H, W =
rows and columns in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from counterstain.checkpoints import CheckpointHeader, load_checkpoint, rebuilt
from counterstain.config import build_stored
from counterstain.data.patches import Patch
from counterstain.devices import choose_device, fused_optimizers, place, started_processes
from counterstain.errors import ConfigError, MismatchError
from counterstain.generators.conditioning import (
    edges,
    kept_samples,
    nuclei_shown,
    to_tensor,
)
from counterstain.generators.interface import DrawRequest, fixed_batches, on_device, stacked
from counterstain.generators.networks import (
    ImageEncoder,
    MultiscaleDiscriminator,
    SpadeGeneratorNetwork,
    VggDistance,
    hinge_discriminator_loss,
    settle_spectral_norms,
)
from counterstain.generators.pipeline import nuclei_channels, one_hot, to_images, without_tumour
from counterstain.generators.spade_config import ADAM_BETAS, FEATURE_WEIGHT, KL_WEIGHT, SpadeConfig
from counterstain.seeding import torch_generator
from counterstain.training import Minimise, Trainable


class Spade(Trainable):
    """Generator, encoder and discriminator with their losses, for patches of ``size_px``, a multiple of 32.

    ``num_labels`` counts background and every subtype; the codes drawn in training follow ``seed``.
    """

    updates_itself = True

    def __init__(self, config: SpadeConfig, num_labels: int, size_px: int, seed: int = 0) -> None:
        super().__init__()
        config.check_size(size_px)
        self.config, self.num_labels, self.size_px, self.seed = config, num_labels, size_px, seed
        channels = num_labels + int(config.edge_channel) + (nuclei_channels(1) if config.counterstain else 0)
        self.generator = SpadeGeneratorNetwork(
            channels + config.noise_channels, size_px, config.generator_width, config.latent, config.hidden
        )
        self.encoder = ImageEncoder(size_px, config.generator_width, config.latent) if config.use_vae else None
        self.discriminator = MultiscaleDiscriminator(channels + 3, config.discriminator_width)
        if config.initial_gain is not None:
            self._start_small(config.initial_gain)
        # In a list, so that the fixed network is neither trained nor saved.
        self._vgg = [VggDistance(config.vgg_weights)] if config.vgg_weight else []

    def condition(self, label_masks: Tensor, instances: Tensor, images: Tensor | None = None) -> Tensor:
        """Labels (B, H, W), instances (B, H, W) and images (B, H, W, 3) whose nuclei are kept -> (B, C, H, W) float."""
        parts = [one_hot(label_masks, self.num_labels)]
        if self.config.edge_channel:
            parts.append(edges(instances))
        shown = self.config.counterstain
        if shown is not None:
            parts.append(nuclei_shown(images, shown, 1, parts[0]))
        return torch.cat(parts, dim=1)

    def training_condition(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the condition of a batch, some of whose samples are not shown their nuclei."""
        condition = self.condition(batch["labels"], batch["instances"], batch["images"])
        if self.config.counterstain is None:
            return condition
        kept = kept_samples(batch, self.seed, "counterstain", self.config.counterstain.dropout).to(condition)
        first = -nuclei_channels(1)  # the last ones
        return torch.cat([condition[:, :first], condition[:, first:] * kept[:, None, None, None]], dim=1)

    def with_noise(self, labels: Tensor, keys: Sequence[tuple[Any, ...]]) -> Tensor:
        """Condition (B, C, H, W) -> what the generator sees, (B, C + noise channels, H, W); one key an image."""
        if not self.config.noise_channels:
            return labels
        shape = (self.config.noise_channels, *labels.shape[2:])
        noise = torch.stack([torch.randn(shape, generator=torch_generator(*key, "pixels")) for key in keys])
        return torch.cat([labels, noise.to(labels, non_blocking=True)], dim=1)

    def training_step(self, batch: dict[str, Tensor], minimise: Minimise) -> dict[str, Tensor]:
        """Update the generator, then the discriminator."""
        real, labels = to_tensor(batch["images"]), self.training_condition(batch)
        losses = self.generator_losses(real, labels, batch)
        minimise(torch.stack(list(losses.values())).sum(), 0)

        with torch.no_grad():
            drawn, _ = self._draw(real, labels, batch)
        verdict_drawn, verdict_real = self._judge(drawn, real, labels)
        scales = [hinge_discriminator_loss(r[-1], f[-1]) for r, f in zip(verdict_real, verdict_drawn, strict=True)]
        loss = torch.stack(scales).sum() / len(scales)
        minimise(loss, 1)
        return {f"loss_{name}": value for name, value in losses.items()} | {"loss_d": loss}

    def generator_losses(self, real: Tensor, labels: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hinge, feature matching, VGG and Kullback-Leibler terms, each with its weight."""
        config = self.config
        drawn, kl = self._draw(real, labels, batch)
        verdict_drawn, verdict_real = self._judge(drawn, real, labels)
        losses = {
            "gan": -torch.stack([scale[-1].mean() for scale in verdict_drawn]).mean(),
            "features": FEATURE_WEIGHT * _feature_distance(verdict_drawn, verdict_real),
        }
        if config.l1_weight:
            losses["l1"] = config.l1_weight * functional.l1_loss(drawn, real)
        if self._vgg:
            losses["vgg"] = config.vgg_weight * place(self._vgg[0], real.device)(drawn, real)
        if kl is not None:
            losses["kl"] = KL_WEIGHT * kl
        return losses

    def finish(self) -> None:
        """Bring the spectral norms of averaged weights in order."""
        if self.config.ema_decay is not None:
            settle_spectral_norms(self)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for generator and encoder, and for the discriminator, each at its own rate."""
        config = self.config
        drawing = [*self.generator.parameters(), *(self.encoder.parameters() if self.encoder else ())]
        fused = fused_optimizers(config.training)
        return [
            torch.optim.Adam(drawing, config.lr_generator, ADAM_BETAS, fused=fused),
            torch.optim.Adam(self.discriminator.parameters(), config.lr_discriminator, ADAM_BETAS, fused=fused),
        ]

    def _draw(self, real: Tensor, labels: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) in the style of real ones, and the divergence of their codes from the prior."""
        step = int(batch["step"])
        keys = [(self.seed, "code", step, position) for position in batch["position"].tolist()]
        z, kl = torch.stack([self.code(*key) for key in keys]).to(real, non_blocking=True), None
        if self.encoder is not None:
            mean, log_variance = self.encoder(real)
            kl = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
            kl = kl * started_processes()  # a sum over the batch, whereas gradients are averaged over the processes
            z = mean + z * torch.exp(0.5 * log_variance)
        return self.generator(self.with_noise(labels, keys), z), kl

    def code(self, *keys: Any) -> Tensor:
        """Draw a style code, (latent,), from a seed and keys."""
        return torch.randn(self.config.latent, generator=torch_generator(*keys))

    def _judge(self, drawn: Tensor, real: Tensor, labels: Tensor) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        # Both halves in one batch, so that they meet the same statistics.
        verdicts = self.discriminator(torch.cat([torch.cat([labels, drawn], 1), torch.cat([labels, real], 1)]))
        halves = [[layer.chunk(2) for layer in scale] for scale in verdicts]
        return [[pair[0] for pair in scale] for scale in halves], [[pair[1] for pair in scale] for scale in halves]

    def _start_small(self, gain: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if not parametrize.is_parametrized(module, "weight"):  # spectral norm takes the size of a weight away
                    nn.init.xavier_normal_(module.weight, gain)


class SpadeGenerator:
    """A trained SPADE that draws with random style codes or given ones; ``header`` is that of its checkpoint."""

    method = "spade"
    references_per_style = 1

    def __init__(
        self, model: Spade, device: torch.device | None = None, header: CheckpointHeader | None = None
    ) -> None:
        self.model = place(model.eval(), device or choose_device())
        self.header = header

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load a checkpoint made by :func:`counterstain.generators.train.train_spade`."""
        header, state = load_checkpoint(folder, "spade")
        config = build_stored(SpadeConfig, header.config, folder).model_copy(update={"vgg_weight": 0.0})
        labels, size_px = header.taxonomy.num_labels, header.size_px
        return cls(
            rebuilt(lambda: Spade(config, labels, size_px), state, folder, spare=("discriminator",)), header=header
        )

    @property
    def settings(self) -> dict[str, Any]:
        """How it draws, for the record."""
        shown = self.model.config.counterstain
        return {} if shown is None else {"counterstain": shown.model_dump(mode="json")}

    @torch.no_grad()
    def draw(self, requests: Sequence[DrawRequest]) -> list[np.ndarray]:
        """Draw images, with a code drawn by the seed where no style is given; MismatchError at another size.

        Without instances the borders of the labels stand in for theirs. Networks that are shown a counterstain keep
        the nuclei of the real image, where there is one.
        """
        size = (self.model.size_px, self.model.size_px)
        for request in requests:
            if request.mask.shape != size:
                given = " x ".join(map(str, request.mask.shape))
                raise MismatchError(f"this SPADE draws {size[0]} px, the mask is {given} px; train one at that size")
        return fixed_batches(self._draw, self.model.config.compute_batch, requests)

    @torch.no_grad()
    def style_codes(self, references: Sequence[Patch]) -> np.ndarray:
        """Return the encoder's means for reference patches, (n, latent) float, their tumour filled with background.

        Raises ConfigError where the network was trained without its encoder.
        """
        if self.model.encoder is None:
            raise ConfigError("synthesis.style: this SPADE was trained with use_vae: false; use source: none")
        images = [without_tumour(patch.image, patch.label_mask) for patch in references]
        seen = [self.model.encoder(to_tensor(on_device(image[None], self.model.device)))[0] for image in images]
        return torch.cat(seen).cpu().numpy()

    def _draw(self, requests: Sequence[DrawRequest]) -> np.ndarray:
        device, keys = self.model.device, [(request.seed, "code") for request in requests]
        masks = np.stack([request.mask for request in requests])
        instances, images, styles = (stacked(requests, field) for field in ("instances", "image", "style"))
        shown = masks.astype(np.int32) if instances is None else instances
        real = None if images is None else on_device(images, device)
        labels = self.model.condition(on_device(masks, device), on_device(shown, device), real)
        z = torch.stack([self.model.code(*key) for key in keys]) if styles is None else torch.from_numpy(styles)
        return to_images(self.model.generator(self.model.with_noise(labels, keys), z.to(device)))


def _feature_distance(drawn: list[list[Tensor]], real: list[list[Tensor]]) -> Tensor:
    """L1 distance of all but the last layer's features, averaged over the scales."""
    distances = [
        functional.l1_loss(f, r.detach())
        for drawn_scale, real_scale in zip(drawn, real, strict=True)
        for f, r in zip(drawn_scale[:-1], real_scale[:-1], strict=True)
    ]
    return torch.stack(distances).sum() / len(drawn)
