"""The one training loop: by step number, resumable at any step with the same result.

Models draw their noise from generators derived from the step (``batch["step"]``) and the place of a sample in the batch
(``batch["position"]``), so a training that was resumed, or spread over micro-batches and devices, sees the same noise.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from counterstain.checkpoints import PROGRESS_FILE, read_progress, save_progress
from counterstain.data.sampling import PatchBatches
from counterstain.devices import (
    Batch,
    average_gradients,
    compiled,
    fast_arithmetic,
    open_fabric,
    place,
    prepared,
    rank,
    share_batch_statistics,
    starts_processes,
)
from counterstain.errors import ConfigError, DivergenceError
from counterstain.progress import bar
from counterstain.storage import released_on_error, write_csv
from counterstain.training_config import Curves, TrainingConfig

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Batches = Callable[[int], Batch]
Minimise = Callable[..., None]


class Trainable(nn.Module):
    """A network with its losses: what the loop trains."""

    updates_itself = False
    """Whether :meth:`training_step` does more than minimise one loss, as a GAN's; its gradients are neither accumulated
    nor clipped."""

    def optimizers(self) -> Sequence[Optimizer]:
        """Return the optimisers, two for a GAN."""
        raise NotImplementedError

    def learning_rate(self, _step: int) -> float:
        """Return the learning rate of a step, relative to that of the optimisers."""
        return 1.0

    def losses(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the losses of a batch; all are recorded, ``loss`` is minimised."""
        raise NotImplementedError

    def training_step(self, batch: Batch, minimise: Minimise) -> Mapping[str, Any]:
        """Call ``minimise(loss, number of the optimiser)`` for each update; return what is recorded."""
        losses = self.losses(batch)
        minimise(losses["loss"])
        return losses

    def networks(self) -> Iterable[nn.Module]:
        """Return the parts that are called as functions and do most of the arithmetic: what ``compile`` compiles."""
        return self.children()

    def finish(self) -> None:
        """Put in order what depends on the weights, after they were replaced by their averages."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(chain(self.parameters(), self.buffers())).device


def cosine(step: int, steps: int) -> float:
    """Return a learning rate that falls from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Figures that are taken while a model trains, and at the end."""

    measure: Callable[[], Mapping[str, float]]  # looks at the model, in evaluation mode, and changes nothing
    every_steps: int


def fit(
    model: Trainable,
    batches: Batches,
    folder: Path,
    config: TrainingConfig,
    *,
    ema_decay: float | None = None,
    monitor: Monitor | None = None,
    label: str = "training",
) -> dict[str, float]:
    """Train ``model`` in place; resume from what ``folder`` holds of an earlier, interrupted call.

    ``batches`` returns the whole batch of a step, a dict of tensors of equal first length. ``folder`` gets
    ``last.ckpt`` and ``logs`` while training runs and ``losses.csv`` (step, name, value) at its end; the monitor's
    figures join it, while training those of the last weights, at the end those of ``model``, which are returned.
    ``ema_decay`` leaves the exponential moving average of the weights in ``model`` instead of the last ones; the decay
    warms up as (1 + n) / (10 + n), so that short trainings are not averages with their initial weights.

    Raises DivergenceError where a loss is not a number; StorageError where the state of the interrupted call cannot be
    read (it is left as it is); KeyboardInterrupt at Ctrl-C or SIGTERM, on one device after the state is saved, after
    the step that is under way.
    """
    with released_on_error(folder) if rank() == 0 else nullcontext():
        _check(model, config)

    # The device of this process; torchrun or run_in_processes started one process for each.
    fabric = open_fabric(config)
    share_batch_statistics(place(model, fabric.device), fabric)

    # Go on where an interrupted training stopped.
    first = fabric.is_global_zero
    optimizers = [fabric.setup_optimizers(each) for each in model.optimizers()]
    run = _Run(model, config, fabric, optimizers, folder / PROGRESS_FILE, ema_decay, monitor if first else None)
    with fabric.rank_zero_first():
        run.load()

    with (
        released_on_error(folder) if first else nullcontext(),
        bar(label, config.steps, run.step) if first else nullcontext(lambda _: None) as advance,
        Curves(folder, label, config.logger, getattr(model, "config", config), run.rows)
        if first
        else nullcontext() as run.curves,
    ):
        parts = _Parts(batches, config, fabric.global_rank)
        with (
            _Interruption(listens=fabric.world_size == 1) as stop,
            fast_arithmetic(fabric.device),
            compiled(model.networks(), config),
            closing(prepared(parts, parts.from_step(run.step), config, fabric.device)) as loader,
        ):
            _loop(run, loader, advance, stop)
            run.leave_average()
        model.eval()
        figures = run.watch()
    if first:
        write_csv(folder / "losses.csv", pd.DataFrame(run.rows, columns=["step", "name", "value"]))
    model.cpu()
    return figures


def _loop(run: _Run, loader: Iterator[Batch], advance: Callable[[int], None], stop: _Interruption) -> None:
    config, fabric = run.config, run.fabric
    while run.step < config.steps:
        # Minimise the losses of the whole batch, in micro-batches where memory is short.
        run.set_learning_rates()
        for micro in range(config.accumulate):
            batch = next(loader)
            on_cpu = {name: batch.pop(name) for name in ("step", "position")}  # reading them elsewhere would wait
            batch = fabric.to_device(batch) | on_cpu
            with fabric.autocast():
                torch.set_autocast_cache_enabled(False)  # a GAN's first update would leave it out of date
                losses = run.model.training_step(batch, run.minimiser(micro))

        # The average follows the weights.
        run.follow()
        run.step += 1
        under_way = run.step < config.steps

        # Record the losses, and what the monitor sees.
        if run.step % config.log_every_steps == 0 or not under_way:
            run.record(losses)
        if run.monitor is not None and under_way and run.step % run.monitor.every_steps == 0:
            run.watch()

        # Save the state; obey Ctrl-C and SIGTERM.
        if under_way and (stop.waits or run.step % config.checkpoint_every_steps == 0) and fabric.is_global_zero:
            run.save()
        advance(1)
        if under_way and stop.waits:
            raise KeyboardInterrupt


def _check(model: Trainable, config: TrainingConfig) -> None:
    """Raise ConfigError where a model cannot be trained in the way that is asked for."""
    name = type(model).__name__
    if starts_processes(config):
        raise ConfigError(f"devices {config.devices}: {name} trains on one device; use 1")
    if config.accumulate > 1 and model.updates_itself:
        raise ConfigError(f"accumulate {config.accumulate}: {name} cannot accumulate gradients; use 1")
    if config.gradient_clip and model.updates_itself:
        raise ConfigError(f"gradient_clip {config.gradient_clip:g}: {name} clips no gradients; use null")


@dataclass
class _Run:
    """A training under way; optimisers, average, step and rows are what it is resumed from."""

    model: Trainable
    config: TrainingConfig
    fabric: Fabric
    optimizers: list[Any]
    file: Path
    ema_decay: float | None
    monitor: Monitor | None
    step: int = 0
    rows: list[tuple[int, str, float]] = field(default_factory=list)
    curves: Curves | None = None

    def __post_init__(self) -> None:
        self.average = None if self.ema_decay is None else [tensor.clone() for tensor in self.tensors()]

    def set_learning_rates(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * self.model.learning_rate(self.step)

    def minimiser(self, micro: int) -> Minimise:
        """Return what minimises a loss in a micro-batch; weights change after the last one."""

        def minimise(loss: Tensor, number: int = 0) -> None:
            optimizer, clip = self.optimizers[number], self.config.gradient_clip
            with torch.autocast(self.fabric.device.type, enabled=False):
                if micro == 0:
                    optimizer.zero_grad()
                self.fabric.backward(loss / self.config.accumulate)
                if micro < self.config.accumulate - 1:
                    return
                average_gradients(weights for group in optimizer.param_groups for weights in group["params"])
                if clip is not None:
                    self.fabric.clip_gradients(self.model, optimizer, max_norm=clip, error_if_nonfinite=False)
                optimizer.step()

        return minimise

    def tensors(self) -> list[Tensor]:
        return [tensor.detach() for tensor in (*self.model.parameters(), *self.model.buffers())]

    def follow(self) -> None:
        if self.ema_decay is None:
            return
        # The first step sets the average, whatever the initial weights were.
        weight = 1.0 - min(self.ema_decay, (1 + self.step) / (10 + self.step)) if self.step else 1.0
        pairs = list(zip(self.average or (), self.tensors(), strict=True))
        numbers = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in numbers], [value for _, value in numbers], weight)
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)

    def leave_average(self) -> None:
        if self.average is not None:
            for tensor, mean in zip(self.tensors(), self.average, strict=True):
                tensor.copy_(mean)
        self.model.finish()

    def record(self, losses: Mapping[str, Any]) -> None:
        """Note losses, as means over the processes."""
        here = {
            name: torch.as_tensor(loss, dtype=torch.float32, device=self.fabric.device).detach()
            for name, loss in losses.items()
        }
        means: Any = self.fabric.all_reduce(here, reduce_op="mean")
        values = {name: float(mean) for name, mean in means.items()}
        self._note(values)
        for name, value in values.items():
            if not math.isfinite(value):
                raise DivergenceError(f"step {self.step}: {name} is {value}; lower the learning rate")

    def watch(self) -> dict[str, float]:
        """Take the monitor's figures of the model as it is now."""
        if self.monitor is None:
            return {}
        training = [part for part in self.model.modules() if part.training]
        self.model.eval()
        figures = {name: float(value) for name, value in self.monitor.measure().items()}
        self._note(figures)
        for part in training:
            part.training = True
        return figures

    def _note(self, values: Mapping[str, float]) -> None:
        self.rows += [(self.step, name, value) for name, value in values.items()]
        if self.curves is not None:
            self.curves.log(values, self.step)

    def save(self) -> None:
        content = {"step": self.step, "rows": self.rows, "average": self.average}
        content |= {"model": self.model.state_dict(), "scaler": self.fabric.strategy.precision.state_dict()}
        save_progress(self.file, content | {"optimizers": [each.state_dict() for each in self.optimizers]})

    def load(self) -> None:
        content = read_progress(self.file)
        if content is None:
            return
        self.step, self.rows = content["step"], content["rows"]
        self.model.load_state_dict(content["model"])
        self.fabric.strategy.precision.load_state_dict(content["scaler"])
        for optimizer, given in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(given)
            _match_layouts(optimizer)
        for mean, given in zip(self.average or (), content["average"] or (), strict=True):
            mean.copy_(given)


def _match_layouts(optimizer: Any) -> None:
    """Lay an optimiser's moments out as its weights, which lie otherwise on a GPU than on the CPU that saved them.

    Adam in one call walks through the memory of both at once.
    """
    for weights, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == weights.shape:
                state[name] = torch.empty_like(weights, dtype=value.dtype).copy_(value)


class _Parts(Dataset[Batch]):
    """Item m = the part of the batch of step ``m // accumulate`` that this device and micro-batch work on."""

    def __init__(self, batches: Batches, config: TrainingConfig, rank: int) -> None:
        self._batches, self._config, self._rank = batches, config, rank
        self._last: tuple[int, Batch] | None = None

    def __getitem__(self, item: int) -> Batch:
        config, (step, micro) = self._config, divmod(item, self._config.accumulate)
        size = config.batch_size // config.parts
        start = (self._rank * config.accumulate + micro) * size
        if isinstance(self._batches, PatchBatches):
            part = self._batches.part(step, start, start + size)
        else:
            if self._last is None or self._last[0] != step:
                self._last = (step, self._batches(step))
            part = {name: tensor[start : start + size] for name, tensor in self._last[1].items()}
        return part | {"step": torch.tensor(step), "position": torch.arange(start, start + size)}

    def from_step(self, step: int) -> range:
        """Return the numbers of the items of the rest of a training."""
        return range(step * self._config.accumulate, self._config.steps * self._config.accumulate)


class _Interruption:
    """Holds back Ctrl-C and SIGTERM (``kill``, a cluster that wants its node back) until the state is saved.

    A second Ctrl-C stops at once. A second SIGTERM does not: a cluster sends it to all processes of a study, and its
    driver sends it once more.
    """

    def __init__(self, *, listens: bool) -> None:
        self._listens = listens and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}
        self.waits = False

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM) if self._listens else ():
            if signal.getsignal(number) not in {None, signal.SIG_IGN}:  # a shell's background jobs ignore Ctrl-C
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.waits and kind is None:
            raise KeyboardInterrupt

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.waits and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.waits = True
        if number == signal.SIGINT:  # a person waits; print() must not be called where it may be under way already
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
