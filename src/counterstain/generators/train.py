"""Train a generator on the training part of a cohort, anew or from given weights, and save it with what it saw.

Each training writes its checkpoint into the folder ``out``, which it returns, and leaves a finished one as it is. It
raises :class:`LeakageError` where the networks that it starts from saw a validation or test patient of the cohort, and
:class:`MismatchError` where they do not fit it or each other, or where ``out`` belongs to another run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from counterstain.checkpoints import (
    CheckpointHeader,
    Kind,
    load_checkpoint,
    patients_behind,
    require_finite,
    require_taxonomy,
)
from counterstain.config import Config, build
from counterstain.data.cohort import Cohort
from counterstain.data.sampling import PatchBatches
from counterstain.data.split import check_no_leak
from counterstain.devices import device_of, place
from counterstain.errors import ConfigError, MismatchError
from counterstain.generators.autoencoder import Autoencoder, rebuilt_first_stage
from counterstain.generators.diffusion import Diffusion, diffusion_batches, measure_latents
from counterstain.generators.diffusion_config import AutoencoderConfig, DiffusionConfig, DistillationConfig
from counterstain.generators.distillation import Distillation, student_config
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.published_diffusers import SHARED_FILE, hashes, located
from counterstain.generators.published_weights import first_stage_of
from counterstain.generators.spade import Spade
from counterstain.generators.spade_config import SpadeConfig
from counterstain.generators.training_monitors import warnings_of, watch_autoencoder, watch_spade
from counterstain.progress import bar
from counterstain.storage import read_sealed
from counterstain.training import Batches, fit
from counterstain.training_config import TrainingConfig
from counterstain.training_run import ModuleT, TrainingRun

MAY_DIFFER = ("encoder.", "discriminator.", "codebook.")  # parts that one training has and another has not
MOST_PATCHES_OF_COMPONENTS = 4096  # some million blocks of pixels
LATENTS_MEASURED = 256  # patches


@dataclass(frozen=True)
class _InitialWeights:
    """The weights of a checkpoint that fits a cohort, to start a training from."""

    folder: Path
    header: CheckpointHeader
    state: dict[str, Tensor]

    @classmethod
    def open(cls, folder: Path | None, kind: Kind, cohort: Cohort) -> Self | None:
        if folder is None:
            return None
        header, state = load_checkpoint(folder, kind)
        _require_fit(folder, header, cohort)
        return cls(folder, header, state)

    def load_into(self, model: nn.Module) -> None:
        """Set the weights of a new model; parts that the checkpoint lacks stay as they are."""
        given = {name: value for name, value in self.state.items() if not name.startswith("first_stage.")}
        own = model.state_dict()
        unexpected = [name for name in own.keys() ^ given.keys() if not name.startswith(MAY_DIFFER)]
        shared = {name: given[name] for name in own if name in given}
        resized = [name for name, value in shared.items() if own[name].shape != value.shape]
        if unexpected or resized:
            name = min(unexpected + resized)
            sizes = [tuple(part[name].shape) if name in part else "none" for part in (given, own)]
            raise MismatchError(
                f"{self.folder}: {name} is {sizes[0]}, the recipe asks for {sizes[1]}; give the settings that it was "
                f"trained with (in its model.json) by --config or --set"
            )
        model.load_state_dict(shared, strict=False)

    def require_first_stage(self, first_stage: nn.Module, folder: Path) -> None:
        """Raise MismatchError unless the latents are those that these weights were trained on."""
        for name, value in first_stage.state_dict().items():
            mine = self.state.get(f"first_stage.{name}")
            if mine is None or mine.shape != value.shape or not torch.equal(mine, value.cpu()):
                raise MismatchError(
                    f"{self.folder}: was trained on the latents of another first stage than {folder}; give that one "
                    "as the autoencoder"
                )


def _require_fit(folder: Path, header: CheckpointHeader, cohort: Cohort) -> None:
    """Raise an error unless a trained network may be used to train on a cohort."""
    require_taxonomy(folder, header, cohort.taxonomy)
    if not cohort.is_at(header.mpp):
        raise MismatchError(
            f"{folder}: was trained at {header.mpp} um/px, this cohort is at {cohort.mpp}; train it anew"
        )
    check_no_leak(header.patients_seen, cohort, f"{header.kind} {folder}")


def train_spade(
    cohort: Cohort, config: SpadeConfig, out: Path, *, size_px: int, seed: int, init: Path | None = None
) -> Path:
    """Train SPADE with its VAE, from the weights of the checkpoint ``init`` where it is given."""
    config = config.at(cohort.mpp)
    initial = _InitialWeights.open(init, "spade", cohort)
    run = _run(cohort, "spade", config, out, initial, size_px=size_px, seed=seed)
    if run.finished() or run.spread(train_spade, config.training, init=init):
        return out
    model = _begun(run, initial, lambda: Spade(config, cohort.taxonomy.num_labels, size_px, seed))
    batches = PatchBatches(run.sampler(config.sampling), config.training.batch_size)
    monitor = watch_spade(model, cohort, size_px, seed)
    figures = fit(model, batches, out, config.training, ema_decay=config.ema_decay, monitor=monitor, label="SPADE")
    return run.save(model.state_dict(), {"monitors": figures, "warnings": warnings_of(figures)})


def train_autoencoder(
    cohort: Cohort, config: AutoencoderConfig, out: Path, *, size_px: int, seed: int, init: Path | None = None
) -> Path:
    """Train the first stage of latent diffusion, from the weights of ``init`` where it is given.

    One that is ``pretrained`` is taken as it is, and measured on validation patches.
    """
    initial = _InitialWeights.open(init, "autoencoder", cohort)
    run = _run(cohort, "autoencoder", config, out, initial, size_px=size_px, seed=seed)
    if config.pretrained is not None:
        return out if run.finished() else _published_stage(run, config, config.pretrained)
    linear = config.kind == "linear"  # has no training that devices could share
    if run.finished() or (not linear and run.spread(train_autoencoder, config.training, init=init)):
        return out
    model = _begun(run, initial, lambda: Autoencoder(config, size_px, seed))
    if initial is not None and "codebook.sums" not in initial.state:
        model.begin_from_given_codes()
    batches = PatchBatches(run.sampler(config.sampling), config.training.batch_size, ("images",))
    monitor = watch_autoencoder(model, cohort, size_px, seed)
    if linear:
        model.fit_components(_images(batches, config.training))
        figures = dict(monitor.measure()) if monitor else {}
    else:
        figures = fit(model, batches, out, config.training, monitor=monitor, label="autoencoder")
    return run.save(model.state_dict(), {"validation": figures})


def _published_stage(run: TrainingRun, config: AutoencoderConfig, source: str) -> Path:
    with run.released_on_error():
        folder = located(Path(source))
        what, claimed = f"autoencoder.pretrained {source}", config.pretrained_patients
        if (folder / SHARED_FILE).is_file():  # an export of ours
            seen = build(CheckpointHeader, read_sealed(folder / SHARED_FILE), folder / SHARED_FILE).patients_seen
        else:
            seen = patients_behind(folder, claimed, what, "pretrained_patients")
        check_no_leak(seen, run.cohort, f"the first stage {source}")
        fitted, state, scaling = first_stage_of(folder, config.for_use(), run.size_px)
        fitted.check_size(run.size_px)
        require_finite(state, folder)
    model = rebuilt_first_stage(fitted.model_dump(mode="json"), state, folder, run.size_px)
    monitor = watch_autoencoder(place(model, device_of(config.training)), run.cohort, run.size_px, run.seed)
    figures = dict(monitor.measure()) if monitor else {}
    taken = replace(run, config=fitted, seen=[*run.seen, *seen])
    return taken.save(state, {"validation": figures, "pretrained": hashes(folder)} | scaling)


def _images(batches: Batches, training: TrainingConfig) -> Iterator[Tensor]:
    steps = min(training.steps, -(-MOST_PATCHES_OF_COMPONENTS // training.batch_size))
    with bar("autoencoder", steps) as advance:
        for step in range(steps):
            yield batches(step)["images"]
            advance(1)


def load_autoencoder(folder: Path) -> tuple[Autoencoder, CheckpointHeader]:
    """Load a first stage, without its discriminator."""
    header, state = load_checkpoint(folder, "autoencoder")
    return rebuilt_first_stage(header.config, state, folder, header.size_px), header


def train_diffusion(
    cohort: Cohort,
    config: DiffusionConfig,
    out: Path,
    *,
    autoencoder: Path,
    size_px: int,
    seed: int,
    init: Path | None = None,
) -> Path:
    """Train a denoiser on the latents of a trained autoencoder; the checkpoint holds both.

    Raises ConfigError where patches cannot be halved as often as the networks must.
    """
    first_stage, first_header = load_autoencoder(autoencoder)
    _require_fit(autoencoder, first_header, cohort)
    config.check_size(size_px, first_stage.config.factor)
    config = config.at(cohort.mpp)
    initial = _InitialWeights.open(init, "diffusion", cohort)
    run = _run(cohort, "diffusion", config, out, initial, size_px=size_px, seed=seed, first_stage=first_header)
    if initial is not None:
        initial.require_first_stage(first_stage, autoencoder)
    if run.finished() or run.spread(train_diffusion, config.training, autoencoder=autoencoder, init=init):
        return out
    model = _begun(run, initial, lambda: Diffusion(config, first_stage, cohort.taxonomy.num_labels, seed))
    place(model, device_of(config.training))
    sampler = run.sampler(config.sampling)
    if config.normalise_latents == "none":
        for name in ("latent_mean", "latent_sd"):  # as published first stages state them
            if name in first_header.notes:
                getattr(model, name).copy_(torch.tensor(first_header.notes[name]))
    elif initial is None:
        seen = config.training.steps * config.training.batch_size  # a training of few patches is not held up by more
        measure_latents(model, sampler, min(LATENTS_MEASURED, seen))
    batches = diffusion_batches(model, sampler, size_px, seed, out)
    fit(model, batches, out, config.training, ema_decay=config.ema_decay, label="diffusion")
    notes = {"first_stage": first_header.config, "first_stage_sha256": first_header.sha256}
    return run.save(_with_first_stage(model, first_stage), notes)


def train_distilled(cohort: Cohort, config: DistillationConfig, out: Path, *, teacher: Path, seed: int) -> Path:
    """Bring a trained denoiser to few steps; the checkpoint is one of diffusion, with the teacher's first stage.

    Raises ConfigError where guidance is asked of a teacher that never trained without a mask, MismatchError where the
    teacher is distilled itself.
    """
    generator = DiffusionGenerator.load(teacher)
    model, header = generator.model.cpu(), generator.header
    assert header is not None
    _require_fit(teacher, header, cohort)
    if model.config.sampler.name == "few_step":
        raise MismatchError(f"{teacher}: is distilled already; give the checkpoint that it was distilled from")
    if config.guidance != 1.0 and not model.config.condition_dropout:
        raise ConfigError(f"{teacher}: was trained without condition_dropout; set distillation.guidance to 1")
    student = student_config(model.config, config)
    how = config.model_dump(mode="json")
    run = TrainingRun(
        cohort=cohort,
        kind="diffusion",
        config=student,
        out=out,
        size_px=header.size_px,
        seed=seed,
        names={"first_stage": "", "teacher": header.sha256, "distillation": how},
        seen=header.patients_seen,
        origin=header,
        notes={"teacher_sha256": header.sha256, "distillation": how},
    )
    if run.finished():
        return out
    network = run.initialised(lambda: Diffusion(student, model.first_stage, cohort.taxonomy.num_labels, seed))
    distillation = place(Distillation(config, model, network, seed), device_of(student.training))
    batches = diffusion_batches(network, run.sampler(student.sampling), header.size_px, seed, out)
    fit(distillation, batches, out, student.training, label="distillation")
    notes = {name: value for name, value in header.notes.items() if name.startswith("first_stage")}
    return run.save(_with_first_stage(network, network.first_stage), notes)


def _run(
    cohort: Cohort,
    kind: Kind,
    config: Config,
    out: Path,
    initial: _InitialWeights | None,
    *,
    size_px: int,
    seed: int,
    first_stage: CheckpointHeader | None = None,
) -> TrainingRun:
    """Return the run of a training, which its initial weights and its first stage are part of."""
    first = {} if first_stage is None else {"first_stage": first_stage}
    init = {} if initial is None else {"init": initial.header}
    return TrainingRun(
        cohort=cohort,
        kind=kind,
        config=config,
        out=out,
        size_px=size_px,
        seed=seed,
        names={"first_stage": ""} | {name: header.sha256 for name, header in (first | init).items()},
        seen=[patient for header in (first | init).values() for patient in header.patients_seen],
        origin=init.get("init"),
        notes={f"{name}_sha256": header.sha256 for name, header in init.items()},
    )


def _begun(run: TrainingRun, initial: _InitialWeights | None, make: Callable[[], ModuleT]) -> ModuleT:
    """Return a new model, with the weights that it starts from."""
    model = run.initialised(make)
    if initial is not None:
        with run.released_on_error():
            initial.load_into(model)
    return model


def _with_first_stage(model: nn.Module, first_stage: nn.Module) -> dict[str, Tensor]:
    return model.state_dict() | {f"first_stage.{name}": value for name, value in first_stage.state_dict().items()}
