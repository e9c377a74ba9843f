"""The run of a training: claim its folder, spread it over devices, save the network with every patient it saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from counterstain.checkpoints import CheckpointHeader, Kind, forget_progress, is_finished, save_checkpoint
from counterstain.config import Config
from counterstain.data.cohort import Cohort
from counterstain.data.composition import unseen_in_training
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.data.split import tissue_of
from counterstain.devices import rank, run_in_processes, starts_processes
from counterstain.seeding import derive
from counterstain.storage import claim, released_on_error
from counterstain.training_config import TrainingConfig, identity_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One training of a network on the training part of a cohort: where it writes, what identifies it, what it saves.

    Processes that share a training each have one; only the first of them writes.
    """

    cohort: Cohort
    kind: Kind
    config: Config
    out: Path
    size_px: int
    seed: int
    names: Mapping[str, Any] = field(default_factory=dict)
    """What tells it from other trainings, beside cohort, settings, size and seed."""
    seen: Iterable[str] = ()  # patients behind what it starts from or trains on, beside the cohort's own
    origin: CheckpointHeader | None = None  # of the network that it goes on from, which may know more subtypes
    notes: Mapping[str, Any] = field(default_factory=dict)  # what is saved about it in any case

    def finished(self) -> bool:
        """Claim the folder and say whether it holds the result already.

        Raises MismatchError where the folder belongs to another run.
        """
        settings = {
            "cohort": self.cohort.fingerprint,
            "config": identity_of(self.config),
            "size_px": self.size_px,
            "seed": self.seed,
            **self.names,
        }
        if rank() == 0:
            claim(self.out, f"train {self.kind}", settings)
        return is_finished(self.out)

    def spread(self, train: Callable[..., Path], training: TrainingConfig, **options: Any) -> bool:
        """Let new processes train, one for each device; say whether it needed them."""
        with self.released_on_error():
            needed = starts_processes(training)
        if needed:
            given = {"size_px": self.size_px, "seed": self.seed, **options}
            run_in_processes(training.devices, train, self.cohort, self.config, self.out, **given)
        return needed

    def sampler(self, sampling: SamplingConfig) -> PatchSampler:
        """Return the stream of real patches to train on."""
        with self.released_on_error():
            return PatchSampler(self.cohort, "train", self.size_px, sampling, derive(self.seed, "data"))

    def initialised(self, make: Callable[[], ModuleT]) -> ModuleT:
        """Make the network; its initial weights follow from the seed alone."""
        with self.released_on_error(), torch.random.fork_rng():
            torch.manual_seed(derive(self.seed, "initialisation"))
            return make()

    def released_on_error(self) -> AbstractContextManager[None]:
        """Free the folder where settings turn out not to fit after it was claimed."""
        return released_on_error(self.out) if rank() == 0 else nullcontext()

    def save(self, state: Mapping[str, Tensor], notes: Mapping[str, Any]) -> Path:
        """Save the weights and forget the state of the training; return the folder."""
        if rank() > 0:
            return self.out
        known = () if self.origin is None else {*self.cohort.taxonomy.names} - {*self.origin.subtypes_unseen}
        header = CheckpointHeader(
            kind=self.kind,
            taxonomy=self.cohort.taxonomy,
            size_px=self.size_px,
            mpp=self.cohort.mpp,
            config=identity_of(self.config),
            seed=self.seed,
            patients_seen=tuple(sorted({*self.cohort.patients("train"), *self.seen})),
            tissue_seen=tissue_of(self.cohort) if self.kind == "segmenter" else (),
            subtypes_unseen=tuple(name for name in unseen_in_training(self.cohort) if name not in known),
            cohort=self.cohort.fingerprint,
            notes={"cohort_name": self.cohort.folder.name, **notes, **self.notes},
        )
        save_checkpoint(self.out, dict(state), header)
        forget_progress(self.out)
        return self.out
