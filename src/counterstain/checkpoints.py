"""Trained networks on disk: safetensors for the weights, JSON for all that is known about them; no code is loaded.

A checkpoint folder holds ``model.safetensors`` and ``model.json``, the header; the header is written last and holds
the hash of the weights, so a folder with it is whole. While training runs, the folder holds ``last.ckpt``, its state.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

import counterstain
from counterstain.config import Config, build
from counterstain.errors import CounterstainWarning, InputError, MismatchError, StorageError
from counterstain.storage import read_json, replacing, sha256_of, stage_of, sweep, write_json
from counterstain.taxonomy import Taxonomy

WEIGHTS_FILE, HEADER_FILE = "model.safetensors", "model.json"
PROGRESS_FILE, PROGRESS_FORMAT = "last.ckpt", "counterstain 2"
Kind = str  # stage of a registered training, or segmenter or judge


class CheckpointHeader(Config):
    """What is known about a trained network."""

    kind: Kind
    taxonomy: Taxonomy
    """The subtypes that it was trained on."""
    size_px: int
    """Edge of its training patches."""
    mpp: float
    """Their micrometres per pixel."""
    config: dict[str, Any]
    """The configuration it was built and trained with."""
    seed: int
    patients_seen: tuple[str, ...]
    """Every patient whose tissue it saw, directly or through another network or synthetic images."""
    tissue_seen: tuple[str, ...] = ()
    """Hashes of the images of its training regions, for a segmenter; none in checkpoints of earlier versions."""
    cohort: str
    """Fingerprint of the training cohort."""
    notes: dict[str, Any] = Field(default_factory=dict)
    """Anything else worth knowing, for example the checkpoint of the first stage."""
    version: str = counterstain.__version__
    """Version of counterstain that trained it."""
    sha256: str = ""
    """Hash of the weights: the identity of the checkpoint."""


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a whole checkpoint."""
    return (folder / HEADER_FILE).exists()


def save_checkpoint(folder: Path, state: dict[str, Tensor], header: CheckpointHeader) -> CheckpointHeader:
    """Write a checkpoint and return its header with the hash of the weights."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    sweep(folder / WEIGHTS_FILE)
    with replacing(folder / WEIGHTS_FILE) as partial:
        partial.write_bytes(save(tensors))
    header = header.model_copy(update={"sha256": sha256_of(folder / WEIGHTS_FILE)})
    write_json(folder / HEADER_FILE, header.model_dump(mode="json"))
    return header


def read_header(folder: Path) -> CheckpointHeader:
    """Read what is known about a checkpoint.

    Raises
    ------
    InputError
        There is no checkpoint, or its training has not finished.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder")
    if not is_finished(folder):
        stage = stage_of(folder)
        if stage is not None and stage.startswith("train"):
            raise InputError(f"{folder}: its training was interrupted; give the command that trains it again")
        raise InputError(f"{folder}: not a checkpoint ({f'made by {stage}' if stage else HEADER_FILE + ' is missing'})")
    return build(CheckpointHeader, read_json(folder / HEADER_FILE), folder / HEADER_FILE)


def load_checkpoint(folder: Path, kind: Kind) -> tuple[CheckpointHeader, dict[str, Tensor]]:
    """Load the weights of a checkpoint.

    Raises
    ------
    InputError, MismatchError, StorageError
        There is no finished checkpoint, it is of another kind, its weights are damaged.
    """
    header = read_header(folder)
    if header.kind != kind:
        raise MismatchError(f"{folder}: is a checkpoint of kind {header.kind!r}, expected {kind!r}")
    weights = folder / WEIGHTS_FILE
    remedy = "delete its folder and train it again"
    if not weights.exists() or sha256_of(weights) != header.sha256:
        raise StorageError(f"{weights}: missing or damaged (its hash differs from the header's); {remedy}")
    try:
        return header, load_file(weights)
    except SafetensorError as error:
        raise StorageError(f"{weights}: damaged ({error}); {remedy}") from error


def require_taxonomy(folder: Path, header: CheckpointHeader, taxonomy: Taxonomy) -> None:
    """Raise MismatchError unless a checkpoint was trained on the same subtypes."""
    if header.taxonomy.names != taxonomy.names:
        raise MismatchError(
            f"{folder}: was trained on the subtypes {', '.join(header.taxonomy.names)}; "
            f"this cohort has {', '.join(taxonomy.names)}; train it on this taxonomy"
        )


def save_progress(file: Path, content: Mapping[str, Any]) -> None:
    """Save the state of a training that is under way."""
    buffer = io.BytesIO()  # torch's own writer hides that a disk is full
    torch.save({"format": PROGRESS_FORMAT, **content}, buffer)
    sweep(file)  # each as large as the whole
    with replacing(file) as partial:
        partial.write_bytes(buffer.getbuffer())


def read_progress(file: Path) -> dict[str, Any] | None:
    """Read the state of a training, None without one; a torn one is set aside, a reading error changes nothing."""
    if not file.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        if not _is_torn(file):
            why = str(error).partition("\n")[0]
            raise StorageError(f"{file}: cannot be read ({why}) and is left as it is; run the command again") from error
        fault = "is torn"
    else:
        if content.get("format") == PROGRESS_FORMAT:
            return content
        fault = "was written by another version of counterstain"
    aside = file.with_name(f"{file.name}.set-aside")
    file.replace(aside)
    warnings.warn(
        f"{file}: {fault}; it is now called {aside.name}, and training starts anew", CounterstainWarning, stacklevel=5
    )
    return None


def _is_torn(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is not None
    except (zipfile.BadZipFile, EOFError):
        return True
    except OSError:  # says nothing about the file
        return False


def forget_progress(folder: Path) -> None:
    """Delete the state of a training whose result is saved."""
    sweep(folder / PROGRESS_FILE)
    (folder / PROGRESS_FILE).unlink(missing_ok=True)


def read_state(path: Path, setting: str = "") -> dict[str, Tensor]:
    """Read weights of other projects: safetensors, or PyTorch's own format, of which no code is run.

    The file holds a state dict, perhaps under ``state_dict``; messages name the ``setting`` that it was given by.

    Raises
    ------
    InputError
        The file is missing, damaged, holds more than tensors, or no state dict.
    """
    where = f"{setting} {path}".lstrip()
    if not path.is_file():
        raise InputError(f"{where}: no such weights file")
    try:
        safe = path.suffix == ".safetensors"
        content: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe is None:
            raise InputError(f"{where}: not a file of weights, or damaged") from error
        raise InputError(
            f"{where}: holds more than plain tensors ({unsafe[1]}), which could run code, so it is not opened; if you "
            "trust it, save its state dict alone as safetensors and give that file"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{where}: not a file of weights, or damaged ({reason})") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    wanted = f"{where}: expected a state dict (names -> tensors), found"
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{wanted} {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{wanted} {type(value).__name__} at {name!r}")
    return dict(content)
