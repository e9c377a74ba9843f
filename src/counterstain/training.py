"""The one training loop: Lightning's Trainer, fed by step number, resumable at any step with the same result.

A model is a ``LightningModule`` that logs its losses and draws its noise from generators derived from the step
(``batch["step"]``) and the place of a sample in the batch (``batch["position"]``). So a training that was killed and
resumed, or spread over micro-batches and devices, sees the very same data and noise as one that ran through.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from counterstain.batch_norm import synchronisation
from counterstain.data.sampling import PatchBatches
from counterstain.errors import ConfigError, DivergenceError
from counterstain.interrupts import Interruption, ignore_ctrl_c
from counterstain.processes import are_to_be_started, rank
from counterstain.progress import bar
from counterstain.storage import released_on_error, write_csv
from counterstain.tracking import Curves, Row
from counterstain.training_config import TrainingConfig
from counterstain.training_state import PROGRESS_FILE, AtomicCheckpointIO, forget_progress, steps_done

__all__ = [
    "Batch",
    "Batches",
    "Monitor",
    "TrainingConfig",
    "fit",
    "forget_progress",
    "fused_optimizers",
    "starts_processes",
]
Batch = dict[str, Tensor]
Batches = Callable[[int], Batch]


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Figures that are taken while a model trains, and at the end."""

    measure: Callable[[], Mapping[str, float]]
    """Looks at the model, in evaluation mode, and changes nothing."""
    every_steps: int


def fit(
    module: LightningModule,
    batches: Batches,
    folder: Path,
    config: TrainingConfig,
    *,
    ema_decay: float | None = None,
    monitor: Monitor | None = None,
    label: str = "training",
) -> dict[str, float]:
    """Train ``module`` in place; resume from what ``folder`` holds of an earlier, interrupted call.

    Parameters
    ----------
    module : LightningModule
        Logs losses with ``self.log``; may set ``optimizers_per_step`` (2 for a GAN).
    batches : callable
        Step number -> the whole batch of that step, a dict of tensors of equal first length.
    folder : Path
        Gets ``last.ckpt`` and ``logs`` while training runs and ``losses.csv`` (step, name, value) at its end.
        On one device Ctrl-C and SIGTERM save the state too, after the step that is under way.
    ema_decay : float, optional
        Leave the exponential moving average of the weights in ``module`` instead of the last ones; the decay warms
        up as (1 + n) / (10 + n), so that short trainings are not averages with their initial weights.

    monitor : Monitor, optional
        Its figures join ``losses.csv``: while training those of the last weights, at the end those of what is left in
        ``module``.

    Returns
    -------
    dict
        The monitor's figures at the end.

    Raises
    ------
    DivergenceError
        A loss is not a number.
    KeyboardInterrupt
        Ctrl-C or SIGTERM; the state is saved.
    """
    with released_on_error(folder) if rank() == 0 else nullcontext():
        _check(module, config)
    progress_file = folder / PROGRESS_FILE
    start = steps_done(progress_file)
    with _bar_of_first_process(label, config.steps, start) as advance, _quiet_lightning():
        curves = partial(Curves, folder, label, logger=config.logger, settings=getattr(module, "config", config))
        history = _History(config, progress_file, advance, monitor, curves)
        averaging = [] if ema_decay is None else [WeightAveraging(multi_avg_fn=_warmed_average(ema_decay))]
        trainer = _trainer(module, config, folder, [*averaging, history])
        dataset = _Slices(batches, config, trainer.global_rank)
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=_From(start * config.accumulate),
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
            worker_init_fn=ignore_ctrl_c,
            pin_memory=torch.cuda.is_available(),
        )
        resume = progress_file if progress_file.exists() else None
        with history.closed():
            with nullcontext() if config.devices * config.num_nodes > 1 else history.stop.held_back():
                _run(trainer, module, loader, resume)
            module.eval()
            figures = history.watch(module) if monitor is not None and trainer.is_global_zero else {}
    if trainer.is_global_zero:
        write_csv(folder / "losses.csv", pd.DataFrame(history.rows, columns=["step", "name", "value"]))
    return figures


def _check(module: LightningModule, config: TrainingConfig) -> None:
    """Raise ConfigError where a model cannot be trained in the way that is asked for."""
    if starts_processes(config):
        raise ConfigError(f"devices {config.devices}: {type(module).__name__} trains on one device; use 1")
    slices = config.accumulate * config.devices * config.num_nodes
    if config.batch_size % slices:
        raise ConfigError(
            f"batch_size {config.batch_size} cannot be shared among {slices} micro-batches; choose a multiple"
        )
    if config.accumulate > 1 and not module.automatic_optimization:
        raise ConfigError(f"accumulate {config.accumulate}: {type(module).__name__} steps by itself; use 1")
    if config.gradient_clip and not module.automatic_optimization:
        raise ConfigError(f"gradient_clip {config.gradient_clip:g}: {type(module).__name__} clips none; use null")
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("accelerator gpu: this machine has none that torch can use; set it to auto or cpu")


def _trainer(module: LightningModule, config: TrainingConfig, folder: Path, callbacks: list[Callback]) -> Trainer:
    return Trainer(
        max_steps=config.steps * int(getattr(module, "optimizers_per_step", 1)),
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=_strategy(config, module),
        precision=_precision(config),  # type: ignore[arg-type]
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.gradient_clip,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), *_of_many_processes(config)],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def fused_optimizers(config: TrainingConfig) -> bool:
    """Whether Adam may update all weights in one call; Lightning cannot clip its gradients in mixed precision."""
    return config.gradient_clip is None or _precision(config) == "32-true"


def _run(trainer: Trainer, module: LightningModule, loader: DataLoader[Batch], resume: Path | None) -> None:
    try:
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    except SystemExit as stop:  # what Lightning makes of KeyboardInterrupt
        raise KeyboardInterrupt from stop


class _Slices(Dataset[Batch]):
    """Item m = the part of the batch of step ``m // accumulate`` that this device and micro-batch work on."""

    def __init__(self, batches: Batches, config: TrainingConfig, rank: int) -> None:
        self._batches, self._config, self._rank = batches, config, rank
        self._last: tuple[int, Batch] | None = None

    def __getitem__(self, item: int) -> Batch:
        step, micro = divmod(item, self._config.accumulate)
        size = self._config.batch_size // (self._config.accumulate * self._config.devices * self._config.num_nodes)
        first = (self._rank * self._config.accumulate + micro) * size
        part = self._part(step, first, first + size)
        return part | {"step": torch.tensor(step), "position": torch.arange(first, first + size)}

    def _part(self, step: int, start: int, stop: int) -> Batch:
        if isinstance(self._batches, PatchBatches):
            return self._batches.part(step, start, stop)
        if self._last is None or self._last[0] != step:
            self._last = (step, self._batches(step))
        return {name: tensor[start:stop] for name, tensor in self._last[1].items()}


class _From(Sampler[int]):
    """first, first + 1, … without end; without a length, so that Lightning neither counts nor ends epochs."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        item = self._first
        while True:
            yield item
            item += 1


class _History(Callback):
    """Collects losses, counts steps, saves the state; all of it travels with the checkpoint."""

    def __init__(
        self,
        config: TrainingConfig,
        progress_file: Path,
        advance: Callable[[int], None],
        monitor: Monitor | None,
        open_curves: Callable[..., Curves],
    ) -> None:
        self._config, self._progress_file, self._advance, self._monitor = config, progress_file, advance, monitor
        self._open_curves = open_curves
        self._curves: Curves | None = None
        self.stop = Interruption()
        self.rows: list[Row] = []
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del pl_module
        self.stop.listen()  # Lightning would end at SIGTERM between two micro-batches
        if trainer.is_global_zero:
            self._curves = self._open_curves(earlier=self.rows)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        del outputs
        if (batch_idx + 1) % self._config.accumulate:
            return
        self.step = int(batch["step"]) + 1
        if self.step % self._config.log_every_steps == 0 or self.step == self._config.steps:
            self._record(_over_processes(trainer))
        under_way = self.step < self._config.steps
        if self._monitor and under_way and self.step % self._monitor.every_steps == 0 and trainer.is_global_zero:
            self.watch(pl_module)
        if under_way and (self.stop.waits or self.step % self._config.checkpoint_every_steps == 0):
            trainer.save_checkpoint(self._progress_file)
        self._advance(1)
        if under_way and self.stop.waits:
            raise KeyboardInterrupt

    def watch(self, module: LightningModule) -> dict[str, float]:
        """Take the monitor's figures of the module as it is now."""
        assert self._monitor is not None
        training = [part for part in module.modules() if part.training]
        module.eval()
        figures = {name: float(value) for name, value in self._monitor.measure().items()}
        self._note(figures)
        for part in training:
            part.training = True
        return figures

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Close the curves at the end, however it comes."""
        status: Literal["success", "failed"] = "failed"
        try:
            yield
            status = "success"
        finally:
            if self._curves is not None:
                self._curves.close(status)

    def _record(self, metrics: Mapping[str, Tensor]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._note(values)
        for name, value in values.items():
            if not math.isfinite(value):
                raise DivergenceError(f"step {self.step}: {name} is {value}; lower the learning rate")

    def _note(self, values: Mapping[str, float]) -> None:
        self.rows += [(self.step, name, value) for name, value in values.items()]
        if self._curves is not None:
            self._curves.log(values, self.step)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [list(row) for row in self.rows], "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [(int(step), str(name), float(value)) for step, name, value in state_dict["rows"]]
        self.step = int(state_dict["step"])


def starts_processes(config: TrainingConfig) -> bool:
    """Whether the caller must train with :func:`counterstain.processes.run_in_processes`, a process for each device.

    Raises
    ------
    ConfigError
        There are fewer GPUs; or see :func:`counterstain.processes.are_to_be_started`.
    """
    if _on_gpu(config) and config.devices > torch.cuda.device_count():
        raise ConfigError(f"devices {config.devices}: this machine has {torch.cuda.device_count()}; set it to that")
    return are_to_be_started(config.devices, config.num_nodes)


def _strategy(config: TrainingConfig, module: LightningModule) -> str:
    if config.devices * config.num_nodes == 1:
        return "auto"
    if config.strategy != "auto":
        return config.strategy
    return "ddp" if module.automatic_optimization else "ddp_find_unused_parameters_true"


def _of_many_processes(config: TrainingConfig) -> list[Any]:
    """Return the plugins by which processes find each other; a single one takes no notice of a cluster around it."""
    if config.devices * config.num_nodes == 1:
        return [LightningEnvironment()]
    return [TorchElasticEnvironment(), synchronisation(on_gpu=_on_gpu(config))]


def _over_processes(trainer: Trainer) -> dict[str, Tensor]:
    """Return the mean of every loss over the processes."""
    return {name: trainer.strategy.reduce(value, reduce_op="mean") for name, value in trainer.callback_metrics.items()}


@contextmanager
def _bar_of_first_process(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    if rank() > 0:
        yield lambda _steps: None
        return
    with bar(label, total, done) as advance:
        yield advance


def _on_gpu(config: TrainingConfig) -> bool:
    return config.accelerator != "cpu" and torch.cuda.is_available()


def _precision(config: TrainingConfig) -> str:
    fast_bf16 = _on_gpu(config) or torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - torch has no public name for it
    auto = "bf16-mixed" if fast_bf16 else "32-true"
    return {"auto": auto, "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[config.precision]


def _warmed_average(decay: float) -> Callable[[Any, Any, Any], None]:
    @torch.no_grad()
    def average(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        weight = 1.0 - min(decay, (1 + n) / (10 + n))
        pairs = list(zip(averaged, current, strict=True))
        continuous = [(mean, value.to(mean.dtype)) for mean, value in pairs if mean.is_floating_point()]
        if continuous:
            torch._foreach_lerp_([mean for mean, _ in continuous], [value for _, value in continuous], weight)
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)

    return average


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Advice about workers, epochs and devices that does not apply to a loop without epochs.
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
        warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\).*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
