"""Commands that run studies: study run, demo; those that look at them are in study_state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from counterstain.cli import study_state
from counterstain.cli.tracking import Logger, checked

MOST_DEMO_PROCESSES = 4  # no more than that can be busy for long, and each needs a gigabyte

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change to the study, e.g. repeats=2.")
]


def register(app: typer.Typer) -> None:
    """Add ``counterstain study …`` and ``counterstain demo``."""
    study = typer.Typer(no_args_is_help=True, help="Arms x repeats over shared generators and synthetic sets.")
    study.command("run")(run)
    study_state.register(study)
    app.add_typer(study, name="study")
    app.command()(demo)


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
    settings: Settings = None,
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
    settings: Settings = None,
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
