"""Command from the results of a study to a page that says what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("report")(_report)


def _report(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Folder of a study that has run.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="FOLDER", help="The same: a run, or its results folder.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The file to write (default: RUN/report.html).")] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", metavar="DIR", help="Write each figure there as well, as SVG and PNG.")
    ] = None,
    tables: Annotated[
        Path | None, typer.Option("--tables", metavar="DIR", help="Write the tables there as well, as CSV and LaTeX.")
    ] = None,
) -> None:
    """Write one self-contained page with the figures, tables and finding of a study."""
    from counterstain.errors import InputError
    from counterstain.report.files import write_figures, write_tables
    from counterstain.report.page import write_report

    if (run is None) == (source is None):
        raise InputError("report: give one folder of a study, either as RUN or with --from")
    results = run or source or Path()
    typer.echo(f"report: {write_report(results, out)}")
    if figures is not None:
        typer.echo(f"figures: {len(write_figures(results, figures))} files in {figures}")
    if tables is not None:
        typer.echo(f"tables: {len(write_tables(results, tables))} files in {tables}")
