"""The network of a style: an encoder of a reference's background, and what a denoiser makes of a style vector.

Shapes: B = batch, n = references of a style, S = length of a style vector: the learned code, six stain statistics, and
1 where a style is given.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

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

    def beside(self, condition: Tensor, styles: Tensor) -> Tensor:
        """Append styles (B, S) to a condition (B, C, h, w) as S constant channels, to be split off by :meth:`split`.

        As channels they go wherever the condition goes: into windows, batches and guidance.
        """
        return torch.cat([condition, styles[:, :, None, None].expand(-1, -1, *condition.shape[2:])], dim=1)

    def split(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Undo :meth:`beside`; return the condition, and the styles as embeddings (B, embedding)."""
        shown, styles = condition[:, : -self.length], condition[:, -self.length :]
        embedded: Tensor = self.embedding(styles[:, :, 0, 0])
        return shown, embedded
