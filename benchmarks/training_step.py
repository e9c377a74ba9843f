"""Print the time of a diffusion training step: ours against plain fp32 code of the usual kind, side by side in one run.

    python benchmarks/training_step.py [COHORT] [--preset best] [--set KEY=VALUE ...] [--steps 60] [--block 5]

All variants train the same network, from the same weights, on patches of the same cohort (a small phantom where none is
given). They take turns of a few steps each, and the median of the turns counts, so that a noisy machine hurts all
alike. ``plain`` is what one writes with diffusers and Lightning: a dataset, a module that encodes its batch, AdamW, an
average of the weights, everything in fp32. ``cached`` has its patches encoded beforehand (``diffusion.latent_pool``).
The means of the losses over the second half, with their standard errors, tell whether all of them learn alike; the
first stage is not trained for this, so the losses mean nothing beyond that.

    python benchmarks/training_step.py COHORT --feeding 1 [--set KEY=VALUE ...] [--rounds 5]

prints the time of a segmenter's training step instead: with patches that lie ready in memory, and with those of a
cohort on the disk (benchmarks/reading.py makes a large one), without and with so many workers.
"""

import argparse
import copy
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.data.phantom import write_phantom
from counterstain.data.phantom.styles import PhantomConfig
from counterstain.data.sampling import PatchBatches, PatchSampler, PatchSource
from counterstain.data.split import SplitConfig, split_cohort
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.diffusion import MIN_SNR_GAMMA, Diffusion, diffusion_batches, measure_latents
from counterstain.recipe import Recipe, load_recipe
from counterstain.segmentation.model import Segmenter
from counterstain.training import Batches, Minimise, fit


@dataclass
class Turns:
    """Lets trainings, each in a thread of its own, run one at a time, a block of steps each; takes the times."""

    names: list[str]
    block: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)
    _turn: int = 0
    _began: float = 0.0
    _condition: threading.Condition = field(default_factory=threading.Condition)

    def step(self, name: str, number: int) -> None:
        """Say that a training asks for the batch of this number; return when it may go on."""
        if number % self.block:
            return
        with self._condition:
            if number:
                self.seconds.setdefault(name, []).append((time.perf_counter() - self._began) / self.block)
                self._pass_on()
            self._condition.wait_for(lambda: self._whose() == name)
            self._began = time.perf_counter()

    def leave(self, name: str) -> None:
        """Say that a training has ended."""
        with self._condition:
            self._done.add(name)
            if self._whose() == name and len(self._done) < len(self.names):
                self._pass_on()
            self._condition.notify_all()

    def _whose(self) -> str:
        return self.names[self._turn % len(self.names)]

    def _pass_on(self) -> None:
        self._turn += 1
        while self._whose() in self._done:
            self._turn += 1
        self._condition.notify_all()


class PlainPatches(Dataset[tuple[Tensor, Tensor]]):
    """Patches as a map-style dataset."""

    def __init__(self, sampler: PatchSampler, count: int, batch_size: int, turns: Turns) -> None:
        self._sampler, self._count, self._batch_size, self._turns = sampler, count, batch_size, turns

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index % self._batch_size == 0:
            self._turns.step("plain", index // self._batch_size)
        patch = self._sampler[index]
        image = torch.from_numpy(patch.image).permute(2, 0, 1).float() / 127.5 - 1
        return image, torch.from_numpy(patch.label_mask).long()


class PlainDiffusion(LightningModule):
    """Latent diffusion as the usual training script has it."""

    def __init__(self, ours: Diffusion) -> None:
        super().__init__()
        config = ours.config
        self.config, self.num_labels, self.factor = config, ours.num_labels, ours.factor
        self.unet = copy.deepcopy(ours.unet)
        self.first_stage = copy.deepcopy(ours.first_stage).requires_grad_(requires_grad=False)
        self.register_buffer("mean", ours.latent_mean[:, None, None].clone())
        self.register_buffer("sd", ours.latent_sd[:, None, None].clone())
        self.scheduler = DDPMScheduler(**config.noise.scheduler_settings())
        self.average: Any = None if config.ema_decay is None else EMAModel(self.unet.parameters(), config.ema_decay)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Encode, noise, predict, compare."""
        del batch_idx
        images, labels = batch
        with torch.no_grad():
            latents = (self.first_stage.encode(images) - self.mean) / self.sd
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self.config.noise.timesteps, (len(latents),), device=self.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        condition = functional.one_hot(labels.where(labels < self.num_labels, 0), self.num_labels).permute(0, 3, 1, 2)
        condition = functional.interpolate(condition.float(), scale_factor=1 / self.factor, mode="area")
        condition = condition * (torch.rand(len(latents), 1, 1, 1) >= self.config.condition_dropout).to(condition)
        prediction = self.unet(torch.cat([noisy, condition], dim=1), timesteps).sample
        loss = self._loss(prediction, latents, noise, timesteps)
        self.log("loss", loss, prog_bar=True)
        self.losses.append(loss.item())
        return loss

    def _loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        kind = self.config.noise.prediction
        target = {"epsilon": noise, "sample": latents}.get(kind)
        if target is None:
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        if self.config.loss == "l1":
            return functional.l1_loss(prediction, target)
        squared = functional.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))
        if self.config.loss == "min-snr":
            alphas = self.scheduler.alphas_cumprod.to(self.device)[timesteps]
            snr = alphas / (1 - alphas)
            divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
            squared = squared * snr.clamp(max=MIN_SNR_GAMMA) / divisor
        return squared.mean()

    def on_train_batch_end(self, *_: Any) -> None:
        """Average the weights."""
        if self.average is not None:
            self.average.to(self.device)
            self.average.step(self.unet.parameters())

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up."""
        optimizer = torch.optim.AdamW(self.unet.parameters(), self.config.scaled_lr, weight_decay=0.0)
        warmup = self.config.warmup_steps + 1
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run_plain(ours: Diffusion, sampler: PatchSampler, turns: Turns, steps: int, folder: Path) -> list[float]:
    training = ours.config.training
    module = PlainDiffusion(ours)
    patches = PlainPatches(sampler, steps * training.batch_size, training.batch_size, turns)
    trainer = Trainer(
        max_steps=steps,
        precision="32-true",
        gradient_clip_val=training.gradient_clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(patches, training.batch_size, num_workers=0))
    return module.losses


def run_ours(name: str, model: Diffusion, batches: Batches, turns: Turns, folder: Path) -> list[float]:
    config = model.config

    def in_turn(step: int) -> dict[str, Tensor]:
        turns.step(name, step)
        return batches(step)

    fit(model, in_turn, folder, config.training, ema_decay=config.ema_decay, label=name)
    losses = pd.read_csv(folder / "losses.csv").query("name == 'loss'")
    return losses["value"].tolist()


class TimedSegmenter(Segmenter):
    """Notes when each step begins and ends; in between the training waits for its next batch."""

    times: list[tuple[float, float, float]]  # begin, end, and the processor time of this process until then

    def training_step(self, batch: dict[str, Tensor], minimise: Minimise) -> Mapping[str, Any]:
        """Train as ever."""
        began = time.perf_counter()
        losses = super().training_step(batch, minimise)
        self.times.append((began, time.perf_counter(), time.process_time()))
        return losses


class InMemory:
    """Patches that lie ready, again and again."""

    def __init__(self, sampler: PatchSampler, count: int) -> None:
        self._patches = [sampler[i] for i in range(count)]

    def __getitem__(self, index: int) -> Patch:
        return self._patches[index % len(self._patches)]


def feeding(recipe: Recipe, cohort: Cohort, workers: int, rounds: int, block: int) -> None:
    """Train in turns, a block of steps each; the first three of a block, while workers start, are not counted."""
    config, warm = recipe.segmenter, 3
    model = TimedSegmenter(config)
    sampler = PatchSampler(cohort, "train", recipe.size_px, config.sampling, 0)
    variants: dict[str, tuple[PatchSource, int]] = {
        "in memory": (InMemory(sampler, 64), 0),
        "from disk": (sampler, 0),
        f"from disk, {workers} worker{'s' if workers > 1 else ''}": (sampler, workers),
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name, (source, helpers) in variants.items():
            quiet = {"workers": helpers, "log_every_steps": 10**6, "checkpoint_every_steps": 10**6}
            training = config.training.model_copy(update=quiet | {"steps": warm + block + 1})
            model.times = []
            with tempfile.TemporaryDirectory() as folder:
                batches = PatchBatches(_From(source, turn * 10**6), training.batch_size, ("images", "labels"))
                fit(model, batches, Path(folder), training, label=name)
            began, ended, processor = np.array(model.times[warm:]).T
            of_step = (np.diff(began), began[1:] - ended[:-1], np.diff(processor))
            found[name].append(tuple(float(np.median(seconds)) for seconds in of_step))  # type: ignore[arg-type]
            print(
                "turn {}, {}: {:.3f} s/step, waits {:.3f} s, computes {:.3f} s".format(turn + 1, name, *found[name][-1])
            )
    print(f"{recipe.size_px} px, batches of {config.training.batch_size}, medians of {rounds} turns of {block} steps")
    memory = np.array(found["in memory"])
    for name, turns in found.items():
        step, wait, computes = np.median(turns, axis=0)
        ratio, _, of_processor = np.median(np.array(turns) / memory, axis=0)
        shown = f"x {ratio:.3f}; waits {wait:.3f} s; computes {computes:.3f} s, x {of_processor:.3f}"
        print(f"{name:22s} {step:.3f} s/step, {shown}")


@dataclass
class _From:
    """Another part of a stream for each turn: nothing is read twice."""

    source: PatchSource
    first: int

    def __getitem__(self, index: int) -> Patch:
        return self.source[self.first + index]


def phantom(folder: Path, size_px: int) -> Cohort:
    config = PhantomConfig(slides=10, regions_per_slide=2, size_px=max(256, size_px))
    return split_cohort(write_phantom(config, folder, lambda: None), SplitConfig(train=6, val=2, test=2))[0]


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    steps = arguments.steps + 1  # the batch that ends the last turn is asked for as well
    fixed = [
        f"diffusion.training.steps={steps}",
        f"diffusion.training.checkpoint_every_steps={steps}",
        "diffusion.training.log_every_steps=1",
        "diffusion.training.workers=0",  # turns are taken where batches are made
        "diffusion.lr_schedule=constant",
        "autoencoder.lpips_weight=0",
        "autoencoder.adversarial_weight=0",
    ]
    return load_recipe(arguments.preset, None, [*fixed, *arguments.settings])


def prepared(recipe: Recipe, cohort: Cohort) -> tuple[Diffusion, PatchSampler]:
    """Return an untrained denoiser whose latents are normalised, and its patches."""
    torch.manual_seed(0)
    first_stage = Autoencoder(recipe.autoencoder, recipe.size_px, 0)
    sampler = PatchSampler(cohort, "train", recipe.size_px, recipe.diffusion.sampling, 0)
    if recipe.autoencoder.kind == "linear":
        first_stage.fit_components(
            torch.from_numpy(np.stack([sampler[i].image for i in range(16 * s, 16 * s + 16)])) for s in range(16)
        )
    model = Diffusion(recipe.diffusion, first_stage, cohort.taxonomy.num_labels)
    if recipe.diffusion.normalise_latents != "none":
        measure_latents(model, sampler)
    return model, sampler


def variant(
    model: Diffusion, sampler: PatchSampler, pool: int | None, size_px: int, folder: Path
) -> tuple[Diffusion, Batches]:
    """Return a copy of a denoiser that trains on patches, or on latents of ``pool`` patches."""
    config = model.config.model_copy(update={"latent_pool": pool})
    other = Diffusion(config, copy.deepcopy(model.first_stage), model.num_labels)
    other.load_state_dict(model.state_dict())
    return other, diffusion_batches(other, sampler, size_px, 0, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", type=Path, nargs="?")
    parser.add_argument("--preset", default="best")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--block", type=int, default=5)
    parser.add_argument("--pool", type=int, default=256, help="patches that are encoded beforehand")
    parser.add_argument("--feeding", type=int, metavar="WORKERS", help="time how a segmenter is fed instead")
    parser.add_argument("--rounds", type=int, default=5, help="of feeding")
    arguments = parser.parse_args()
    recipe = recipe_of(arguments)
    if arguments.feeding is not None:
        warnings.filterwarnings("ignore")
        feeding(recipe, Cohort.open(arguments.cohort), arguments.feeding, arguments.rounds, arguments.block)
        return
    turns = Turns(["plain", "ours", "ours, cached"], arguments.block)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cohort = Cohort.open(arguments.cohort) if arguments.cohort else phantom(folder / "cohort", recipe.size_px)
        model, sampler = prepared(recipe, cohort)
        steps = recipe.diffusion.training.steps
        ours = variant(model, sampler, None, recipe.size_px, folder)
        start = time.perf_counter()
        cached = variant(model, sampler, arguments.pool, recipe.size_px, folder)
        encoding = (time.perf_counter() - start) / arguments.pool
        work: dict[str, Callable[[], list[float]]] = {
            "plain": lambda: run_plain(model, sampler, turns, steps, folder / "plain"),
            "ours": lambda: run_ours("ours", *ours, turns, folder / "ours"),
            "ours, cached": lambda: run_ours("ours, cached", *cached, turns, folder / "cached"),
        }
        losses = in_threads(work, turns)
    report(turns, losses, encoding, recipe)


def in_threads(work: dict[str, Callable[[], list[float]]], turns: Turns) -> dict[str, list[float]]:
    losses: dict[str, list[float]] = {}

    def run(name: str) -> None:
        try:
            losses[name] = work[name]()
        finally:
            turns.leave(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return losses


def report(turns: Turns, losses: dict[str, list[float]], encoding: float, recipe: Recipe) -> None:
    training = recipe.diffusion.training
    print(f"{recipe.size_px} px, batches of {training.batch_size}, turns of {turns.block} steps, the first not counted")
    median = {name: statistics.median(seconds[1:]) for name, seconds in turns.seconds.items()}
    for name in turns.names:
        second_half = losses[name][len(losses[name]) // 2 :]
        error = statistics.stdev(second_half) / len(second_half) ** 0.5
        print(
            f"{name:14s} {median[name]:8.3f} s/step   x {median['plain'] / median[name]:5.2f}   "
            f"loss {statistics.mean(second_half):.4f} +- {error:.4f}"
        )
    print(f"encoding a patch once takes {encoding:.4f} s")


if __name__ == "__main__":
    main()
