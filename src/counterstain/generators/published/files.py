"""State dicts on disk: safetensors, or PyTorch's own format read without running code."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from counterstain.errors import InputError
from counterstain.storage import replacing


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict, or the one inside a training's checkpoint (under ``state_dict``).

    Raises
    ------
    InputError
        The file is missing, damaged, holds more than tensors, or no state dict.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load(path)
    except InputError:
        raise
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a file of weights, or damaged ({_first_line(error)})") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path}: expected a state dict (names -> tensors), found {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(
                f"{path}: expected a state dict (names -> tensors), found {type(value).__name__} at {name!r}"
            )
    return dict(content)


def write_state(path: Path, content: Mapping[str, Tensor | Mapping[str, Tensor]]) -> None:
    """Write a state dict, or one under ``state_dict``, in PyTorch's own format."""
    buffer = io.BytesIO()  # torch's own writer hides that a disk is full
    torch.save(dict(content), buffer)
    with replacing(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe is None:
            raise InputError(f"{path}: not a file of weights, or damaged") from error
        raise InputError(
            f"{path}: holds more than plain tensors ({unsafe[1]}), which could run code, so it is not opened; where it "
            "is trusted, save its state dict alone as safetensors and give that"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
