"""Commands made from functions of :mod:`counterstain.api`: the signature gives the options, the docstring the help.

Positional parameters become arguments, keyword-only ones options. Annotations are read as text, so that no module with
heavy imports is loaded for ``--help``.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import counterstain
from counterstain.cli.terminal import warn
from counterstain.errors import CounterstainWarning

Verb = Callable[..., Any]
Show = Callable[[Any, dict[str, Any]], None]

OPTIONS = {"settings": "--set"}  # where an option has another name than its parameter
METAVARS = {"settings": "KEY=VALUE", "config": "FILE", "patients_seen": "none|FILE"}
TYPES: dict[str, Any] = {
    "PathLike": Path,
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "Numbers": str,
    "Settings": list[str],
    "Sequence[str]": list[str],
    "Sequence[PathLike]": list[Path],
}
PARAMETERS = re.compile(r"Parameters\n-+\n(.*?)(?:\n\w+\n---|\Z)", re.DOTALL)
PARAMETER = re.compile(r"^(\w[\w, ]*?)(?: : .*)?\n((?:    .+\n?)+)", re.MULTILINE)
SAME_AS = re.compile(r"As for :func:`(\w+)`\.")


def command_of(verb: Verb, show: Show) -> Callable[..., None]:
    """Return the function that Typer makes a command of.

    Parameters
    ----------
    verb : callable
        A function with a numpydoc docstring.
    show : callable
        Prints what came of it: ``show(result, arguments)``.
    """
    signature = list(inspect.signature(verb).parameters.values())
    positional = [p.name for p in signature if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    documentation, described = inspect.getdoc(verb) or "", descriptions_of(verb)

    def command(**arguments: Any) -> None:
        options = dict(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("always", CounterstainWarning)
            warnings.showwarning = _print_warning
            result = verb(*[options.pop(name) for name in positional], **options)
        show(result, arguments)

    parameters = [_parameter(p, described[p.name]) for p in signature]
    command.__name__ = verb.__name__
    command.__doc__ = documentation.partition("\nParameters\n---")[0].strip()
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def descriptions_of(verb: Verb) -> dict[str, str]:
    """Return what a docstring says of each parameter; ``As for :func:`train`.`` refers to another public function."""
    found = PARAMETERS.search(inspect.getdoc(verb) or "")
    described: dict[str, str] = {}
    for names, text in PARAMETER.findall(found[1] + "\n") if found else ():
        other = SAME_AS.match(text.strip())
        others = descriptions_of(getattr(counterstain, other[1])) if other else {}
        described |= {name: others.get(name, " ".join(text.split())) for name in names.split(", ")}
    return described


_show_warning = warnings.showwarning


def _print_warning(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    """Print our own warnings as one line each, others as Python does."""
    if issubclass(category, CounterstainWarning):
        warn(str(message))
    else:
        _show_warning(message, category, *where, **options)


def _parameter(parameter: inspect.Parameter, text: str) -> inspect.Parameter:
    """Return a parameter as Typer reads it."""
    kind = TYPES[str(parameter.annotation).split(" | ")[0]]
    optional = parameter.default is None
    name = parameter.name
    info: Any
    if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
        info = typer.Argument(metavar=name.upper(), help=text)
    else:
        option = OPTIONS.get(name, f"--{name.replace('_', '-')}")
        info = typer.Option(option, metavar=METAVARS.get(name), help=text)
    annotation: Any = Annotated[(kind | None) if optional else kind, info]
    return parameter.replace(annotation=annotation, kind=inspect.Parameter.KEYWORD_ONLY)
