"""Train a generator on the training part of a cohort, anew or from given weights, and save it with what it saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from counterstain.checkpoints import (
    CheckpointHeader,
    Kind,
    is_finished,
    load_checkpoint,
    require_taxonomy,
    save_checkpoint,
)
from counterstain.config import Config, build_stored
from counterstain.data.cohort import Cohort
from counterstain.data.sampling import PatchBatches, PatchSampler, SamplingConfig
from counterstain.data.split import check_no_leak
from counterstain.devices import rank, run_in_processes, starts_processes
from counterstain.errors import ConfigError, MismatchError
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.autoencoder_config import AutoencoderConfig
from counterstain.generators.diffusion import Diffusion, diffusion_batches, measure_latents
from counterstain.generators.diffusion_config import DiffusionConfig, DistillationConfig
from counterstain.generators.distillation import Distillation, student_config
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.spade import Spade
from counterstain.generators.spade_config import SpadeConfig
from counterstain.generators.training_monitors import warnings_of, watch_autoencoder, watch_spade
from counterstain.seeding import derive
from counterstain.storage import claim, released_on_error
from counterstain.training import fit, forget_progress
from counterstain.training_config import TrainingConfig

MAY_DIFFER = ("encoder.", "discriminator.", "codebook.")  # parts that one training has and another has not


@dataclass(frozen=True)
class InitialWeights:
    """The weights of a checkpoint that fits a cohort."""

    folder: Path
    header: CheckpointHeader
    state: dict[str, Tensor]

    @classmethod
    def open(cls, folder: Path, kind: Kind, cohort: Cohort) -> Self:
        """Open a checkpoint to start from.

        Raises
        ------
        LeakageError
            It saw a validation or test patient of the cohort.
        MismatchError
            It is of another kind, taxonomy or mpp.
        """
        header, state = load_checkpoint(folder, kind)
        require_fit(folder, header, cohort)
        return cls(folder, header, state)

    def load_into(self, model: nn.Module) -> None:
        """Set the weights of a new model; parts that the checkpoint lacks stay as they are.

        Raises
        ------
        MismatchError
            The model has other parts, or parts of other sizes.
        """
        given = {name: value for name, value in self.state.items() if not name.startswith("first_stage.")}
        own = model.state_dict()
        differing = [name for name in {*own, *given} if (name in own) != (name in given)]
        unexpected = [name for name in differing if not name.startswith(MAY_DIFFER)]
        resized = [name for name in own if name in given and own[name].shape != given[name].shape]
        if unexpected or resized:
            name = min(unexpected + resized)
            sizes = [tuple(part[name].shape) if name in part else "none" for part in (given, own)]
            raise MismatchError(
                f"{self.folder}: {name} is {sizes[0]}, the recipe asks for {sizes[1]}; give the settings that it was "
                f"trained with (in its model.json) by --config or --set"
            )
        model.load_state_dict({name: value for name, value in given.items() if name in own}, strict=False)

    def require_first_stage(self, first_stage: nn.Module, folder: Path) -> None:
        """Raise MismatchError unless the latents are those that these weights were trained on."""
        for name, value in first_stage.state_dict().items():
            mine = self.state.get(f"first_stage.{name}")
            if mine is None or mine.shape != value.shape or not torch.equal(mine, value.cpu()):
                raise MismatchError(
                    f"{self.folder}: was trained on the latents of another first stage than {folder}; give that one "
                    "as the autoencoder"
                )


def require_fit(folder: Path, header: CheckpointHeader, cohort: Cohort) -> None:
    """Raise an error unless a trained network may be used to train on a cohort."""
    require_taxonomy(folder, header, cohort.taxonomy)
    if not cohort.is_at(header.mpp):
        raise MismatchError(
            f"{folder}: was trained at {header.mpp} um/px, this cohort is at {cohort.mpp}; train it anew"
        )
    check_no_leak(header.patients_seen, cohort, f"{header.kind} {folder}")


ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
MOST_PATCHES_OF_COMPONENTS = 4096  # some million blocks of pixels


def train_spade(
    cohort: Cohort, config: SpadeConfig, out: Path, *, size_px: int, seed: int, init: Path | None = None
) -> Path:
    """Train SPADE with its VAE; a finished checkpoint is left as it is.

    Parameters
    ----------
    init : Path, optional
        Checkpoint whose weights the training starts from.

    Returns
    -------
    Path
        The checkpoint folder, ``out``.

    Raises
    ------
    LeakageError
        The weights to start from saw a validation or test patient of this cohort.
    MismatchError
        ``out`` belongs to another run, or ``init`` does not fit.
    """
    config = config.at(cohort.mpp)
    run = _Run.of(cohort, "spade", config, out, init, size_px=size_px, seed=seed)
    if run.finished() or run.spread(train_spade, config.training, init=init):
        return out
    model = run.initialised(lambda: Spade(config, cohort.taxonomy.num_labels, size_px, seed))
    batches = PatchBatches(run.sampler(config.sampling), config.training.batch_size)
    monitor = watch_spade(model, cohort, size_px, seed)
    figures = fit(model, batches, out, config.training, ema_decay=config.ema_decay, monitor=monitor, label="SPADE")
    run.save(model, {"monitors": figures, "warnings": warnings_of(figures)})
    return out


def train_autoencoder(
    cohort: Cohort, config: AutoencoderConfig, out: Path, *, size_px: int, seed: int, init: Path | None = None
) -> Path:
    """Train the first stage of latent diffusion; a finished checkpoint is left as it is."""
    run = _Run.of(cohort, "autoencoder", config, out, init, size_px=size_px, seed=seed)
    linear = config.kind == "linear"  # has no training that devices could share
    if run.finished() or (not linear and run.spread(train_autoencoder, config.training, init=init)):
        return out
    model = run.initialised(lambda: Autoencoder(config, size_px, seed))
    if run.initial is not None and "codebook.sums" not in run.initial.state:
        model.begin_from_given_codes()
    batches = PatchBatches(run.sampler(config.sampling), config.training.batch_size)
    monitor = watch_autoencoder(model, cohort, size_px, seed)
    if linear:
        enough = -(-MOST_PATCHES_OF_COMPONENTS // config.training.batch_size)
        model.fit_components(batches(step)["images"] for step in range(min(config.training.steps, enough)))
        figures = dict(monitor.measure()) if monitor else {}
    else:
        figures = fit(model, batches, out, config.training, monitor=monitor, label="autoencoder")
    run.save(model, {"validation": figures})
    return out


def load_autoencoder(folder: Path) -> tuple[Autoencoder, CheckpointHeader]:
    """Load a first stage, without its discriminator."""
    header, state = load_checkpoint(folder, "autoencoder")
    config = build_stored(AutoencoderConfig, header.config, folder)
    model = Autoencoder(config.for_use(), header.size_px)
    model.load_state_dict({name: value for name, value in state.items() if name.startswith("network.")})
    return model, header


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

    Raises
    ------
    ConfigError
        Patches cannot be halved as often as the networks must.
    LeakageError
        The autoencoder, or the weights to start from, saw a validation or test patient of this cohort.
    MismatchError
        The autoencoder was trained on another taxonomy or at another mpp; ``init`` does not fit.
    """
    first_stage, first_header = load_autoencoder(autoencoder)
    require_fit(autoencoder, first_header, cohort)
    config.check_size(size_px, first_stage.config.factor)
    config = config.at(cohort.mpp)
    names = {"first_stage": first_header.sha256}
    run = _Run.of(cohort, "diffusion", config, out, init, size_px=size_px, seed=seed, names=names)
    if run.initial is not None:
        run.initial.require_first_stage(first_stage, autoencoder)
    if run.finished() or run.spread(train_diffusion, config.training, autoencoder=autoencoder, init=init):
        return out
    model = run.initialised(lambda: Diffusion(config, first_stage, cohort.taxonomy.num_labels, seed))
    sampler = run.sampler(config.sampling)
    if config.normalise_latents != "none" and run.initial is None:
        measure_latents(model, sampler)
    batches = diffusion_batches(model, sampler, size_px, seed)
    fit(model, batches, out, config.training, ema_decay=config.ema_decay, label="diffusion")
    notes = {"first_stage": first_header.config, "first_stage_sha256": first_header.sha256}
    run.save(model, notes, first_stage=first_stage, seen=first_header.patients_seen)
    return out


def train_distilled(cohort: Cohort, config: DistillationConfig, out: Path, *, teacher: Path, seed: int) -> Path:
    """Bring a trained denoiser to few steps; the checkpoint is one of diffusion, with the teacher's first stage.

    Parameters
    ----------
    teacher : Path
        Checkpoint of :func:`train_diffusion`.

    Raises
    ------
    LeakageError
        The teacher saw a validation or test patient of this cohort.
    MismatchError
        The teacher was trained on another taxonomy or at another mpp, or is distilled itself.
    ConfigError
        Guidance is asked of a teacher that never trained without a mask.
    """
    generator = DiffusionGenerator.load(teacher)
    model, header = generator.model.cpu(), generator.header
    assert header is not None
    require_fit(teacher, header, cohort)
    if model.config.sampler.name == "few_step":
        raise MismatchError(f"{teacher}: is distilled already; give the checkpoint that it was distilled from")
    if config.guidance != 1.0 and not model.config.condition_dropout:
        raise ConfigError(f"{teacher}: was trained without condition_dropout; set distillation.guidance to 1")
    student = student_config(model.config, config)
    names = {"first_stage": "", "teacher": header.sha256, "distillation": config.model_dump(mode="json")}
    run = _Run(cohort, "diffusion", student, out, header.size_px, seed, names=names)
    if run.finished():
        return out
    network = run.initialised(lambda: Diffusion(student, model.first_stage, cohort.taxonomy.num_labels, seed))
    distillation = Distillation(config, model, network, seed)
    batches = diffusion_batches(network, run.sampler(student.sampling), header.size_px, seed)
    fit(distillation, batches, out, student.training, label="distillation")
    notes = {name: value for name, value in header.notes.items() if name.startswith("first_stage")}
    notes |= {"teacher_sha256": header.sha256, "distillation": config.model_dump(mode="json")}
    run.save(network, notes, first_stage=network.first_stage, seen=header.patients_seen)
    return out


@dataclass(frozen=True)
class _Run:
    """One training: where it writes, what it is named by, what it saves."""

    cohort: Cohort
    kind: Kind
    config: Config
    out: Path
    size_px: int
    seed: int
    initial: InitialWeights | None = None
    names: Mapping[str, Any] = field(default_factory=lambda: {"first_stage": ""})
    """What tells it from other trainings beside cohort, settings, size and seed."""

    @classmethod
    def of(cls, cohort: Cohort, kind: Kind, config: Config, out: Path, init: Path | None, **rest: Any) -> Self:
        initial = None if init is None else InitialWeights.open(init, kind, cohort)
        return cls(cohort, kind, config, out, initial=initial, **rest)

    def finished(self) -> bool:
        """Claim the folder, which processes of one training share; say whether it holds the result already."""
        settings = {
            "cohort": self.cohort.fingerprint,
            "config": self.config.model_dump(mode="json"),
            "size_px": self.size_px,
            "seed": self.seed,
            **self.names,
        } | ({"init": self.initial.header.sha256} if self.initial else {})
        if rank() == 0:
            claim(self.out, f"train {self.kind}", settings)
        return is_finished(self.out)

    def spread(self, train: Callable[..., Path], training: TrainingConfig, **options: Any) -> bool:
        """Let new processes train, one for each device; say whether it needed them."""
        needed = starts_processes(training)
        if needed:
            given = {"size_px": self.size_px, "seed": self.seed, **options}
            run_in_processes(training.devices, train, self.cohort, self.config, self.out, **given)
        return needed

    def initialised(self, make: Callable[[], ModuleT]) -> ModuleT:
        with self._released_on_error():
            with torch.random.fork_rng():
                torch.manual_seed(derive(self.seed, "initialisation"))
                model = make()
            if self.initial is not None:
                self.initial.load_into(model)
            return model

    def sampler(self, sampling: SamplingConfig) -> PatchSampler:
        with self._released_on_error():
            return PatchSampler(self.cohort, "train", self.size_px, sampling, derive(self.seed, "data"))

    def _released_on_error(self) -> AbstractContextManager[None]:
        """Return what frees the folder where settings turn out not to fit after it was claimed."""
        return released_on_error(self.out) if rank() == 0 else nullcontext()

    def save(
        self, model: nn.Module, notes: dict[str, Any], *, first_stage: nn.Module | None = None, seen: Sequence[str] = ()
    ) -> None:
        """Save a model, with the first stage that it draws with, and forget the state of its training."""
        if rank() > 0:
            return
        state = dict(model.state_dict())
        if first_stage is not None:
            state |= {f"first_stage.{name}": value for name, value in first_stage.state_dict().items()}
        if self.initial is not None:
            notes, seen = (
                notes | {"init_sha256": self.initial.header.sha256},
                (*seen, *self.initial.header.patients_seen),
            )
        header = CheckpointHeader(
            kind=self.kind,
            taxonomy=self.cohort.taxonomy,
            size_px=self.size_px,
            mpp=self.cohort.mpp,
            config=self.config.model_dump(mode="json"),
            seed=self.seed,
            patients_seen=tuple(sorted({*self.cohort.patients("train"), *seen})),
            cohort=self.cohort.fingerprint,
            notes=notes,
        )
        save_checkpoint(self.out, state, header)
        forget_progress(self.out)
