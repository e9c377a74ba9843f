"""Train a generator on the training part of a cohort and save it with what it saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from counterstain.checkpoints import (
    CheckpointHeader,
    Kind,
    is_finished,
    load_checkpoint,
    require_taxonomy,
    save_checkpoint,
)
from counterstain.config import Config, build
from counterstain.data.batches import patch_batches, stack
from counterstain.data.cohort import Cohort
from counterstain.data.leakage import check_no_leak
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.errors import MismatchError
from counterstain.generators.autoencoder import Autoencoder, AutoencoderConfig
from counterstain.generators.diffusion import Diffusion, DiffusionConfig
from counterstain.generators.spade import Spade, SpadeConfig
from counterstain.progress import bar
from counterstain.seeding import derive, torch_generator
from counterstain.storage import claim
from counterstain.training import Batches, fit, forget_progress

ENCODE_BATCH = 64
ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


def train_spade(cohort: Cohort, config: SpadeConfig, out: Path, *, size_px: int, seed: int) -> Path:
    """Train SPADE with its VAE; a finished checkpoint is left as it is.

    Returns
    -------
    Path
        The checkpoint folder, ``out``.

    Raises
    ------
    MismatchError
        ``out`` belongs to another run.
    """
    run = _Run(cohort, "spade", config, out, size_px, seed)
    if not run.finished():
        model = run.initialised(lambda: Spade(config, cohort.taxonomy.num_labels, size_px, seed))
        batches = patch_batches(run.sampler(config.sampling), config.training.batch_size)
        fit(model, batches, out, config.training, ema_decay=config.ema_decay, label="SPADE")
        run.save(dict(model.state_dict()))
    return out


def train_autoencoder(cohort: Cohort, config: AutoencoderConfig, out: Path, *, size_px: int, seed: int) -> Path:
    """Train the first stage of latent diffusion; a finished checkpoint is left as it is."""
    run = _Run(cohort, "autoencoder", config, out, size_px, seed)
    if not run.finished():
        model = run.initialised(lambda: Autoencoder(config, size_px, seed))
        batches = patch_batches(run.sampler(config.sampling), config.training.batch_size)
        if config.kind == "linear":
            model.fit_components(batches(step)["images"] for step in range(config.training.steps))
        else:
            fit(model, batches, out, config.training, label="autoencoder")
        run.save(dict(model.state_dict()))
    return out


def load_autoencoder(folder: Path) -> tuple[Autoencoder, CheckpointHeader]:
    """Load a first stage, without its discriminator."""
    header, state = load_checkpoint(folder, "autoencoder")
    config = build(AutoencoderConfig, header.config, folder)
    model = Autoencoder(config.model_copy(update={"lpips_weight": 0.0, "adversarial_weight": 0.0}), header.size_px)
    model.load_state_dict({name: value for name, value in state.items() if name.startswith("network.")})
    return model, header


def train_diffusion(
    cohort: Cohort, config: DiffusionConfig, out: Path, *, autoencoder: Path, size_px: int, seed: int
) -> Path:
    """Train a denoiser on the latents of a trained autoencoder; the checkpoint holds both.

    Raises
    ------
    LeakageError
        The autoencoder saw a validation or test patient of this cohort.
    MismatchError
        The autoencoder was trained on another taxonomy or at another mpp.
    """
    first_stage, first_header = load_autoencoder(autoencoder)
    _require_fit(autoencoder, first_header, cohort)
    run = _Run(cohort, "diffusion", config, out, size_px, seed, first_stage=first_header.sha256)
    if run.finished():
        return out
    model = run.initialised(lambda: Diffusion(config, first_stage, cohort.taxonomy.num_labels, seed))
    sampler = run.sampler(config.sampling)
    if config.normalise_latents != "none":
        _measure_latents(model, sampler)
    batches = patch_batches(sampler, config.training.batch_size)
    if config.latent_pool is not None:
        batches = _pooled(model, sampler, config.latent_pool, config.training.batch_size)
    fit(model, batches, out, config.training, ema_decay=config.ema_decay, label="diffusion")
    state = model.state_dict() | {f"first_stage.{name}": value for name, value in first_stage.state_dict().items()}
    notes = {"first_stage": first_header.config, "first_stage_sha256": first_header.sha256}
    run.save(state, notes=notes, seen=first_header.patients_seen)
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
    first_stage: str = ""

    def finished(self) -> bool:
        """Claim the folder; say whether it holds the result already."""
        settings = {
            "cohort": self.cohort.fingerprint,
            "config": self.config.model_dump(mode="json"),
            "size_px": self.size_px,
            "seed": self.seed,
            "first_stage": self.first_stage,
        }
        claim(self.out, f"train {self.kind}", settings)
        return is_finished(self.out)

    def initialised(self, make: Callable[[], ModuleT]) -> ModuleT:
        with torch.random.fork_rng():
            torch.manual_seed(derive(self.seed, "initialisation"))
            return make()

    def sampler(self, sampling: SamplingConfig) -> PatchSampler:
        return PatchSampler(self.cohort, "train", self.size_px, sampling, derive(self.seed, "data"))

    def save(
        self, state: dict[str, Tensor], *, notes: dict[str, Any] | None = None, seen: tuple[str, ...] = ()
    ) -> None:
        header = CheckpointHeader(
            kind=self.kind,
            taxonomy=self.cohort.taxonomy,
            size_px=self.size_px,
            mpp=self.cohort.mpp,
            config=self.config.model_dump(mode="json"),
            seed=self.seed,
            patients_seen=tuple(sorted({*self.cohort.patients("train"), *seen})),
            cohort=self.cohort.fingerprint,
            notes=notes or {},
        )
        save_checkpoint(self.out, state, header)
        forget_progress(self.out)


def _require_fit(folder: Path, header: CheckpointHeader, cohort: Cohort) -> None:
    require_taxonomy(folder, header, cohort.taxonomy)
    if abs(header.mpp - cohort.mpp) > 0.05 * cohort.mpp:
        raise MismatchError(
            f"{folder}: was trained at {header.mpp} um/px, this cohort is at {cohort.mpp}; train it anew"
        )
    held_out = {part: cohort.patients(part) for part in ("val", "test")}
    check_no_leak(header.patients_seen, held_out, f"autoencoder {folder}")


@torch.no_grad()
def _measure_latents(model: Diffusion, sampler: PatchSampler, patches: int = 256) -> None:
    """Set the mean and standard deviation of the latents' channels."""
    encoded = [model.encode(_images(sampler, range(i, i + 16))) for i in range(0, patches, 16)]
    latents = torch.cat(encoded)
    sd = latents.std((0, 2, 3))
    if model.config.normalise_latents == "all":
        sd = sd.pow(2).mean().sqrt().expand_as(sd)
    model.latent_mean.copy_(latents.mean((0, 2, 3)))
    model.latent_sd.copy_(sd.clamp(min=1e-6))


def _images(sampler: PatchSampler, indices: range) -> Tensor:
    return torch.from_numpy(np.stack([sampler[i].image for i in indices]))


def _pooled(model: Diffusion, sampler: PatchSampler, pool: int, batch_size: int) -> Batches:
    """Encode the first ``pool`` patches once; batches are runs of a fresh shuffle for each pass."""
    latents, labels = [], []
    with bar("encoding", pool) as advance:
        for first in range(0, pool, ENCODE_BATCH):
            part = stack([sampler[i] for i in range(first, min(first + ENCODE_BATCH, pool))])
            latents.append(model.encode(part["images"]))
            labels.append(part["labels"])
            advance(len(part["labels"]))
    all_latents, all_labels = torch.cat(latents), torch.cat(labels)

    @lru_cache(maxsize=2)
    def order(turn: int) -> Tensor:
        return torch.randperm(pool, generator=torch_generator(model.seed, "pool", turn))

    def batch(step: int) -> dict[str, Tensor]:
        numbers = range(step * batch_size, (step + 1) * batch_size)
        members = torch.stack([order(n // pool)[n % pool] for n in numbers])
        return {"latents": all_latents[members], "labels": all_labels[members]}

    return batch
