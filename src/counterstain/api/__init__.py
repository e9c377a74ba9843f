"""The verbs: every command of the command line as a function, with the same names and arguments.

The command line is built from these functions (:mod:`counterstain.cli.commands`): their signatures are its arguments
and options, their docstrings its help. So nothing heavy is imported before a function runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from counterstain.data.cohort import Cohort
    from counterstain.recipe import Recipe

PathLike = str | Path
Settings = Mapping[str, Any] | Sequence[str]  # {"spade.latent": 64}, {"spade": {"latent": 64}} or ["spade.latent=64"]
Numbers = str | Sequence[int]  # "6,12,24" or [6, 12, 24]


def assignments(settings: Settings | None) -> list[str]:
    """Return settings as ``KEY=VALUE``, whichever way they were given."""
    import json

    if settings is None:
        return []
    if not isinstance(settings, Mapping):
        return list(settings)
    return [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]


def numbers_of(text: Numbers | None, option: str) -> list[int] | None:
    """Return numbers that may have been typed with commas between them.

    Raises
    ------
    InputError
        Something between the commas is not a whole number.
    """
    from counterstain.errors import InputError

    if not isinstance(text, str):
        return None if text is None else list(text)
    try:
        return [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise InputError(f"--{option} {text}: expected numbers with commas between them, such as 1,2,3") from None


def open_cohort(cohort: PathLike | Cohort) -> Cohort:
    """Open a cohort, unless it is open already."""
    from counterstain.data.cohort import Cohort

    return cohort if isinstance(cohort, Cohort) else Cohort.open(Path(cohort))


def recipe_of(preset: str, config: PathLike | None, settings: Settings | None, logger: str | None = None) -> Recipe:
    """Build the recipe of a command: a preset, a file over it, single settings over both, a logger for every training.

    Raises
    ------
    ConfigError
        A setting is wrong, or the logger cannot be used.
    """
    from counterstain.recipe import load_recipe

    file, changes = None if config is None else Path(config), assignments(settings)
    recipe = load_recipe(preset, file, changes)
    if logger is None:
        return recipe
    check_logger(logger)
    trained = [name for name, part in recipe if hasattr(part, "training")]
    return load_recipe(preset, file, [*changes, *(f"{name}.training.logger={logger}" for name in trained)])


def check_logger(logger: str) -> str:
    """Return the name of a logger that can be used.

    Raises
    ------
    ConfigError
        There is no such logger, or its extra is not installed.
    """
    from importlib.util import find_spec

    from counterstain.errors import ConfigError

    if logger not in {"mlflow", "wandb"}:
        raise ConfigError(f"--logger {logger}: expected mlflow or wandb")
    if find_spec(logger) is None:
        raise ConfigError(f"--logger {logger}: not installed; run: pip install 'counterstain[{logger}]'")
    return logger
