"""Text, tables and warnings on a terminal, which names from files of others cannot steer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import typer

STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return text in which the characters that steer a terminal are written out, as Python writes them."""
    return STEERING.sub(lambda sign: repr(sign[0])[1:-1], text)


def echo(text: str, *, nl: bool = True, err: bool = False) -> None:
    """Print text that may hold names from files of others."""
    typer.echo(printable(text), nl=nl, err=err)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, words: int = 1
) -> None:
    """Print a table; the first ``words`` columns are text, the others are numbers. An empty row draws a line.

    Text of the first two columns is never broken into lines.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for number, column in enumerate(columns):
        text = number < words
        table.add_column(column, justify="left" if text else "right", overflow="fold", no_wrap=text and number < 2)
    for row in rows:
        table.add_row(*row) if row else table.add_section()
    print_rich(table)


def print_rich(what: object) -> None:
    """Print a table or tree as wide as the terminal, or 120 columns into a file."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        """Takes what stands in cells for nothing but text."""

        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options | {"markup": False, "emoji": False})

    console = PlainConsole()
    (console if console.is_terminal else PlainConsole(width=120)).print(what)


def warn(line: str) -> None:
    """Print a warning to standard error."""
    typer.secho(printable(f"warning: {line}"), err=True, fg=typer.colors.YELLOW)
