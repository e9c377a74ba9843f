"""Networks of timm with weights of others: a file, a folder or a repository of the Hub, such as foundation models.

Nothing is downloaded unless a repository is named; no code is run that comes with weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from counterstain.checkpoints import read_state
from counterstain.errors import ConfigError, InputError
from counterstain.hub import fetched
from counterstain.storage import sha256_of

HUB = "hf-hub:"
CONFIG_FILE = "config.json"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")  # as timm saves them
_layers: Any = timm.layers
_SWIGLU: dict[str, Any] = {"mlp_layer": _layers.SwiGLUPacked, "act_layer": nn.SiLU}
_SCALED: dict[str, Any] = {"init_values": 1e-5}
# What the cards of published networks ask to build them with and their config.json cannot hold, by their names.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "uni": _SCALED | {"dynamic_img_size": True},
    "uni2-h": {
        "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "embed_dim": 1536, "mlp_ratio": 2.66667 * 2,
        "no_embed_class": True, "reg_tokens": 8, "dynamic_img_size": True,
    } | _SCALED | _SWIGLU,
    "virchow": _SWIGLU,
    "virchow2": _SWIGLU,
    "h-optimus-0": _SCALED,
    "h-optimus-1": _SCALED,
}  # fmt: skip
_BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
NORMALISED = {"h-optimus-0": _BIOPTIMUS, "h-optimus-1": _BIOPTIMUS}  # mean and standard deviation that their cards give


def weights_in(folder: Path) -> Path:
    """Return the file of weights in a folder as timm saves it, with its ``config.json``; InputError without one."""
    found = [folder / name for name in WEIGHTS_FILES if (folder / name).is_file()]
    if not found or not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder}: no folder of timm, which has {CONFIG_FILE} and {' or '.join(WEIGHTS_FILES)}")
    return found[0]


def located(name: str, weights: Path | None) -> tuple[Path | None, Path]:
    """Return the folder of a network, None where timm knows it by its name, and the file of its weights.

    ``name`` is a network of timm, whose ``weights`` must be given; a folder; or ``hf-hub:OWNER/NAME``, which is
    fetched. Raises ConfigError where there is no such network or it lacks weights, InputError where a file is missing.
    """
    folder = Path(name) if Path(name).is_dir() and not timm.is_model(name) else None
    if name.startswith(HUB):
        folder = fetched(name.removeprefix(HUB), (CONFIG_FILE, *WEIGHTS_FILES))
    if folder is not None:
        return folder, weights_in(folder) if weights is None else weights
    if not timm.is_model(name):
        raise ConfigError(
            f"{name}: timm has no network of this name, and no such folder is here; of the Hub, give {HUB}OWNER/NAME"
        )
    if weights is None:
        raise ConfigError(f"{name}: give the file of its weights as well; nothing is downloaded")
    return None, weights


def identity(name: str, weights: Path | None) -> str:
    """Return the hash of a network's weights; errors as of :func:`located`."""
    return sha256_of(located(name, weights)[1])


def feature_network(
    name: str, weights: Path | None, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return a network without its classifier, as images -> features (B, d), and what prepares images for it.

    A network that gives tokens, as foundation models do, gives its class token and the mean of its patches' tokens.
    Errors as of :func:`located`, and InputError where the weights do not fit.
    """
    folder, file = located(name, weights)
    known = Path(name.removeprefix(HUB)).name.lower()
    arguments = ARGUMENTS.get(known, {}) if folder is not None else {}
    try:
        network: Any = timm.create_model(
            name if folder is None else f"local-dir:{folder}", pretrained=False, num_classes=0, **arguments
        )
    except Exception as error:  # each network of timm has its own way to say that it cannot be made so
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{folder or name}: makes no network of timm ({reason})") from error
    state = without_classifier(network, read_state(file))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{file}: does not fit {name} ({' '.join(str(error).split())[:200]})") from error
    network = network.eval().requires_grad_(requires_grad=False).to(device)

    def features(images: Tensor) -> Tensor:
        found: Tensor = network(images)
        if found.ndim != 3:
            return found.flatten(1)
        first = network.num_prefix_tokens
        mean = found[:, first:].mean(1)
        return torch.cat([found[:, 0], mean], dim=1) if first else mean

    return features, _preparation(network, NORMALISED.get(known), device)


def without_classifier(network: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave the tensors of a network's classifier out of its weights."""
    heads = network.default_cfg.get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    return {key: value for key, value in state.items() if not (prefixes and key.startswith(prefixes))}


def _preparation(network: Any, normalised: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
    timm_data: Any = timm.data
    settings = timm_data.resolve_model_data_config(network)
    numbers = normalised or (settings["mean"], settings["std"])
    mean, sd = (torch.tensor(values, device=device)[:, None, None] for values in numbers)

    def prepare(images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 -> (B, 3, h, w) float."""
        pixels = images.permute(0, 3, 1, 2).float() / 255
        size = tuple(settings["input_size"][1:])
        return (functional.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1) - mean) / sd

    return prepare
