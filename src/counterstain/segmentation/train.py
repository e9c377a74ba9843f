"""The weights that an encoder starts from: ImageNet's, those of a local file, or none."""

from __future__ import annotations

import functools
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from counterstain.checkpoints import CheckpointHeader, is_finished, save_checkpoint
from counterstain.data.augmentation import PastedPatches
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet
from counterstain.data.sampling import PatchSampler, PatchSource, patch_batches
from counterstain.data.split import check_no_leak
from counterstain.errors import InputError, MismatchError
from counterstain.processes import rank, run_in_processes
from counterstain.seeding import derive
from counterstain.segmentation.mixing import (
    MixedPatches,
    ShareSchedule,
    synthetic_count,
    synthetic_share,
    training_steps,
)
from counterstain.segmentation.model import MixupBatches, Segmenter, count_labels, label_weights
from counterstain.segmentation.segmenter_config import SegmenterConfig
from counterstain.storage import claim, fingerprint, sha256_of
from counterstain.training import Batches, fit, starts_processes
from counterstain.training_state import forget_progress

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


# Train a segmenter on real and synthetic patches and save it with every patient it saw.


def train_segmenter(
    cohort: Cohort,
    config: SegmenterConfig,
    out: Path,
    *,
    size_px: int,
    seed: int,
    synthetic: PatchSet | None = None,
    amount: float = 0.0,
    share: float | None = None,
    label: str = "segmenter",
) -> Path:
    """Train a segmenter on the training part of a cohort; a finished checkpoint is left as it is.

    Parameters
    ----------
    cohort : Cohort
    config : SegmenterConfig
    out : Path
        Checkpoint folder.
    size_px : int
        Edge of the patches, a multiple of 32.
    seed : int
        Of the initial weights and of the data's order. Arms with equal seeds share both.
    synthetic : PatchSet, optional
        Its first ``amount`` x ``config.mixing.epoch_patches`` patches are mixed in.
    amount : float
        1.0 is +100 %.
    share : float, optional
        Share of synthetic patches in the stream, instead of amount / (1 + amount); 1.0 trains on them alone.
    label : str
        Of the progress bar.

    Returns
    -------
    Path
        The checkpoint folder, ``out``.

    Raises
    ------
    LeakageError
        The synthetic set comes from, or its generator saw, a validation or test patient of this cohort.
    MismatchError
        The synthetic set is of another taxonomy, size or mpp; or ``out`` belongs to another run.
    ConfigError
        Patches' edge is no multiple of 32, or windows overlap as far as they reach.
    InputError
        The set has fewer patches than asked for, or an amount without a set or a set without an amount.
    """
    count = synthetic_count(amount, config.mixing)
    share = synthetic_share(amount, share)
    config.check_size(size_px)
    seen = _checked(synthetic, count, share, cohort, size_px)
    sampler = PatchSampler(cohort, "train", size_px, config.sampling, derive(seed, "data"))
    if rank() == 0:
        settings = _settings(cohort, config, synthetic, size_px, seed)
        claim(out, "train segmenter", settings | {"amount": amount, "share": share})
    if is_finished(out):
        return out
    if starts_processes(config.training):
        options: dict[str, Any] = {"size_px": size_px, "seed": seed, "synthetic": synthetic, "amount": amount}
        devices = config.training.devices
        run_in_processes(devices, train_segmenter, cohort, config, out, **options, share=share, label=label)
        return out

    steps = training_steps(config.training.steps, amount, config.mixing)
    training = config.training.model_copy(update={"steps": steps})
    schedule = ShareSchedule(share=share, steps=steps, batch_size=training.batch_size, config=config.mixing)
    real = _augmented(sampler, cohort, config, size_px, seed)
    mixing_seed = derive(seed, "mixing")
    patches = MixedPatches(real, synthetic or (), config.sampling, count=count, share=schedule, seed=mixing_seed)
    weights = _label_weights(patches, cohort, config, steps * training.batch_size)
    segmenter, start = _initialised(config, steps, seed, weights)
    batches = _batches(patches, config, training.batch_size, seed)
    fit(segmenter, batches, out, training, ema_decay=config.ema_decay, label=label)
    if rank() > 0:
        return out

    notes = {"encoder_starts_from": start, "missing_subtypes": list(sampler.missing_subtypes), "steps": steps}
    notes |= _of_set(synthetic, count, schedule.mean()) | {"label_weights": _by_subtype(weights, cohort)}
    header = _header(cohort, config, size_px=size_px, seed=seed, seen=seen, notes=notes)
    save_checkpoint(out, segmenter.state_dict(), header)
    forget_progress(out)
    return out


def _header(
    cohort: Cohort, config: SegmenterConfig, *, size_px: int, seed: int, seen: set[str], notes: dict[str, Any]
) -> CheckpointHeader:
    return CheckpointHeader(
        kind="segmenter",
        taxonomy=cohort.taxonomy,
        size_px=size_px,
        mpp=cohort.mpp,
        config=config.model_dump(mode="json"),
        seed=seed,
        patients_seen=tuple(sorted({*cohort.patients("train"), *seen})),
        cohort=cohort.fingerprint,
        notes=notes,
    )


def _settings(
    cohort: Cohort, config: SegmenterConfig, synthetic: PatchSet | None, size_px: int, seed: int
) -> dict[str, Any]:
    """Return what determines a training."""
    identity = None if synthetic is None else _identity(synthetic)
    settings = {"cohort": cohort.fingerprint, "config": config.model_dump(mode="json"), "synthetic": identity}
    return settings | {"size_px": size_px, "seed": seed}


def _of_set(synthetic: PatchSet | None, count: int, share: float) -> dict[str, Any]:
    header = None if synthetic is None else synthetic.header.model_dump(mode="json")
    return {"synthetic": header, "synthetic_patches": count, "synthetic_share": share}


def _augmented(sampler: PatchSampler, cohort: Cohort, config: SegmenterConfig, size_px: int, seed: int) -> PatchSource:
    if config.copy_paste is None:
        return sampler
    return PastedPatches(
        sampler,
        cohort,
        size_px=size_px,
        config=config.copy_paste,
        sampling=config.sampling,
        seed=derive(seed, "copy-paste"),
    )


def _batches(patches: PatchSource, config: SegmenterConfig, batch_size: int, seed: int) -> Batches:
    batches = patch_batches(patches, batch_size)
    return batches if config.mixup_alpha is None else MixupBatches(batches, config.mixup_alpha, derive(seed, "mixup"))


def _by_subtype(weights: Tensor | None, cohort: Cohort) -> dict[str, float] | None:
    return None if weights is None else {s.name: float(weights[s.id]) for s in cohort.taxonomy.subtypes}


def _label_weights(patches: PatchSource, cohort: Cohort, config: SegmenterConfig, total: int) -> Tensor | None:
    """Return the weight of a pixel of each label, (256,) float; None where all count the same."""
    if not config.subtype_weighting:
        return None
    weights = torch.ones(256)
    pixels = count_labels(patches, total, cohort.taxonomy.num_labels)
    weights[: len(pixels)] = torch.from_numpy(label_weights(pixels, config.subtype_weighting)).float()
    return weights


def _initialised(config: SegmenterConfig, steps: int, seed: int, weights: Tensor | None) -> tuple[Segmenter, str]:
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "initialisation"))
        segmenter = Segmenter(config, steps=steps, seed=derive(seed, "training"), label_weights=weights)
    encoder: Any = segmenter.network.encoder
    start = load_encoder_weights(encoder, config.encoder, config.encoder_weights, required=config.require_weights)
    return segmenter, start


def _checked(synthetic: PatchSet | None, count: int, share: float, cohort: Cohort, size_px: int) -> set[str]:
    """Check that a set may and can be used; return the patients behind it."""
    if synthetic is None:
        if count or share:
            raise InputError(
                f"{count} synthetic patches at a share of {share:g} are asked for without a synthetic set; "
                "give one, or amount 0"
            )
        return set()
    folder, header = synthetic.folder, synthetic.header
    if not count:
        raise InputError(f"{folder}: a synthetic set is given with amount 0; give an amount, 1.0 for +100 %")
    if header.taxonomy.names != cohort.taxonomy.names:
        raise MismatchError(
            f"{folder}: has the subtypes {', '.join(header.taxonomy.names)}; this cohort has "
            f"{', '.join(cohort.taxonomy.names)}; make the set anew for this taxonomy"
        )
    if header.size_px != size_px:
        raise MismatchError(
            f"{folder}: has patches of {header.size_px} px, the segmenter is to train on {size_px} px; "
            "make the set anew at that size"
        )
    if not cohort.is_at(header.mpp):
        raise MismatchError(f"{folder}: is at {header.mpp} um/px, this cohort at {cohort.mpp}; make the set anew")
    if len(synthetic) < count:
        raise InputError(
            f"{folder}: has {len(synthetic)} patches, {count} are asked for; synthesize more, or lower the amount "
            "or segmenter.mixing.epoch_patches"
        )
    seen = {*header.patients_seen, *synthetic.patches["patient"]}
    check_no_leak(seen, cohort, f"synthetic set {folder}")
    return seen


def _identity(synthetic: PatchSet) -> str:
    """Return what names a set's patches; a set that was made longer still begins with the same ones."""
    return fingerprint(synthetic.header.model_dump(mode="json", exclude={"count"}))
