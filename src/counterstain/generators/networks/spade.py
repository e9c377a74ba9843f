"""The SPADE generator (Park et al. 2019, section 3 and appendix A), the encoder of its VAE, and spectral norms."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from counterstain.generators.spade_config import UPSAMPLINGS

ITERATIONS = 50


@torch.no_grad()
def settle_spectral_norms(network: nn.Module) -> None:
    """Find the singular vectors of the weights as they are, in place, by power iterations.

    A training step follows them by one iteration. An average of weights needs vectors of its own: averages of the
    vectors are shorter than 1, which makes the norm too small and the weight too large.
    """
    for module in network.modules():
        if parametrize.is_parametrized(module, "weight"):
            was_training = module.training
            module.train()
            for _ in range(ITERATIONS):
                _ = module.weight  # an iteration each time it is looked at
            module.train(was_training)


# The image encoder of SPADE's VAE (Park et al. 2019, appendix A, figure 14).

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


# The SPADE generator (Park et al. 2019, section 3 and appendix A).
#
# Shapes: B = batch, C = label channels (one-hot labels and the edge channel), H, W = rows and columns of the image.

LEAK = 0.2


class Spade(nn.Module):
    """Normalise without parameters, then scale and shift by what the label map says (equation 1)."""

    def __init__(self, features: int, label_channels: int, hidden: int) -> None:
        super().__init__()
        self.param_free_norm = nn.BatchNorm2d(features, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_channels, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, features, 3, padding=1)
        self.mlp_beta = nn.Conv2d(hidden, features, 3, padding=1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Modulate ``x`` (B, features, h, w) by ``labels`` (B, C, H, W), shrunk to its size."""
        hidden = self.mlp_shared(functional.interpolate(labels, size=x.shape[2:], mode="nearest"))
        modulated: Tensor = self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)
        return modulated


class SpadeResBlock(nn.Module):
    """Two modulated convolutions beside a (learned, where the width changes) shortcut (figure 4)."""

    def __init__(self, fin: int, fout: int, label_channels: int, hidden: int) -> None:
        super().__init__()
        middle = min(fin, fout)
        self.learned_shortcut = fin != fout
        self.conv_0 = spectral_norm(nn.Conv2d(fin, middle, 3, padding=1))
        self.conv_1 = spectral_norm(nn.Conv2d(middle, fout, 3, padding=1))
        self.norm_0 = Spade(fin, label_channels, hidden)
        self.norm_1 = Spade(middle, label_channels, hidden)
        if self.learned_shortcut:
            self.conv_s = spectral_norm(nn.Conv2d(fin, fout, 1, bias=False))
            self.norm_s = Spade(fin, label_channels, hidden)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """(B, fin, h, w) -> (B, fout, h, w)."""
        shortcut = self.conv_s(self.norm_s(x, labels)) if self.learned_shortcut else x
        y = self.conv_0(functional.leaky_relu(self.norm_0(x, labels), LEAK))
        y = self.conv_1(functional.leaky_relu(self.norm_1(y, labels), LEAK))
        out: Tensor = shortcut + y
        return out


class SpadeGeneratorNetwork(nn.Module):
    """A latent code, grown to an image, with the label map fed in at every scale.

    Parameters
    ----------
    label_channels : int
        C.
    size_px : int
        Edge of the images, a multiple of 32.
    width : int
        ``ngf``.
    latent : int
        Length of the latent code.
    hidden : int
        Width of the modulating networks.
    """

    def __init__(self, label_channels: int, size_px: int, width: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.start_px, self.top = size_px // 2**UPSAMPLINGS, 16 * width

        def block(fin: int, fout: int) -> SpadeResBlock:
            return SpadeResBlock(fin * width, fout * width, label_channels, hidden)

        self.fc = nn.Linear(latent, self.top * self.start_px**2)
        self.head_0 = block(16, 16)
        self.G_middle_0 = block(16, 16)
        self.G_middle_1 = block(16, 16)
        self.up_0 = block(16, 8)
        self.up_1 = block(8, 4)
        self.up_2 = block(4, 2)
        self.up_3 = block(2, 1)
        self.conv_img = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, labels: Tensor, z: Tensor) -> Tensor:
        """Labels (B, C, H, W) and codes (B, latent) -> images (B, 3, H, W) float, -1..1."""
        x = self.fc(z).view(-1, self.top, self.start_px, self.start_px)
        x = self.head_0(x, labels)
        x = self.G_middle_0(_double(x), labels)
        x = self.G_middle_1(x, labels)
        for up in (self.up_0, self.up_1, self.up_2, self.up_3):
            x = up(_double(x), labels)
        return torch.tanh(self.conv_img(functional.leaky_relu(x, LEAK)))


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="nearest")
