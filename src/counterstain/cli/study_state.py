"""Commands that look at studies: study plan, study status, study clean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from counterstain.study.state import StudyState

File = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the study; out/<name of the file> if not given.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change to the study, e.g. repeats=2.")
]
SHOWN = 20


def register(study: typer.Typer) -> None:
    """Add the commands to ``counterstain study``."""
    study.command("plan")(plan)
    study.command("status")(status)
    study.command("clean")(clean)


def plan(
    file: File,
    *,
    out: Out = None,
    cells: Annotated[bool, typer.Option("--cells", help="A line for every cell, with its folder.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Estimate the time for so many cells at once.")] = 1,
    settings: Settings = None,
) -> None:
    """Print what a study is made of, what is done, what is left, and what it will take. Runs nothing."""
    from counterstain.study.config import load_study
    from counterstain.study.needs import lacking
    from counterstain.study.sharding import cells_of
    from counterstain.study.state import rows_of, state_of
    from counterstain.study.state_text import cell_table, plan_tree, what_it_takes

    study = load_study(file, settings or [])
    recipe, run = study.resolved_recipe(file), out or Path("out") / file.stem
    planned = cells_of(study, recipe)
    state = state_of(run, rows_of(planned))
    _print(cell_table(state) if cells else plan_tree(state, study.name))
    typer.echo(what_it_takes(state, run, processes))
    for line in lacking(recipe, (cell for cell in planned if state.states[cell.folder] != "done")):
        typer.echo(f"not yet on this machine: {line}")


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the study (--out of study run).")],
) -> None:
    """Print what is done, runs, failed and is left of a study; from any process, also while it runs."""
    from counterstain.study.state import read_plan, state_of
    from counterstain.study.state_text import failures, running, stage_table, time_left

    state = state_of(run, read_plan(run))
    _print(stage_table(state))
    for line in (*running(state, SHOWN), *failures(state, SHOWN)):
        typer.echo(line)
    typer.echo(time_left(state, _slots(state)))


def clean(
    file: File,
    *,
    out: Out = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print only.")] = False,
    settings: Settings = None,
) -> None:
    """Delete the folders of cells that the study's plan no longer refers to, after asking."""
    from counterstain.errors import InputError
    from counterstain.storage import claim, stage_of
    from counterstain.study.clean import leftovers, remove
    from counterstain.study.config import load_study
    from counterstain.study.plan import cells_folder
    from counterstain.study.run import locked
    from counterstain.study.sharding import cells_of
    from counterstain.study.state_text import size

    study = load_study(file, settings or [])
    run = out or Path("out") / file.stem
    if stage_of(run) != "study":
        raise InputError(f"{run}: not the folder of a study; give the one of 'study run' with --out")
    claim(run, "study", {"name": study.name})  # or else everything would be left over
    with locked(run):
        planned = {cell.folder for cell in cells_of(study, study.resolved_recipe(file))}
        found = leftovers(cells_folder(run), planned)
        for leftover in found:
            typer.echo(f"{size(leftover.size_bytes):>10}  {leftover.folder.name}")
        total = f"{len(found)} folders, {size(sum(leftover.size_bytes for leftover in found))}"
        if not found:
            typer.echo("nothing to delete: the plan refers to every cell")
        elif dry_run:
            typer.echo(f"{total} would be deleted")
        elif yes or typer.confirm(f"Delete {total}?"):
            remove(found)
            typer.echo(f"{total} deleted")


def _slots(state: StudyState) -> int:
    return int(state.journal.study["slots"]) if state.journal.study else 1


def _print(what: object) -> None:
    from rich.console import Console

    console = Console()
    console.print(what) if console.is_terminal else Console(width=120).print(what)
