"""Small encoders: the linear first stage of principal components, and the network of styles.

Shapes: B = batch, z = latent channels, f = factor, H, W = rows and columns in pixels, h, w = H / f, W / f.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class LinearAutoencoder(nn.Module):
    """Project blocks of f x f pixels to z components and back.

    Parameters
    ----------
    factor : int
    latent_channels : int
        At most 3 f².
    """

    basis: Tensor
    mean: Tensor

    def __init__(self, factor: int, latent_channels: int) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("basis", torch.zeros(latent_channels, 3, factor, factor))
        self.register_buffer("mean", torch.zeros(3, factor, factor))

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> float:
        """Find the components of batches of images (B, 3, H, W), -1..1; return the share of the variance they keep.

        Batches are seen one at a time: their scatter matrices are added up (Chan et al. 1979).
        """
        f = self.factor
        count, mean, scatter = 0, torch.zeros(3 * f * f).double(), torch.zeros(3 * f * f, 3 * f * f).double()
        for images in batches:
            blocks = functional.unfold(images.double(), f, stride=f).movedim(1, 2).reshape(-1, 3 * f * f)
            shift = blocks.mean(0) - mean
            centred = blocks - blocks.mean(0)
            total = count + len(blocks)
            scatter += centred.T @ centred + torch.outer(shift, shift) * count * len(blocks) / total
            mean += shift * len(blocks) / total
            count = total
        variances, components = torch.linalg.eigh(scatter)
        kept = components[:, -self.basis.shape[0] :].flip(1).T
        # The sign of a component is arbitrary: let its largest entry be positive, on every machine.
        largest = kept.gather(1, kept.abs().argmax(1, keepdim=True))
        self.basis.copy_((kept * largest.sign()).reshape(self.basis.shape))
        self.mean.copy_(mean.reshape(self.mean.shape))
        return float(variances[-self.basis.shape[0] :].sum() / variances.sum())

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> components (B, z, h, w)."""
        offset = (self.basis * self.mean).sum((1, 2, 3))
        return functional.conv2d(images, self.basis, -offset, stride=self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Components (B, z, h, w) -> images (B, 3, H, W)."""
        blocks = functional.conv_transpose2d(latents, self.basis, stride=self.factor)
        return blocks + self.mean.repeat(1, latents.shape[-2], latents.shape[-1])


# The network of a style: an encoder of a reference's background, and what a denoiser makes of a style vector.
#
# Shapes: B = batch, n = references of a style, S = length of a style vector: the learned code, six stain statistics,
# and 1 where a style is given.

STAIN_VALUES = 6
HALVINGS = 4


class StyleNetwork(nn.Module):
    """Encode references, and embed styles for a denoiser.

    Parameters
    ----------
    width : int
        Features of the encoder's first layer.
    code : int
        Length of the learned code.
    embedding : int
        Length of the denoiser's embedding of the timestep, to which a style's is added.
    """

    def __init__(self, width: int, code: int, embedding: int) -> None:
        super().__init__()
        self.length = code + STAIN_VALUES + 1
        features = [3, *(width * 2**i for i in range(HALVINGS))]
        layers = [
            nn.Sequential(nn.Conv2d(fin, fout, 3, stride=2, padding=1), nn.GroupNorm(1, fout), nn.SiLU())
            for fin, fout in pairwise(features)
        ]
        self.encoder = nn.Sequential(*layers)
        self.code = nn.Linear(features[-1], code)
        last = nn.Linear(embedding, embedding)
        nn.init.zeros_(last.weight)  # training starts from a network without a style
        nn.init.zeros_(last.bias)
        self.embedding = nn.Sequential(nn.Linear(self.length, embedding), nn.SiLU(), last)

    def forward(self, seen: Tensor, stain: Tensor) -> Tensor:
        """Background as optical density (B, n, 3, s, s) and its statistics (B, n, 6) -> style vectors (B, S)."""
        features = self.encoder(seen.to(stain.dtype).flatten(0, 1)).mean((2, 3))
        code = self.code(features.reshape(*seen.shape[:2], -1).mean(1))
        stain = stain.mean(1)
        return torch.cat([code, stain, torch.ones_like(stain[:, :1])], dim=1)
