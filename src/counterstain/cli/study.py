"""Commands that run studies: study run, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change to the study, e.g. repeats=2.")
]


def register(app: typer.Typer) -> None:
    """Add ``counterstain study …`` and ``counterstain demo``."""
    study = typer.Typer(no_args_is_help=True, help="Arms x repeats over shared generators and synthetic sets.")
    study.command("run")(run)
    study.command("plan")(plan)
    app.add_typer(study, name="study")
    app.command()(demo)


def run(
    file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Folder of the study; out/<name of the file> if not given.")] = None,
    settings: Settings = None,
) -> None:
    """Run a study and write its report.

    Interrupted or changed, the same command goes on: only what is not there yet is made.
    """
    from counterstain.study.config import load_study

    _run_and_report(load_study(file, settings or []), out or Path("out") / file.stem, file)


def plan(
    file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Folder of the study; out/<name of the file> if not given.")] = None,
    settings: Settings = None,
) -> None:
    """Print the cells of a study, what is done and what is left."""
    from rich.console import Console
    from rich.table import Table

    from counterstain.study.config import load_study
    from counterstain.study.plan import cells_folder, plan_study
    from counterstain.study.stages import is_done

    study = load_study(file, settings or [])
    root = cells_folder(out or Path("out") / file.stem)
    table = Table("cell", "state", "folder")
    cells = plan_study(study, study.resolved_recipe(file))
    for cell in cells:
        table.add_row(cell.name, "done" if is_done(cell, root) else "to do", cell.folder)
    Console().print(table)
    done = sum(is_done(cell, root) for cell in cells)
    typer.echo(f"{len(cells)} cells, {done} done, {len(cells) - done} left")


def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("out/demo"),
    settings: Settings = None,
) -> None:
    """Run the whole of it in minutes on two CPU cores: phantom, generators, synthetic sets, segmenters, report."""
    from importlib import resources

    from counterstain.study.config import load_study

    with resources.as_file(resources.files("counterstain") / "presets" / "study_demo.yaml") as file:
        _run_and_report(load_study(file, settings or []), out, "demo")


def _run_and_report(study: object, out: Path, source: str | Path) -> None:
    from counterstain.report.page import write_report
    from counterstain.study.config import StudyConfig
    from counterstain.study.run import run_study

    assert isinstance(study, StudyConfig)
    results = run_study(study, out, source=source)
    _print_results(results)
    typer.echo(f"report: {write_report(results.parent)}")


def _print_results(results: Path) -> None:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    rows = pd.read_csv(results / "results.csv")
    recalls = [c for c in rows.columns if c.startswith("recall_") and c != "recall_background"]
    columns = ["dice", "subtype_variance", *recalls]
    table = Table(title="test, mean over repeats; on the right the recall of each subtype", title_justify="left")
    for name in ("arm", "n", "Dice", "variance", *(c.removeprefix("recall_") for c in recalls)):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    tested = rows[rows["split"] == "test"]
    for arm, group in tested.groupby("arm", sort=False):
        means = group[columns].mean()
        table.add_row(
            str(arm), str(len(group)), *(f"{means[c]:.{4 if c == 'subtype_variance' else 3}f}" for c in columns)
        )
    console = Console()
    console.print(table) if console.is_terminal else Console(width=120).print(table)
