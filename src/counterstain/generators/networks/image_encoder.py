"""The image encoder of SPADE's VAE (Park et al. 2019, appendix A, figure 14)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from counterstain.generators.networks.spade import LEAK

LARGEST_PX = 256  # images are shrunk to this size
LAST_PX = 4


class ImageEncoder(nn.Module):
    """Stride-2 convolutions down to 4 x 4 (six at 256 px), then a mean and a log-variance.

    Parameters
    ----------
    size_px : int
        Edge of the images; it is encoded at the nearest power of two times 4 that is not above 256 px.
    width : int
        ``ngf``: features of the first layer.
    latent : int
        Length of the latent code.
    """

    def __init__(self, size_px: int, width: int, latent: int) -> None:
        super().__init__()
        halvings = (min(size_px, LARGEST_PX) // LAST_PX).bit_length() - 1
        self.encode_px = LAST_PX * 2**halvings
        features = [3, *(width * min(2**i, 8) for i in range(halvings))]
        self.layers = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(fin, fout, 3, stride=2, padding=1, bias=False)), nn.InstanceNorm2d(fout)
            )
            for fin, fout in pairwise(features)
        )
        self.fc_mu = nn.Linear(features[-1] * LAST_PX**2, latent)
        self.fc_var = nn.Linear(features[-1] * LAST_PX**2, latent)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), -1..1 -> mean and log-variance, (B, latent) each."""
        x = images
        if x.shape[-1] != self.encode_px:
            x = functional.interpolate(x, size=(self.encode_px, self.encode_px), mode="bilinear")
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else functional.leaky_relu(x, LEAK))
        x = functional.leaky_relu(x, LEAK).flatten(1)
        return self.fc_mu(x), self.fc_var(x)
