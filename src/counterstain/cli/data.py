"""Commands from tissue to a cohort: import, split, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from counterstain.data.cohort import Cohort

CohortFolder = Annotated[Path, typer.Argument(help="Folder of the cohort.", metavar="COHORT")]

import_app = typer.Typer(help="Import tissue and its annotations into a cohort.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(import_app, name="import")
    app.command("split")(split)
    app.command("inspect")(inspect)


@import_app.command("table")
def import_table(
    table: Annotated[Path, typer.Argument(help="CSV with columns image, label, patient, subtype.", metavar="TABLE")],
    *,
    mpp: Annotated[float, typer.Option(help="Micrometres per pixel of the images.")],
    out: Annotated[Path, typer.Option(help="Folder of the cohort.")],
    taxonomy: Annotated[
        str | None,
        typer.Option(help="her2 or a YAML file; without it, the subtypes of the table.", show_default=False),
    ] = None,
    tissue_class: Annotated[str, typer.Option(help="What all subtypes are, where no taxonomy is given.")] = "tumour",
    labels: Annotated[
        str, typer.Option(help="mask: tissue class above the threshold; ids: a subtype's id in every pixel.")
    ] = "mask",
    threshold: Annotated[int, typer.Option(help="Masks: values above it are tissue class.")] = 127,
    shrink: Annotated[int, typer.Option(help="Shrink images by this whole number; 2 makes 0.5 of 0.25 um.")] = 1,
    min_area_px: Annotated[int, typer.Option(help="Smaller components become background.")] = 0,
    image_column: Annotated[str, typer.Option(help="Column of the image files.")] = "image",
    label_column: Annotated[str, typer.Option(help="Column of the label images.")] = "label",
    patient_column: Annotated[str, typer.Option(help="Column of the patients.")] = "patient",
    subtype_column: Annotated[str, typer.Option(help="Column of the subtypes (masks need it).")] = "subtype",
    slide_column: Annotated[str, typer.Option(help="Column of the slides (optional).")] = "slide",
    part_column: Annotated[str, typer.Option(help="Column of train, val and test (optional).")] = "part",
    score_column: Annotated[str, typer.Option(help="Column of the slides' scores (optional).")] = "score",
    region_column: Annotated[str, typer.Option(help="Column of the regions' names (optional).")] = "region",
) -> None:
    """Import pairs of an image and a label image that a CSV table lists; the same command goes on if interrupted."""
    from counterstain.data.import_table import import_table as import_rows
    from counterstain.progress import bar
    from counterstain.taxonomy import Taxonomy

    columns = {
        "image": image_column,
        "label": label_column,
        "patient": patient_column,
        "subtype": subtype_column,
        "slide": slide_column,
        "part": part_column,
        "score": score_column,
        "region": region_column,
    }
    cohort = import_rows(
        table,
        mpp=mpp,
        out=out,
        taxonomy=Taxonomy.load(taxonomy) if taxonomy else None,
        progress=bar,
        tissue_class=tissue_class,
        labels=labels,
        threshold=threshold,
        shrink=shrink,
        min_area_px=min_area_px,
        columns=columns,
    )
    _print_import(cohort)


def split(
    folder: CohortFolder,
    *,
    train: Annotated[float, typer.Option(help="Patients to train on: a number, or a share of all.")] = 0.6,
    val: Annotated[float, typer.Option(help="Patients to tune with.")] = 0.2,
    test: Annotated[float, typer.Option(help="Patients of the final evaluation.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Another seed deals the patients out in another way.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a split that is there already.")] = False,
) -> None:
    """Split a cohort by patient, each part with its share of every score."""
    from counterstain.config import build
    from counterstain.data.cohort import Cohort
    from counterstain.data.split import SplitConfig, split_cohort

    config = build(SplitConfig, {"train": train, "val": val, "test": test, "seed": seed}, "split")
    cohort, warnings = split_cohort(Cohort.open(folder), config, force=force)
    _print_parts(cohort)
    _print_warnings(warnings)


def inspect(
    folder: CohortFolder,
    out: Annotated[
        Path | None, typer.Option(help="Figure (svg, png or pdf).", show_default="COHORT/composition.svg")
    ] = None,
) -> None:
    """Print and draw what a cohort is made of, by part and subtype."""
    from counterstain.data.cohort import Cohort
    from counterstain.data.composition import missing_subtypes
    from counterstain.data.split import check_disjoint
    from counterstain.report.figure_style import figure_kind, save_figure
    from counterstain.report.figures import composition

    figure_path = out or folder / "composition.svg"
    figure_kind(figure_path)
    cohort = Cohort.open(folder)
    check_disjoint(cohort)
    _print_parts(cohort)
    _print_subtypes(cohort)
    _print_warnings(missing_subtypes(cohort))
    save_figure(composition(cohort.composition(), cohort.taxonomy, mpp=cohort.mpp), figure_path)
    typer.echo(f"figure: {figure_path}")


def _print_import(cohort: Cohort) -> None:
    from counterstain.storage import read_json

    report = read_json(cohort.folder / "import.json")
    if report["masks_of_0_and_1"]:
        typer.echo("no mask goes above 1: taken as masks of 0 and 1, the threshold is not used")
    if report["dropped_components"]:
        typer.echo(f"dropped {report['dropped_components']} components of {report['dropped_px']} px in all")
    if report["regions_without_instance"]:
        typer.echo(f"{report['regions_without_instance']} regions have no instance")
    print_imported(cohort)


def print_imported(cohort: Cohort) -> None:
    """Print what a fresh cohort is made of, what it lacks and what to do next."""
    from counterstain.data.composition import missing_subtypes

    _print_parts(cohort)
    _print_subtypes(cohort)
    _print_warnings(missing_subtypes(cohort))
    unsplit = cohort.regions["split"].isna().all()
    typer.echo(f"next: counterstain {'split' if unsplit else 'inspect'} {cohort.folder}")


def _print_parts(cohort: Cohort) -> None:
    from counterstain.data.composition import parts_table

    table = _table("part", "patients", "slides", "regions", "mm²")
    for row in parts_table(cohort).itertuples():
        table.add_row(str(row.part), f"{row.patients:,}", f"{row.slides:,}", f"{row.regions:,}", f"{row.area_mm2:,.3f}")
    _print(table)


def _print_subtypes(cohort: Cohort) -> None:
    from counterstain.data.composition import subtypes_table

    table = _table("part", cohort.taxonomy.tissue_class, "slides", "instances", "share", "mm²", "share", words=2)
    for part, rows in subtypes_table(cohort).groupby("part", sort=False):
        for number, row in enumerate(rows.itertuples()):
            table.add_row(
                str(part) if number == 0 else "", str(row.subtype), f"{row.slides:,}",
                f"{row.instances:,}", f"{row.instance_share:.1%}", f"{row.area_mm2:,.3f}", f"{row.area_share:.1%}",
            )  # fmt: skip
        table.add_section()
    _print(table)


def _table(*columns: str, words: int = 1) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < words else "right", no_wrap=True)
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    Console(width=None if Console().is_terminal else 120).print(table)


def _print_warnings(warnings: list[str]) -> None:
    for warning in warnings:
        typer.secho(f"warning: {warning}", err=True, fg=typer.colors.YELLOW)
