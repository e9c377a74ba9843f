"""The verbs: every command of the command line as a function, with the same names and arguments.

The command line is built from these functions (:mod:`counterstain.cli`): their signatures are its arguments
and options, their docstrings its help. So nothing heavy is imported before a function runs.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from counterstain.data.cohort import Cohort
    from counterstain.data.patch_set import PatchSet
    from counterstain.recipe import Recipe

from counterstain.remote import Place, RemoteFolder, on_disk, place_of

PathLike = str | Path
Settings = Mapping[str, Any] | Sequence[str]  # {"spade.latent": 64}, {"spade": {"latent": 64}} or ["spade.latent=64"]
Numbers = str | Sequence[int]  # "6,12,24" or [6, 12, 24]

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def verb(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """Check the arguments of a function against its annotations before it does anything.

    One text or path is taken for a list of one. For everything else that does not fit, ConfigError is raised in one
    line, before a folder is claimed.
    """

    @functools.wraps(function)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        signature = inspect.signature(function)
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}: {error}") from None
        for name, value in given.arguments.items():
            kinds = str(signature.parameters[name].annotation).split(" | ")
            given.arguments[name] = _fitting(value, kinds, f"{function.__name__}: {name}")
        return function(*given.args, **given.kwargs)

    return checked


def _listed(items: Any) -> list[Any]:
    return [items] if isinstance(items, str | os.PathLike) else list(items)


KINDS: dict[str, tuple[Any, Callable[[Any], Any], str]] = {  # of an annotation: types, what is made of it, in words
    "int": (Integral, int, "a whole number"),
    "float": (Real, float, "a number"),
    "bool": (bool, bool, "True or False"),
    "str": (str | os.PathLike, os.fspath, "text"),
    "PathLike": (str | os.PathLike | RemoteFolder, on_disk, "a path"),
    "Place": (str | os.PathLike | RemoteFolder, place_of, "a path or a URL"),
    "Numbers": (Iterable, lambda given: given, "whole numbers, such as [6, 12]"),
    "Mapping[str, str]": (Mapping, dict, "a mapping"),
    "Settings": (Iterable, lambda given: given if isinstance(given, Mapping) else _listed(given), "settings"),
    "Sequence[str]": (Iterable, _listed, "a list of names"),
    "Sequence[PathLike]": (Iterable | os.PathLike, _listed, "a list of paths"),
    "None": (type(None), lambda given: given, "None"),
}


def _fitting(value: Any, kinds: list[str], place: str) -> Any:
    """Return an argument as the function takes it; where a cohort may be given, so may a URL."""
    for kind in ["Place" if kind == "PathLike" and "Cohort" in kinds else kind for kind in kinds]:
        types, made, _ = KINDS.get(kind, (type(None), None, ""))
        if made is None and kind in {base.__name__ for base in type(value).__mro__}:  # a Cohort, a PatchSet
            return value
        if made is not None and isinstance(value, types) and (kind == "bool" or not isinstance(value, bool)):
            return made(value)
    from counterstain.errors import ConfigError

    expected = " or ".join(KINDS[kind][2] if kind in KINDS else f"a {kind}" for kind in kinds)
    shown = repr(value).partition("\n")[0]
    raise ConfigError(f"{place}: expected {expected} (got {shown:.80})")


def assignments(settings: Settings | None) -> list[str]:
    """Return settings as ``KEY=VALUE``, whichever way they were given."""
    import json

    if settings is None:
        return []
    if not isinstance(settings, Mapping):
        return [str(setting) for setting in settings]
    return [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]


def numbers_of(text: Numbers | None, option: str) -> list[int] | None:
    """Return numbers that may have been typed with commas between them.

    Raises InputError where something between the commas is not a whole number.
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

    return cohort if isinstance(cohort, Cohort) else Cohort.open(cohort)


def is_cohort(place: Path) -> bool:
    """Whether a folder holds a cohort, finished or not."""
    return any((place / name).exists() for name in ("cohort.json", "run.json"))


def folder_of(source: PathLike | Cohort | PatchSet) -> Place:
    """Return the folder or the URL of something that is open already or not."""
    return place_of(source) if isinstance(source, str | Place) else source.folder


def recipe_of(
    preset: str | None, config: PathLike | None, settings: Settings | None, logger: str | None = None
) -> Recipe:
    """Build the recipe of a command: a preset, a file over it, single settings over both, a logger for every training.

    Raises ConfigError where a setting is wrong, or the logger cannot be used.
    """
    from counterstain.recipe import DEFAULT_PRESET, load_recipe

    preset = DEFAULT_PRESET if preset is None else preset
    file, changes = None if config is None else Path(config), assignments(settings)
    recipe = load_recipe(preset, file, changes)
    if logger is None:
        return recipe
    check_logger(logger)
    trained = [name for name, part in recipe if hasattr(part, "training")]
    return load_recipe(preset, file, [*changes, *(f"{name}.training.logger={logger}" for name in trained)])


def check_logger(logger: str) -> str:
    """Return the name of a logger that can be used.

    Raises ConfigError where there is no such logger, or its extra is not installed.
    """
    from importlib.util import find_spec

    from counterstain.errors import ConfigError

    if logger not in {"mlflow", "wandb"}:
        raise ConfigError(f"--logger {logger}: expected mlflow or wandb")
    if find_spec(logger) is None:
        raise ConfigError(f"--logger {logger}: not installed; run: pip install 'counterstain[{logger}]'")
    return logger
