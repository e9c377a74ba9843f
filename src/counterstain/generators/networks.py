"""Our own networks: SPADE's, the patch GAN's discriminator, perceptual distances.

Shapes: B = batch, C = label channels (one-hot labels and the edge channel), H, W = rows and columns in pixels, h, w =
of a layer's features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from counterstain.checkpoints import read_state, require_finite
from counterstain.errors import InputError
from counterstain.generators.spade_config import UPSAMPLINGS

LEAK = 0.2
LAYERS = 4  # of a discriminator, before its verdict
ENCODED_PX, LAST_PX = 256, 4  # SPADE's encoder shrinks images to the first size and halves them to the second
POWER_ITERATIONS = 50
IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VGG_SLICES = (2, 7, 12, 21, 30)  # after relu1_1, relu2_1, relu3_1, relu4_1, relu5_1
VGG_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
RANDOM = "random"


# SPADE (Park et al. 2019, section 3 and appendix A)


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
        return torch.as_tensor(self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden))


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
        return torch.as_tensor(shortcut + self.conv_1(functional.leaky_relu(self.norm_1(y, labels), LEAK)))


class SpadeGeneratorNetwork(nn.Module):
    """A latent code of length ``latent``, grown to an image, with the label map fed in at every scale.

    ``size_px`` is a multiple of 32, ``width`` the published ``ngf``, ``hidden`` the width of the modulating networks.
    """

    def __init__(self, label_channels: int, size_px: int, width: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.start_px, self.top = size_px // 2**UPSAMPLINGS, 16 * width

        def block(fin: int, fout: int) -> SpadeResBlock:
            return SpadeResBlock(fin * width, fout * width, label_channels, hidden)

        self.fc = nn.Linear(latent, self.top * self.start_px**2)
        self.head_0, self.G_middle_0, self.G_middle_1 = block(16, 16), block(16, 16), block(16, 16)
        self.up_0, self.up_1, self.up_2, self.up_3 = block(16, 8), block(8, 4), block(4, 2), block(2, 1)
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


class ImageEncoder(nn.Module):
    """Stride-2 convolutions down to 4 x 4 (six at 256 px), then a mean and a log-variance, ``latent`` values each.

    Images of ``size_px`` are encoded at the nearest power of two times 4 that is not above 256 px; ``width`` (``ngf``)
    is the number of features of the first layer.
    """

    def __init__(self, size_px: int, width: int, latent: int) -> None:
        super().__init__()
        halvings = (min(size_px, ENCODED_PX) // LAST_PX).bit_length() - 1
        self.encode_px = LAST_PX * 2**halvings
        features = [3, *(width * min(2**i, 8) for i in range(halvings))]
        convs = (nn.Conv2d(fin, fout, 3, stride=2, padding=1, bias=False) for fin, fout in pairwise(features))
        self.layers = nn.ModuleList(
            nn.Sequential(spectral_norm(conv), nn.InstanceNorm2d(conv.out_channels)) for conv in convs
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
            for _ in range(POWER_ITERATIONS):
                _ = module.weight  # an iteration each time it is looked at
            module.train(was_training)


# Discriminators that judge patches (Park et al. 2019, after pix2pixHD; Isola et al. 2017)


class ScaleDiscriminator(nn.Module):
    """4 x 4 convolutions with spectral and instance norm; returns the features of every layer, the verdict last."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        features = [min(width * 2**i, width * 8) for i in range(LAYERS)]
        stages: list[nn.Module] = [nn.Sequential(_conv(channels, features[0], 2, 2), nn.LeakyReLU(LEAK))]
        for i in range(1, LAYERS):
            conv = spectral_norm(_conv(features[i - 1], features[i], 1 if i == LAYERS - 1 else 2, 2, bias=False))
            stages.append(nn.Sequential(conv, nn.InstanceNorm2d(features[i]), nn.LeakyReLU(LEAK)))
        stages.append(_conv(features[-1], 1, 1, 2))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, channels, H, W) -> features of every layer; the last is the verdict on each patch."""
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class MultiscaleDiscriminator(nn.Module):
    """The same discriminator at full and at half size."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(ScaleDiscriminator(channels, width) for _ in range(2))

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        """(B, channels, H, W) -> for each scale the features of every layer, the verdict last."""
        outputs = []
        for discriminator in self.discriminators:
            outputs.append(discriminator(x))
            x = functional.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        return outputs


class PatchDiscriminator(nn.Sequential):
    """PatchGAN: (B, 3, H, W) -> a verdict on each of overlapping patches, (B, 1, h, w).

    Its weights start from a normal distribution of standard deviation 0.02 (Radford et al. 2016).
    """

    def __init__(self, width: int) -> None:
        features = [min(width * 2**i, width * 8) for i in range(LAYERS)]
        stages: list[nn.Module] = [_conv(3, features[0], 2, 1), nn.LeakyReLU(LEAK)]
        for i in range(1, LAYERS):
            conv = _conv(features[i - 1], features[i], 1 if i == LAYERS - 1 else 2, 1, bias=False)
            stages += [conv, nn.BatchNorm2d(features[i]), nn.LeakyReLU(LEAK)]
        super().__init__(*stages, _conv(features[-1], 1, 1, 1))
        for stage in self:
            if isinstance(stage, nn.Conv2d | nn.BatchNorm2d):
                nn.init.normal_(stage.weight, 1.0 if isinstance(stage, nn.BatchNorm2d) else 0.0, 0.02)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the verdicts on real and drawn images."""
    return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()


def _conv(fin: int, fout: int, stride: int, padding: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(fin, fout, 4, stride=stride, padding=padding, bias=bias)


# Perceptual distances: features of VGG19 (Johnson et al. 2016, as in SPADE) and LPIPS (Zhang et al. 2018). Both need
# weights that were trained on ImageNet. They are fetched by torchvision where there is a network, or read from a local
# file, or switched off by a weight of 0. Where only the time of a training matters, ``random`` ones will do.


class VggDistance(nn.Module):
    """Weighted L1 distance between features of VGG19; weights are "imagenet", "random" or the path of a state dict."""

    mean: Tensor
    sd: Tensor

    def __init__(self, weights: str) -> None:
        super().__init__()
        layers = _vgg19(weights).features.eval().requires_grad_(requires_grad=False)
        starts = (0, *VGG_SLICES[:-1])
        self.slices = nn.ModuleList(layers[a:b] for a, b in zip(starts, VGG_SLICES, strict=True))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("sd", torch.tensor(IMAGENET_SD)[:, None, None], persistent=False)

    def forward(self, drawn: Tensor, real: Tensor) -> Tensor:
        """Distance of two batches (B, 3, H, W), -1..1; gradients flow to ``drawn``."""
        x, y = (((images + 1) / 2 - self.mean) / self.sd for images in (drawn, real))
        distance = drawn.new_zeros(())
        for part, weight in zip(self.slices, VGG_WEIGHTS, strict=True):
            x = part(x)
            with torch.no_grad():
                y = part(y)
            distance = distance + weight * functional.l1_loss(x, y)
        return distance


def lpips_distance(weights: str) -> nn.Module:
    """Build LPIPS with a VGG16 backbone; the result maps two batches (B, 3, H, W), -1..1, to (B, 1, 1, 1).

    "random" is a stand-in that takes about the same time, also where lpips is not installed; its result is ().
    """
    if weights == RANDOM:
        return VggDistance(RANDOM).requires_grad_(requires_grad=False)
    try:
        import lpips
    except ImportError as error:
        raise InputError("autoencoder.lpips_weight is above 0: install counterstain[lpips], or set it to 0") from error
    with _fetching("VGG16", "autoencoder.lpips_weights", "autoencoder.lpips_weight"):
        network: Any = lpips.LPIPS(net="vgg", pnet_rand=weights != "imagenet", verbose=False)
    if weights != "imagenet":
        from torchvision.models import vgg16

        backbone: Any = _load(vgg16(), Path(weights))
        for slice_ in range(1, 6):
            for index, layer in network.net.get_submodule(f"slice{slice_}").named_children():
                layer.load_state_dict(backbone.features[int(index)].state_dict())
    distance: nn.Module = network.eval().requires_grad_(requires_grad=False)
    return distance


def _vgg19(weights: str) -> Any:
    from torchvision.models import VGG19_Weights, vgg19

    if weights == "imagenet":
        with _fetching("VGG19", "spade.vgg_weights", "spade.vgg_weight"):
            return vgg19(weights=VGG19_Weights.IMAGENET1K_V1)
    return vgg19() if weights == RANDOM else _load(vgg19(), Path(weights))


def _load(network: nn.Module, path: Path) -> nn.Module:
    """Set the weights of a network of torchvision from a file."""
    state = read_state(path)
    require_finite(state, path)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path}: not the weights of {type(network).__name__} as torchvision has them") from error
    return network


@contextmanager
def _fetching(network: str, path_key: str, weight_key: str) -> Iterator[None]:
    """Turn a failed download into one line with the remedy."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"the ImageNet weights of {network} cannot be fetched; give {path_key}=FILE, or switch the term off with "
            f"{weight_key}=0"
        ) from error
