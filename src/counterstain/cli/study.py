"""Commands that look at studies: study plan, study status, study clean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from counterstain.study.status import StudyState
from counterstain.cli.options import Logger, checked

File = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the study; out/<name of the file> if not given.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change to the study, e.g. repeats=2.")
]
SHOWN = 20


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
    from counterstain.study.plan import cells_of
    from counterstain.study.run import lacking
    from counterstain.study.status import cell_table, plan_tree, rows_of, state_of, what_it_takes

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
    from counterstain.study.status import failures, read_plan, running, stage_table, state_of, time_left

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
    from counterstain.study.config import load_study
    from counterstain.study.plan import cells_folder, cells_of
    from counterstain.study.run import leftovers, locked, remove
    from counterstain.study.status import size

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


# Commands that run studies: study run, demo.

MOST_DEMO_PROCESSES = 4  # no more than that can be busy for long, and each needs a gigabyte

StudySettings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change to the study, e.g. repeats=2.")
]


def run(
    file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Folder of the study; out/<name of the file> if not given.")] = None,
    executor: Annotated[str, typer.Option(help="Where cells run: local, or ray (a cluster).")] = "local",
    processes: Annotated[
        int | None, typer.Option(help="Processes on this machine, resources.threads each; none = one after another.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster that runs already, or auto; none = one on this machine alone.")
    ] = None,
    settings: StudySettings = None,
    logger: Logger = None,
) -> None:
    """Run a study and write its report.

    Interrupted or changed, the same command goes on: only what is not there yet is made.
    """
    from counterstain.config import build
    from counterstain.errors import ConfigError
    from counterstain.study.config import load_study
    from counterstain.study.executors import ExecutorConfig

    if (processes is not None and executor == "ray") or (address is not None and executor != "ray"):
        raise ConfigError("--processes goes with --executor local, --address with --executor ray")
    where = build(ExecutorConfig, {"kind": executor, "processes": processes, "address": address}, "--executor")
    changes = [*(settings or ()), *([] if logger is None else [f"resources.logger={checked(logger)}"])]
    _run_and_report(load_study(file, changes), out or Path("out") / file.stem, file, where)


def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("out/demo"),
    processes: Annotated[
        int | None, typer.Option(help="Processes of one thread each; one per core if not given.")
    ] = None,
    settings: StudySettings = None,
) -> None:
    """Run the whole of it in minutes on two CPU cores: phantom, generators, synthetic sets, segmenters, report."""
    import os
    from importlib import resources

    from counterstain.config import build
    from counterstain.study.config import load_study
    from counterstain.study.executors import ExecutorConfig

    # Networks as small as these gain next to nothing from a second thread.
    count = processes if processes is not None else min(os.cpu_count() or 1, MOST_DEMO_PROCESSES)
    where = build(ExecutorConfig, {"processes": count}, "--processes")

    with resources.as_file(resources.files("counterstain") / "presets" / "study_demo.yaml") as file:
        _run_and_report(load_study(file, settings or []), out, "demo", where)


def _run_and_report(study: object, out: Path, source: str | Path, executor: object = None) -> None:
    from counterstain.report.page import write_report
    from counterstain.study.config import StudyConfig
    from counterstain.study.executors import ExecutorConfig
    from counterstain.study.run import run_study

    assert isinstance(study, StudyConfig)
    assert executor is None or isinstance(executor, ExecutorConfig)
    results = run_study(study, out, source=source, executor=executor)
    _check_any(results)
    _print_results(results)
    typer.echo(f"report: {write_report(results.parent, command='study run')}")


def _check_any(results: Path) -> None:
    """Raise InputError where no arm has a result."""
    from counterstain.errors import InputError
    from counterstain.storage import read_json

    failed = read_json(results / "study.json")["failed"]
    if failed and (results / "results.csv").stat().st_size < 2:
        why = failed[0]["why"].partition("\n")[0]
        raise InputError(f"{results.parent}: no arm has a result; the first failure: {failed[0]['cell']}: {why}")


def _print_results(results: Path) -> None:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    rows = pd.read_csv(results / "results.csv")
    recalls = [c for c in rows.columns if c.startswith("recall_") and c != "recall_background"]
    columns = ["dice", "subtype_variance", *recalls]
    table = Table(title="test, mean over repeats; on the right the recall of each subtype", title_justify="left")
    for name in ("arm", "n", "Dice", "variance"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for name in (c.removeprefix("recall_") for c in recalls):
        table.add_column(name, justify="right", min_width=5)  # long names are wrapped, numbers need no more
    tested = rows[rows["split"] == "test"]
    for arm, group in tested.groupby("arm", sort=False):
        means = group[columns].mean()
        table.add_row(
            str(arm), str(len(group)), *(f"{means[c]:.{4 if c == 'subtype_variance' else 3}f}" for c in columns)
        )
    console = Console()
    console.print(table) if console.is_terminal else Console(width=120).print(table)


# The command that says what better data could win: headroom.


def headroom(
    cohort: Annotated[Path, typer.Argument(metavar="COHORT", help="Cohort with a split.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the trainings, the table and the figure.")],
    patients: Annotated[
        str | None,
        typer.Option(help="Numbers of training patients, such as 6,12,24.", show_default="all, half, a quarter, …"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Trainings at each number, with other patients and seeds.")] = 3,
    split: Annotated[str, typer.Option(help="val or test: what is tested on.")] = "val",
    preset: Annotated[str, typer.Option(help="demo, best or paper.")] = "best",
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Settings over the preset (YAML).")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting, for example segmenter.training.steps=500."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of patients and of the trainings.")] = 0,
) -> None:
    """Draw the learning curve of the baseline: where it is flat, no generator can help.

    Interrupted, the same command goes on.
    """
    from counterstain.config import build
    from counterstain.data.cohort import Cohort
    from counterstain.progress import bar
    from counterstain.recipe import load_recipe
    from counterstain.report.example_figures import headroom_figure
    from counterstain.report.figure_style import save_figure
    from counterstain.study.headroom import HeadroomConfig, measure_headroom, sizes_of

    chosen = {"patients": _numbers(patients), "repeats": repeats, "split": split, "seed": seed}
    wanted = build(HeadroomConfig, chosen, "headroom")
    opened = Cohort.open(cohort)
    opened.part("train"), opened.part(wanted.split)
    points = len(sizes_of(wanted, len(opened.patients("train")))) * repeats
    with bar("headroom", points) as advance:
        found = measure_headroom(
            opened, load_recipe(preset, config, settings or []), wanted, out, ran=lambda: advance(1)
        )
    figure = headroom_figure(found)
    for kind in ("svg", "png"):
        save_figure(figure, out / f"headroom.{kind}")
    for line in found.in_words():
        typer.echo(line)
    typer.echo(f"{out / 'headroom.csv'}, {out / 'headroom.svg'}; a study with fewer patients: cohort.train_patients")


def _numbers(text: str | None) -> list[int] | None:
    from counterstain.errors import InputError

    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"--patients {text}: expected numbers with commas between them, such as 6,12,24") from None


# Command from the results of a study to a page that says what they mean.


def report(
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
