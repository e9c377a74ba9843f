"""Discriminators that judge patches: SPADE's at two scales, and the one of the autoencoder's patch GAN.

Sources: Park et al. 2019 (appendix A), after pix2pixHD; Isola et al. 2017 for the PatchGAN.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

LEAK = 0.2


class ScaleDiscriminator(nn.Module):
    """4 x 4 convolutions with spectral and instance norm; returns the features of every layer, the verdict last."""

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        features = [min(width * 2**i, width * 8) for i in range(layers)]
        stages: list[nn.Module] = [nn.Sequential(_conv(channels, features[0], 2), nn.LeakyReLU(LEAK))]
        for i in range(1, layers):
            conv = spectral_norm(_conv(features[i - 1], features[i], 1 if i == layers - 1 else 2, bias=False))
            stages.append(nn.Sequential(conv, nn.InstanceNorm2d(features[i]), nn.LeakyReLU(LEAK)))
        stages.append(_conv(features[-1], 1, 1))
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

    def __init__(self, channels: int, width: int, layers: int = 4, scales: int = 2) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(ScaleDiscriminator(channels, width, layers) for _ in range(scales))

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

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        features = [min(width * 2**i, width * 8) for i in range(layers + 1)]
        stages: list[nn.Module] = [_patch_conv(3, features[0], 2, bias=True), nn.LeakyReLU(LEAK)]
        for i in range(1, layers + 1):
            conv = _patch_conv(features[i - 1], features[i], 1 if i == layers else 2, bias=False)
            stages += [conv, nn.BatchNorm2d(features[i]), nn.LeakyReLU(LEAK)]
        super().__init__(*stages, _patch_conv(features[-1], 1, 1, bias=True))
        for stage in self:
            if isinstance(stage, nn.Conv2d | nn.BatchNorm2d):
                nn.init.normal_(stage.weight, 1.0 if isinstance(stage, nn.BatchNorm2d) else 0.0, 0.02)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the verdicts on real and drawn images."""
    return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()


def _conv(fin: int, fout: int, stride: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(fin, fout, 4, stride=stride, padding=2, bias=bias)


def _patch_conv(fin: int, fout: int, stride: int, *, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(fin, fout, 4, stride=stride, padding=1, bias=bias)
