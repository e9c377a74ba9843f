"""The option --logger of commands that train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, get_args

import typer

if TYPE_CHECKING:
    from counterstain.config import ConfigT
    from counterstain.tracking import LoggerName


Logger = Annotated[
    str | None,
    typer.Option(help="Send curves to mlflow or wandb as well; TensorBoard and CSV are always written."),
]


def logged(config: ConfigT, logger: str | None) -> ConfigT:
    """Return what a network trains with, and a logger for its curves where one is asked for."""
    from counterstain.tracking import with_logger

    return config if logger is None else with_logger(config, checked(logger))


def checked(logger: str) -> LoggerName:
    """Return the name of a logger that can be used.

    Raises
    ------
    ConfigError
        There is no such logger, or its extra is not installed.
    """
    from counterstain.errors import ConfigError
    from counterstain.tracking import LoggerName, require_logger

    known: dict[str, LoggerName] = {name: name for name in get_args(LoggerName)}
    if logger not in known:
        raise ConfigError(f"--logger {logger}: expected one of {', '.join(known)}")
    require_logger(known[logger])
    return known[logger]
