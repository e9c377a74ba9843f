"""Settings that all trainings share, and where their curves go: TensorBoard and CSV always, MLflow or W&B on demand.

Loggers are given what has been computed anyway, so they change no result and are no part of what names a training.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from counterstain.config import Config, ConfigT
from counterstain.errors import ConfigError
from counterstain.storage import LOG_FOLDER, fingerprint

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

LoggerName = Literal["mlflow", "wandb"]
PROJECT = "counterstain"
REMEDIES: dict[LoggerName, str] = {
    "mlflow": "set MLFLOW_TRACKING_URI to a server or a folder, or leave --logger out",
    "wandb": "run 'wandb login', set WANDB_MODE=offline, or leave --logger out",
}


class TrainingConfig(Config):
    """How long and on what a model trains."""

    steps: Annotated[int, Field(ge=1)]
    """Optimiser steps."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Patches per optimiser step, over all devices and micro-batches together."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches that make up one optimiser step."""
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """Arithmetic; ``auto`` is bf16 autocast on a GPU and on CPUs with bf16 units, otherwise fp32. On GPUs, products of
    fp32 numbers are TF32."""
    compile: bool = False
    """Compile the networks with torch.compile, which needs a C++ compiler; off because it cost 89 s on an H200 and
    brought the denoiser no speed, though less memory (docs/performance.md)."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device type."""
    devices: Annotated[int, Field(ge=1)] = 1
    """Devices per node, a process for each. The batch is shared among them and its losses are those of the whole
    batch, as are the statistics of batch norm on GPUs, so that their number changes results by rounding alone."""
    num_nodes: Annotated[int, Field(ge=1)] = 1
    """Nodes; more than one are started with torchrun."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes that prepare batches beside the training, per device; their number changes no result. ``auto`` is 0 on
    two cores or fewer, otherwise 1 for a CPU, and for a GPU all cores but one, at most 6."""
    checkpoint_every_steps: Annotated[int, Field(ge=1)] = 500
    """Steps that a kill can cost at most; Ctrl-C and SIGTERM cost none on one device."""
    log_every_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between points of the loss curves."""
    gradient_clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient."""
    logger: Annotated[LoggerName | None, Field(exclude=True)] = None
    """Where curves go beside TensorBoard and CSV; changes no result, so it is no part of what is saved or compared."""

    @property
    def parts(self) -> int:
        """Parts that a batch is cut into: micro-batches of all devices."""
        return self.accumulate * self.devices * self.num_nodes

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.batch_size % self.parts:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared among {self.parts} micro-batches; choose a multiple"
            )
        return self


def identity_of(config: Config) -> dict[str, Any]:
    """Return the settings that tell the training of a network from others: all that may change its result.

    They are those of earlier versions, in which there were no workers by default and nothing was compiled: trainings
    and studies that were begun then go on.
    """
    settings = config.model_dump(mode="json")
    training = settings.get("training")
    if isinstance(training, dict):
        training["workers"] = 0
        if not training["compile"]:
            del training["compile"]
    return settings


def with_training(config: ConfigT, changes: Mapping[str, Any]) -> ConfigT:
    """Return the configuration of a network with some settings of its ``training`` changed."""
    old: Any = config
    return config.model_copy(update={"training": old.training.model_copy(update=dict(changes))})


def require_logger(logger: LoggerName) -> None:
    """Raise ConfigError unless the extra of a logger is installed."""
    if find_spec(logger) is None:
        raise ConfigError(f"--logger {logger}: is not installed; run: pip install 'counterstain[{logger}]'")


class Curves:
    """The loggers of one training; event files and ``metrics.csv`` go to its folder ``logs``.

    ``earlier`` has what was logged before an interruption, as (step, name, value); it is logged again.

    Raises ConfigError where the extra of the third logger is not installed, or its server cannot be reached.
    """

    def __init__(
        self,
        folder: Path,
        label: str,
        logger: LoggerName | None = None,
        settings: Config | None = None,
        earlier: Iterable[tuple[int, str, float]] = (),
    ) -> None:
        from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

        for events in (folder / LOG_FOLDER).glob("events.out.tfevents.*"):
            events.unlink()  # a killed process may have logged more than its last state knows
        csv = CSVLogger(folder, name="", version=LOG_FOLDER, flush_logs_every_n_steps=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it replaces metrics.csv, which is wanted
            csv.experiment  # noqa: B018 - opens the file
        self._loggers: list[Any] = [
            csv,
            TensorBoardLogger(folder, name="", version=LOG_FOLDER, default_hp_metric=False),
            *([_opened(logger, folder, label, settings)] if logger else ()),
        ]
        self._wandb_run = self._loggers[-1].experiment if logger == "wandb" else None
        by_step: dict[int, dict[str, float]] = {}
        for step, name, value in earlier:
            by_step.setdefault(step, {})[name] = value
        for target in self._loggers[:2] if logger == "wandb" else self._loggers:  # W&B kept its rows
            for step, values in by_step.items():
                target.log_metrics(values, step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step."""
        for logger in self._loggers:
            logger.log_metrics(dict(values), step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for logger in self._loggers:
            logger.finalize("failed" if kind else "success")
        if self._wandb_run is not None:  # the next training of this process is another run
            self._wandb_run.finish(exit_code=int(kind is not None))


def _opened(name: LoggerName, folder: Path, label: str, settings: Config | None) -> Logger:
    require_logger(name)
    try:
        logger = OPENERS[name](folder, label)
        logger.log_hyperparams({} if settings is None else settings.model_dump(mode="json"))
    except Exception as error:  # whatever a server or its client raises, the remedy is the same
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--logger {name}: cannot be used ({reason}); {REMEDIES[name]}") from error
    return logger


def _mlflow(folder: Path, label: str) -> Logger:
    from lightning.pytorch.loggers import MLFlowLogger

    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    server = os.environ.get("MLFLOW_TRACKING_URI")
    return MLFlowLogger(experiment, run_name=label, tracking_uri=server, tags={"folder": str(folder.resolve())})


def _wandb(folder: Path, label: str) -> Logger:
    from lightning.pytorch.loggers import WandbLogger

    identity = fingerprint(str(folder.resolve()))[:16]
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    logger = WandbLogger(name=label, save_dir=folder / LOG_FOLDER, project=project, id=identity, resume="allow")
    assert logger.experiment is not None  # begins the run
    return logger


OPENERS: dict[LoggerName, Callable[[Path, str], Logger]] = {"mlflow": _mlflow, "wandb": _wandb}
