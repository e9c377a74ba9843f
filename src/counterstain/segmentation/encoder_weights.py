"""The weights that an encoder starts from: ImageNet's, those of a local file, or none."""

from __future__ import annotations

import functools
import pickle
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from counterstain.errors import InputError
from counterstain.storage import sha256_of

IMAGENET = "imagenet"


def load_encoder_weights(encoder: nn.Module, name: str, weights: str | None, *, required: bool) -> str:
    """Load weights into an encoder in place.

    Parameters
    ----------
    encoder : Module
        An encoder of segmentation_models_pytorch.
    name : str
        Its name there, for example ``resnet34``.
    weights : str, optional
        ``imagenet``, the path of a state dict (safetensors, or PyTorch's own read with ``weights_only``), or None.
    required : bool
        Whether ImageNet weights that cannot be had are an error; otherwise the encoder is left as it is, with a
        notice on standard error.

    Returns
    -------
    str
        What the encoder starts from, for the record.

    Raises
    ------
    InputError
        The file is missing, is not a state dict or is that of another network; or ImageNet weights are required and
        cannot be had.
    """
    if weights is None:
        return "random"
    if weights != IMAGENET:
        path = Path(weights)
        _load(encoder, _read(path), name, weights)
        return f"{path.name} sha256:{sha256_of(path)}"
    state = _imagenet(name)
    if state is not None:
        _load(encoder, state, name, weights)
        return IMAGENET
    if required:
        raise InputError(
            f"encoder_weights imagenet: the weights of {name} cannot be downloaded here; "
            "give the path of a local file as encoder_weights, or null for random weights"
        )
    return "random (imagenet could not be had)"


@functools.cache
def _imagenet(name: str) -> dict[str, Tensor] | None:
    """Download ImageNet weights once per process; None where there is no connection."""
    from segmentation_models_pytorch.encoders import get_encoder

    try:
        encoder = get_encoder(name, weights=True if name.startswith("tu-") else IMAGENET)
    except OSError:
        sys.stderr.write(
            f"notice: ImageNet weights of {name} cannot be downloaded here; the encoder starts from random weights "
            "(encoder_weights takes the path of a local file)\n"
        )
        return None
    except KeyError as error:
        raise InputError(f"encoder_weights imagenet: there are none for {name}; set it to null") from error
    state: dict[str, Tensor] = encoder.state_dict()
    return state


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"encoder_weights {path}: no such file; expected imagenet, null or the path of a state dict")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"encoder_weights {path}: not a state dict ({_first_line(error)})") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"encoder_weights {path}: expected a state dict (names -> tensors)")
    return content


def _load(encoder: nn.Module, state: dict[str, Tensor], name: str, source: str) -> None:
    try:
        encoder.load_state_dict(dict(state))
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"encoder_weights {source}: do not fit encoder {name} ({detail})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
