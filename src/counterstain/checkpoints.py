"""Trained networks on disk: safetensors for the weights, JSON for all that is known about them; no code is loaded.

A checkpoint folder holds ``model.safetensors`` and ``model.json``, the header; the header is written last and holds
the hashes of the weights and of itself, so a folder with it is whole. While training runs, the folder holds
``last.ckpt``, its state.
"""

from __future__ import annotations

import io
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

import counterstain
from counterstain.config import Config, build
from counterstain.data.split import NOBODY, PATIENTS_SEEN_FILE, read_patients_seen
from counterstain.errors import CounterstainError, CounterstainWarning, InputError, MismatchError, StorageError
from counterstain.storage import read_sealed, replacing, sha256_of, stage_of, sweep, write_sealed
from counterstain.taxonomy import Taxonomy

WEIGHTS_FILE, HEADER_FILE = "model.safetensors", "model.json"
PROGRESS_FILE, PROGRESS_FORMAT = "last.ckpt", "counterstain 2"
POOL_FOLDER = "latents"  # in the folder of a training under way
LARGEST_HEADER_BYTES = 16_000_000
REMEDY = "copy the folder again from where it came, or delete it and train it again"
Kind = str  # stage of a registered training, or segmenter or judge
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class CheckpointHeader(Config):
    """What is known about a trained network."""

    kind: Kind
    taxonomy: Taxonomy
    """The subtypes that it was trained on."""
    size_px: Annotated[int, Field(ge=1, le=65_536)]
    """Edge of its training patches."""
    mpp: Annotated[float, Field(gt=0)]
    """Their micrometres per pixel."""
    config: dict[str, Any]
    """The configuration it was built and trained with."""
    seed: int
    patients_seen: tuple[str, ...]
    """Every patient whose tissue it saw, directly or through another network or synthetic images."""
    tissue_seen: tuple[str, ...] = ()
    """Hashes of the images of its training regions, for a segmenter; none in checkpoints of earlier versions."""
    subtypes_unseen: Annotated[tuple[str, ...], Field(exclude_if=lambda names: not names)] = ()
    """Subtypes of which its training regions showed no instance: nothing is drawn as one of them."""
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
    return write_header(folder, header.model_copy(update={"sha256": sha256_of(folder / WEIGHTS_FILE)}))


def write_header(folder: Path, header: CheckpointHeader) -> CheckpointHeader:
    """Write what is known about a checkpoint, with a checksum, and return it."""
    write_sealed(folder / HEADER_FILE, header.model_dump(mode="json"))
    return header


def read_header(folder: Path) -> CheckpointHeader:
    """Read what is known about a checkpoint.

    Raises InputError or StorageError where there is no finished checkpoint, or its header was changed or is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder")
    if not is_finished(folder):
        stage = stage_of(folder)
        if stage is not None and stage.startswith("train"):
            raise InputError(f"{folder}: its training was interrupted; give the command that trains it again")
        raise InputError(f"{folder}: not a checkpoint ({f'made by {stage}' if stage else HEADER_FILE + ' is missing'})")
    file = folder / HEADER_FILE
    if not file.is_file() or file.stat().st_size > LARGEST_HEADER_BYTES:
        raise StorageError(f"{file}: not a header of a checkpoint (larger than any, or no file); {REMEDY}")
    return build(CheckpointHeader, read_sealed(file), file)


def load_checkpoint(folder: Path, kind: Kind) -> tuple[CheckpointHeader, dict[str, Tensor]]:
    """Load the weights of a checkpoint.

    Raises InputError, MismatchError or StorageError where there is no finished checkpoint, it is of another kind, or
    its weights are damaged or not finite.
    """
    header = read_header(folder)
    if header.kind != kind:
        raise MismatchError(f"{folder}: is a checkpoint of kind {header.kind!r}, expected {kind!r}")
    weights = folder / WEIGHTS_FILE
    if not weights.is_file() or sha256_of(weights) != header.sha256:
        raise StorageError(f"{weights}: missing or damaged (its hash differs from the header's); {REMEDY}")
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise StorageError(f"{weights}: damaged ({_short(error)}); {REMEDY}") from error
    require_finite(state, weights)
    return header, state


def require_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise StorageError where weights are not numbers, as those of a training that diverged."""
    for name, stored in state.items():
        tensor = stored.float() if stored.dtype.itemsize == 1 else stored
        # A sum is quicker than a look at every value; one that is too large is no proof yet.
        if not tensor.sum().isfinite() and not (finite := tensor.isfinite()).all():
            count = f"{tensor.numel() - int(finite.sum()):,} of {tensor.numel():,}"
            raise StorageError(
                f"{source}: {count} values of {name} are NaN or infinite; train it again, or get it anew"
            )


def rebuilt(
    make: Callable[[], ModuleT], state: Mapping[str, Tensor], folder: Path, *, spare: tuple[str, ...] = ()
) -> ModuleT:
    """Make the network of a checkpoint with its weights, without the parts whose names ``spare`` has.

    It is made without memory at first, so that no header can ask for more than the file of weights holds.

    Raises MismatchError where the weights are not those of the network that the header describes, or it describes none.
    """
    try:
        with torch.device("meta"):
            model = make()
    except CounterstainError:
        raise
    except Exception as error:  # whatever a library raises at settings that make no network
        raise MismatchError(
            f"{folder / HEADER_FILE}: its settings make no network ({_short(error)}); {REMEDY}"
        ) from error
    parts = tuple(f"{name}." for name in spare)
    own, given = ({n: t for n, t in of.items() if not n.startswith(parts)} for of in (model.state_dict(), state))
    for name in sorted(own.keys() | given.keys()):
        found, wanted = (_described(of[name]) if name in of else "missing" for of in (given, own))
        if found != wanted:
            raise MismatchError(
                f"{folder}: its header and its weights disagree: {name} is {found} in {WEIGHTS_FILE}, {wanted} by "
                f"{HEADER_FILE}; {REMEDY}"
            )
    for name in spare:
        setattr(model, name, None)
    # Copies, in memory that is aligned as that of a new network is: kernels could round differently.
    weights = {name: tensor.to(own[name].dtype, copy=True) for name, tensor in given.items()}
    model.load_state_dict(weights, assign=True)
    if any(
        isinstance(t, Tensor) and t.is_meta for m in model.modules() for t in (*m.buffers(False), *vars(m).values())
    ):
        model = make()  # it holds what no file does, and what is only known when it is made
        model.load_state_dict(weights, strict=False)
    return model


def _described(tensor: Tensor) -> str:
    return str(tuple(tensor.shape)) + ("" if tensor.is_floating_point() else f" {tensor.dtype}")


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def require_taxonomy(folder: Path, header: CheckpointHeader, taxonomy: Taxonomy) -> None:
    """Raise MismatchError unless a checkpoint was trained on the same subtypes."""
    if header.taxonomy.names != taxonomy.names:
        raise MismatchError(
            f"{folder}: was trained on the subtypes {', '.join(header.taxonomy.names)}; "
            f"this cohort has {', '.join(taxonomy.names)}; import the cohort with --taxonomy-of and this checkpoint's "
            "folder (subtypes may be absent), or train anew on its own subtypes"
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
    """Delete the state of a training whose result is saved, and its pool of latents."""
    sweep(folder / PROGRESS_FILE)
    (folder / PROGRESS_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / POOL_FOLDER, ignore_errors=True)


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save tensors for :func:`mapped_tensors`, with the order of their axes in memory."""
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    with replacing(file) as partial:
        partial.write_bytes(buffer.getbuffer())


def mapped_tensors(file: Path) -> dict[str, Tensor]:
    """Return tensors that are read off the disk when they are looked at; do not write into them."""
    try:
        found: dict[str, Tensor] = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise StorageError(f"{file}: cannot be read ({why}); delete it and run the command again") from error
    return found


def read_state(path: Path, setting: str = "") -> dict[str, Tensor]:
    """Read weights of other projects: safetensors, or PyTorch's own format, of which no code is run.

    The file holds a state dict, perhaps under ``state_dict``; messages name the ``setting`` that it was given by.

    Raises InputError where the file is missing, damaged, holds more than tensors, or no state dict.
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
    except Exception as error:  # an unpickler that is fed with anything raises anything
        raise InputError(f"{where}: not a file of weights, or damaged ({_short(error)})") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    wanted = f"{where}: expected a state dict (names -> tensors), found"
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{wanted} {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{wanted} {type(value).__name__} at {name!r}")
        if value.is_meta or value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
            raise InputError(f"{where}: {name} {tuple(value.shape)} is not stored in full; save it as a plain tensor")
    return dict(content)


def patients_behind(source: Path, claimed: str | None, what: str, setting: str) -> tuple[str, ...]:
    """Return the patients whose tissue is in weights of others: those listed in ``patients_seen.txt`` beside them, and
    what the ``setting`` claims, ``none`` or a file of patients.

    Raises InputError where nobody says; ``what`` names the weights.
    """
    beside = (source if source.is_dir() else source.parent) / PATIENTS_SEEN_FILE
    lists = [beside] if beside.exists() else []
    if claimed not in {None, NOBODY}:
        lists.append(Path(str(claimed)))
    if not lists and claimed is None:
        raise InputError(
            f"{what}: whose tissue was this network trained on? Set {setting} to {NOBODY} if it saw none of your "
            "patients (ImageNet's weights), or to a text file with one patient per line"
        )
    return tuple(patient for file in lists for patient in read_patients_seen(file))
