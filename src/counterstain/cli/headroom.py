"""The command that says what better data could win: headroom."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add ``counterstain headroom``."""
    app.command()(headroom)


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
    from counterstain.report.figure_headroom import headroom_figure
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
