"""Perceptual distances between images: VGG19 features (Johnson et al. 2016, as in SPADE) and LPIPS (Zhang et al. 2018).

Both need weights that were trained on ImageNet. They are fetched by torchvision where there is a network, or read from
a local file, or switched off by a weight of 0. Where only the time of a training matters, ``random`` ones will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterstain.checkpoints import read_state, require_finite
from counterstain.errors import InputError

IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VGG_SLICES = (2, 7, 12, 21, 30)  # after relu1_1, relu2_1, relu3_1, relu4_1, relu5_1
VGG_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
RANDOM = "random"


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
