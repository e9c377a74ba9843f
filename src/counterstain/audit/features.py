"""The features in which drawn and real images are compared: the judge's, or those of a network from a local file.

Shapes: B = batch, H, W = rows and columns in pixels, n = patches, d = number of features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from counterstain.audit.judge import Judge, describe, image_batches
from counterstain.data.patches import Patch
from counterstain.errors import ConfigError, InputError
from counterstain.generators.published.files import read_state

JUDGE, TIMM = "judge", "timm:"
Features = Callable[[Sequence[Patch]], np.ndarray]


def features_of(name: str, weights: Path | None, judge: Judge, batch_size: int) -> Features:
    """Return the function patches -> features (n, d) float64.

    Parameters
    ----------
    name : str
        ``judge``, or ``timm:NAME`` with the name of a network in timm.
    weights : Path, optional
        Its state dict, for ``timm:NAME``: safetensors, or PyTorch's own format; nothing is ever downloaded.

    Raises
    ------
    ConfigError
        No such network, or weights without a network.
    InputError
        The file is missing, damaged or of another network.
    """
    if name == JUDGE:
        if weights is not None:
            raise ConfigError(f"weights {weights}: the judge's features need no file; give features timm:NAME as well")
        return lambda patches: describe(judge, patches, batch_size)
    network = _load(name, weights).to(judge.device)
    prepare = _Preparation(network)

    @torch.no_grad()
    def describe_by_network(patches: Sequence[Patch]) -> np.ndarray:
        parts = [network(prepare(images)) for images, _ in image_batches(patches, batch_size, judge.device)]
        return np.concatenate([part.flatten(1).double().cpu().numpy() for part in parts])

    return describe_by_network


def _load(name: str, weights: Path | None) -> nn.Module:
    if not name.startswith(TIMM):
        raise ConfigError(f"features {name}: expected judge or timm:NAME, for example timm:resnet50")
    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        raise ConfigError(f"features {name}: timm has no network of this name")
    if weights is None:
        raise ConfigError(f"features {name}: give the file of its weights as well; nothing is downloaded")
    network: Any = timm.create_model(model, pretrained=False, num_classes=0)
    heads = network.default_cfg.get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    state = {key: value for key, value in read_state(weights).items() if not (prefixes and key.startswith(prefixes))}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{weights}: does not fit {model} ({' '.join(str(error).split())[:200]})") from error
    evaluated: nn.Module = network.eval().requires_grad_(requires_grad=False)
    return evaluated


def _data_config(network: nn.Module) -> dict[str, Any]:
    """Return what timm knows of the images that a network was trained on."""
    timm_data: Any = timm.data
    settings: dict[str, Any] = timm_data.resolve_model_data_config(network)
    return settings


class _Preparation:
    """Bring images (B, H, W, 3) uint8 to the size and colours that a network was trained on, (B, 3, h, w) float."""

    def __init__(self, network: nn.Module) -> None:
        settings = _data_config(network)
        self._size = tuple(settings["input_size"][1:])
        self._mean, self._sd = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))

    def __call__(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float() / 255
        sized = functional.interpolate(pixels, self._size, mode="bicubic", antialias=True).clamp(0, 1)
        return (sized - self._mean.to(sized)) / self._sd.to(sized)
