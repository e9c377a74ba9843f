"""Where the curves of a training go while it runs: TensorBoard and CSV always, MLflow or Weights & Biases on demand.

Loggers are told what has been computed anyway, after it has been computed. So they change no result, and no setting of
theirs is part of what names a training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from counterstain.config import Config, ConfigT
from counterstain.errors import ConfigError
from counterstain.storage import fingerprint

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

LoggerName = Literal["mlflow", "wandb"]
LOG_FOLDER = "logs"
PROJECT = "counterstain"
Row = tuple[int, str, float]
"""Step, name, value."""


class Curves:
    """The loggers of one training.

    Parameters
    ----------
    folder : Path
        Of the training; event files and ``metrics.csv`` go to its ``logs``.
    label : str
        What the training is called.
    logger : str, optional
        One more: ``mlflow`` or ``wandb``.
    settings : Config, optional
        Of the training, shown by those two.
    earlier : iterable of (step, name, value)
        What was logged before the training was interrupted.

    Raises
    ------
    ConfigError
        The extra of the logger is not installed, or its server cannot be reached.
    """

    def __init__(
        self,
        folder: Path,
        label: str,
        *,
        logger: LoggerName | None = None,
        settings: Config | None = None,
        earlier: Iterable[Row] = (),
    ) -> None:
        from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

        logs = folder / LOG_FOLDER
        for old in (logs / "metrics.csv", *logs.glob("events.out.tfevents.*")):
            old.unlink(missing_ok=True)  # a killed process may have logged more than its last state knows
        self._loggers: list[Logger] = [
            TensorBoardLogger(folder, name="", version=LOG_FOLDER, default_hp_metric=False),
            CSVLogger(folder, name="", version=LOG_FOLDER, flush_logs_every_n_steps=1),
        ]
        self._run: Any = None
        if logger is not None:
            opened: Any = _opened(logger, folder, label, settings)
            if logger == "wandb":
                self._run = opened.experiment
            self._loggers.append(opened)
        # A resumed run of Weights & Biases has its earlier rows.
        _replay(self._loggers[:2] if logger == "wandb" else self._loggers, earlier)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step."""
        for logger in self._loggers:
            logger.log_metrics(dict(values), step)

    def close(self, status: Literal["success", "failed"]) -> None:
        """Write out what is still held in memory; nothing is logged after it."""
        for logger in self._loggers:
            logger.finalize(status)
        if self._run is not None:  # the next training of this process is another run
            self._run.finish(exit_code=int(status == "failed"))


def with_logger(config: ConfigT, logger: LoggerName | None) -> ConfigT:
    """Return the configuration of a network whose ``training`` has a logger."""
    old: Any = config
    training = old.training.model_copy(update={"logger": logger})
    return config.model_copy(update={"training": training})


def require_logger(logger: LoggerName) -> None:
    """Raise ConfigError unless the extra of a logger is installed."""
    if find_spec(logger) is None:
        raise ConfigError(f"--logger {logger}: is not installed; run: pip install 'counterstain[{logger}]'")


def _replay(loggers: Iterable[Logger], rows: Iterable[Row]) -> None:
    by_step: dict[int, dict[str, float]] = {}
    for step, name, value in rows:
        by_step.setdefault(step, {})[name] = value
    for logger in loggers:
        for step, values in by_step.items():
            logger.log_metrics(values, step)


def _opened(name: LoggerName, folder: Path, label: str, settings: Config | None) -> Logger:
    require_logger(name)
    try:
        logger = _OPEN[name](folder, label)
        logger.log_hyperparams({} if settings is None else settings.model_dump(mode="json"))
    except Exception as error:  # whatever a server or its client raises, the remedy is the same
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--logger {name}: cannot be used ({reason}); {_REMEDY[name]}") from error
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


_OPEN: dict[LoggerName, Callable[[Path, str], Logger]] = {"mlflow": _mlflow, "wandb": _wandb}
_REMEDY: dict[LoggerName, str] = {
    "mlflow": "set MLFLOW_TRACKING_URI to a server or a folder, or leave --logger out",
    "wandb": "run 'wandb login', set WANDB_MODE=offline, or leave --logger out",
}
