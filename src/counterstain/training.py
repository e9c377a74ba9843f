"""The one training loop: by step number, resumable at any step with the same result.

Models draw their noise from generators derived from the step (``batch["step"]``) and the place of a sample in the batch
(``batch["position"]``). So a training that was killed and resumed, or spread over micro-batches and devices, sees the
very same data and noise as one that ran through.
"""

from __future__ import annotations

import io
import math
import os
import signal
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from counterstain.data.sampling import PatchBatches
from counterstain.devices import average_gradients, on_gpu, rank, starts_processes
from counterstain.errors import ConfigError, DivergenceError, StorageError
from counterstain.progress import bar
from counterstain.storage import released_on_error, replacing, sweep, write_csv
from counterstain.training_config import Curves, TrainingConfig

Batch = dict[str, Tensor]
Batches = Callable[[int], Batch]
Minimise = Callable[..., None]
PROGRESS_FILE = "last.ckpt"
FORMAT = "counterstain 2"


class Trainable(nn.Module):
    """A network with its losses: what the loop trains."""

    updates_per_step = 1
    """2 for a GAN, whose steps can neither be accumulated nor clipped."""

    def optimizers(self) -> Sequence[Optimizer]:
        """Return one optimiser for each update of a step."""
        raise NotImplementedError

    def learning_rate(self, step: int) -> float:  # noqa: ARG002
        """Return the learning rate of a step, relative to that of the optimisers."""
        return 1.0

    def losses(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the losses of a batch; ``loss`` is minimised, the others are recorded."""
        raise NotImplementedError

    def training_step(self, batch: Batch, minimise: Minimise) -> Mapping[str, Any]:
        """Minimise what is to be minimised, by ``minimise(loss)`` or ``minimise(loss, optimiser)``; return the record."""
        losses = self.losses(batch)
        minimise(losses["loss"])
        return losses

    def finish(self) -> None:
        """Put in order what depends on the weights, after they were replaced by their averages."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.parameters()).device


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Figures that are taken while a model trains, and at the end."""

    measure: Callable[[], Mapping[str, float]]
    """Looks at the model, in evaluation mode, and changes nothing."""
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

    Parameters
    ----------
    model : Trainable
    batches : callable
        Step number -> the whole batch of that step, a dict of tensors of equal first length.
    folder : Path
        Gets ``last.ckpt`` and ``logs`` while training runs and ``losses.csv`` (step, name, value) at its end.
        On one device Ctrl-C and SIGTERM save the state too, after the step that is under way.
    ema_decay : float, optional
        Leave the exponential moving average of the weights in ``model`` instead of the last ones; the decay warms
        up as (1 + n) / (10 + n), so that short trainings are not averages with their initial weights.
    monitor : Monitor, optional
        Its figures join ``losses.csv``: while training those of the last weights, at the end those of what is left in
        ``model``.

    Returns
    -------
    dict
        The monitor's figures at the end.

    Raises
    ------
    DivergenceError
        A loss is not a number.
    StorageError
        The state of the interrupted call cannot be read; it is left as it is.
    KeyboardInterrupt
        Ctrl-C or SIGTERM; the state is saved.
    """
    with released_on_error(folder) if rank() == 0 else nullcontext():
        _check(model, config)

    # The device of this process; torchrun or run_in_processes started one process for each.
    fabric = _fabric(config)
    model.to(fabric.device)
    if fabric.world_size > 1:
        _share_batch_statistics(model, fabric)
    state = _State(model, [fabric.setup_optimizers(optimizer) for optimizer in model.optimizers()])
    if ema_decay is not None:
        state.average = [tensor.clone() for tensor in state.tensors()]

    # Go on where an interrupted training stopped, with the data of that step.
    with fabric.rank_zero_first():
        state.load(folder / PROGRESS_FILE, fabric)
    loader = _Parts(batches, config, fabric.global_rank).loader(state.step, fabric)

    first, settings = fabric.is_global_zero, getattr(model, "config", config)
    with (
        bar(label, config.steps, state.step) if first else nullcontext(lambda _: None) as advance,
        Curves(folder, label, config.logger, settings, state.rows) if first else nullcontext() as curves,
    ):
        with _Interruption(listens=fabric.world_size == 1) as stop:
            while state.step < config.steps:
                # Minimise the losses of the whole batch, in micro-batches where memory is short.
                for optimizer in state.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = optimizer.defaults["lr"] * model.learning_rate(state.step)
                for micro in range(config.accumulate):
                    batch = fabric.to_device(next(loader))
                    with fabric.autocast():
                        torch.set_autocast_cache_enabled(False)  # a GAN's first update would leave it out of date
                        losses = model.training_step(batch, _minimiser(fabric, state, config, micro))

                # The average follows the weights.
                if ema_decay is not None:
                    state.follow(ema_decay)
                state.step += 1
                under_way = state.step < config.steps

                # Record the losses, and what the monitor sees.
                if state.step % config.log_every_steps == 0 or not under_way:
                    state.note(_over_processes(losses, fabric), curves)
                    _require_finite(state)
                if monitor is not None and first and under_way and state.step % monitor.every_steps == 0:
                    state.note(_figures(model, monitor), curves)

                # Save the state; obey Ctrl-C and SIGTERM.
                if under_way and (stop.waits or state.step % config.checkpoint_every_steps == 0):
                    state.save(folder / PROGRESS_FILE, fabric)
                advance(1)
                if under_way and stop.waits:
                    raise KeyboardInterrupt

            # Leave the average of the weights in the model.
            with torch.no_grad():
                for tensor, mean in zip(state.tensors(), state.average or (), strict=False):
                    tensor.copy_(mean)
            model.finish()
        model.eval()
        figures = _figures(model, monitor) if monitor is not None and first else {}
        state.note(figures, curves)
    if first:
        write_csv(folder / "losses.csv", pd.DataFrame(state.rows, columns=["step", "name", "value"]))
    model.cpu()
    return figures


def _check(model: Trainable, config: TrainingConfig) -> None:
    """Raise ConfigError where a model cannot be trained in the way that is asked for."""
    name, slices = type(model).__name__, config.accumulate * config.devices * config.num_nodes
    if starts_processes(config):
        raise ConfigError(f"devices {config.devices}: {name} trains on one device; use 1")
    if config.batch_size % slices:
        raise ConfigError(
            f"batch_size {config.batch_size} cannot be shared among {slices} micro-batches; choose a multiple"
        )
    if config.accumulate > 1 and model.updates_itself:
        raise ConfigError(f"accumulate {config.accumulate}: {name} updates its weights itself; use 1")
    if config.gradient_clip and model.updates_itself:
        raise ConfigError(f"gradient_clip {config.gradient_clip:g}: {name} clips no gradients; use null")
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("accelerator gpu: this machine has none that torch can use; set it to auto or cpu")


def _fabric(config: TrainingConfig) -> Fabric:
    several = config.devices * config.num_nodes > 1  # a single process takes no notice of a cluster around it
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy="ddp" if several else "auto",
        precision=_precision(config),  # type: ignore[arg-type]
        plugins=TorchElasticEnvironment() if several else LightningEnvironment(),
    )
    fabric.launch()
    return fabric


def _precision(config: TrainingConfig) -> str:
    fast_bf16 = on_gpu(config) or torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - torch has no public name for it
    auto = "bf16-mixed" if fast_bf16 else "32-true"
    return {"auto": auto, "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[config.precision]


def fused_optimizers(config: TrainingConfig) -> bool:
    """Whether Adam may update all weights in one call; its gradients cannot be clipped in mixed precision."""
    return config.gradient_clip is None or _precision(config) == "32-true"


def _share_batch_statistics(model: nn.Module, fabric: Fabric) -> None:
    if fabric.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif fabric.is_global_zero and any(isinstance(part, _BatchNorm) for part in model.modules()):
        sys.stderr.write("notice: on CPUs, batch norm sees each process's part of the batch, not the whole batch\n")


def _minimiser(fabric: Fabric, state: _State, config: TrainingConfig, micro: int) -> Minimise:
    """Return what minimises a loss in a micro-batch; weights change after the last one."""

    def minimise(loss: Tensor, number: int = 0) -> None:
        optimizer = state.optimizers[number]
        with torch.autocast(fabric.device.type, enabled=False):
            if micro == 0:
                optimizer.zero_grad()
            fabric.backward(loss / config.accumulate)
            if micro < config.accumulate - 1:
                return
            average_gradients(weights for group in optimizer.param_groups for weights in group["params"])
            if config.gradient_clip:
                fabric.clip_gradients(state.model, optimizer, max_norm=config.gradient_clip, error_if_nonfinite=False)
            optimizer.step()

    return minimise


def _over_processes(losses: Mapping[str, Any], fabric: Fabric) -> dict[str, float]:
    values = {name: torch.as_tensor(value, dtype=torch.float32).to(fabric.device) for name, value in losses.items()}
    return {name: float(fabric.all_reduce(value.detach(), reduce_op="mean")) for name, value in values.items()}


def _require_finite(state: _State) -> None:
    for step, name, value in state.rows:
        if step == state.step and not math.isfinite(value):
            raise DivergenceError(f"step {step}: {name} is {value}; lower the learning rate")


def _figures(model: Trainable, monitor: Monitor) -> dict[str, float]:
    training = [part for part in model.modules() if part.training]
    model.eval()
    figures = {name: float(value) for name, value in monitor.measure().items()}
    for part in training:
        part.training = True
    return figures


@dataclass
class _State:
    """All that a training is resumed from."""

    model: Trainable
    optimizers: list[Any]
    average: list[Tensor] | None = None  # of weights and buffers
    step: int = 0
    rows: list[tuple[int, str, float]] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        return [tensor.detach() for tensor in (*self.model.parameters(), *self.model.buffers())]

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        assert self.average is not None
        # The first step sets the average, whatever the initial weights were.
        weight = 1.0 - min(decay, (1 + self.step) / (10 + self.step)) if self.step else 1.0
        for mean, value in zip(self.average, self.tensors(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, weight)
            else:
                mean.copy_(value)

    def note(self, values: Mapping[str, float], curves: Curves | None) -> None:
        self.rows += [(self.step, name, value) for name, value in values.items()]
        if curves is not None and values:
            curves.log(values, self.step)

    def save(self, file: Path, fabric: Fabric) -> None:
        if not fabric.is_global_zero:
            return
        parts = {"model": self.model, "scaler": fabric.strategy.precision}
        content = {"format": FORMAT, "step": self.step, "rows": self.rows, "average": self.average}
        content |= {name: part.state_dict() for name, part in parts.items()}
        content["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        buffer = io.BytesIO()  # torch's own writer hides that a disk is full
        torch.save(content, buffer)
        sweep(file)  # each as large as the whole
        with replacing(file) as partial:
            partial.write_bytes(buffer.getbuffer())

    def load(self, file: Path, fabric: Fabric) -> None:
        content = _read(file)
        if content is None:
            return
        self.step, self.rows = content["step"], [tuple(row) for row in content["rows"]]
        self.model.load_state_dict(content["model"])
        for optimizer, given in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(given)
        for mean, given in zip(self.average or (), content["average"] or (), strict=True):
            mean.copy_(given)
        fabric.strategy.precision.load_state_dict(content["scaler"])


def _read(file: Path) -> dict[str, Any] | None:
    """Read a state; None where there is none, or none that can be used, which is set aside and said."""
    if not file.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        if not _is_torn(file):
            reason = str(error).partition("\n")[0]
            raise StorageError(f"{file}: cannot be read ({reason}); it is left as it is, run the command again") from error
        fault = "torn"
    else:
        if isinstance(content, dict) and content.get("format") == FORMAT:
            return content
        fault = "of another version of counterstain"
    aside = file.with_name(f"{file.name}.set-aside")
    file.replace(aside)
    warnings.warn(f"{file}: is {fault}; it is now {aside.name}, and training starts anew", stacklevel=4)
    return None


def _is_torn(file: Path) -> bool:
    """Whether a state is no whole zip archive; a disk that cannot be read says nothing about it."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is not None
    except (zipfile.BadZipFile, EOFError):
        return True
    except OSError:
        return False


def forget_progress(folder: Path) -> None:
    """Delete the state of a training whose result is saved."""
    sweep(folder / PROGRESS_FILE)
    (folder / PROGRESS_FILE).unlink(missing_ok=True)


class _Parts(Dataset[Batch]):
    """Item m = the part of the batch of step ``m // accumulate`` that this device and micro-batch work on."""

    def __init__(self, batches: Batches, config: TrainingConfig, rank: int) -> None:
        self._batches, self._config, self._rank = batches, config, rank
        self._last: tuple[int, Batch] | None = None

    def __getitem__(self, item: int) -> Batch:
        config = self._config
        step, micro = divmod(item, config.accumulate)
        size = config.batch_size // (config.accumulate * config.devices * config.num_nodes)
        first = (self._rank * config.accumulate + micro) * size
        part = self._part(step, first, first + size)
        return part | {"step": torch.tensor(step), "position": torch.arange(first, first + size)}

    def _part(self, step: int, start: int, stop: int) -> Batch:
        if isinstance(self._batches, PatchBatches):
            return self._batches.part(step, start, stop)
        if self._last is None or self._last[0] != step:
            self._last = (step, self._batches(step))
        return {name: tensor[start:stop] for name, tensor in self._last[1].items()}

    def loader(self, step: int, fabric: Fabric) -> Iterator[Batch]:
        config = self._config
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(step * config.accumulate, config.steps * config.accumulate),
            num_workers=config.workers,
            worker_init_fn=_ignore_ctrl_c,
            pin_memory=fabric.device.type == "cuda",
        )
        return iter(loader)


def _ignore_ctrl_c(_worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the one that this process helps."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
            if signal.getsignal(number) not in {None, signal.SIG_IGN}:  # as a shell's background processes ignore Ctrl-C
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
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
