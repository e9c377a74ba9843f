"""The command that makes procedural tissue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from counterstain.data.cohort import Cohort


def phantom(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new cohort.")],
    *,
    slides: Annotated[int, typer.Option(help="Slides, one per patient.")] = 40,
    regions: Annotated[int, typer.Option(help="Regions of every slide.")] = 10,
    size: Annotated[int, typer.Option(help="Edge of the square regions in pixels.")] = 256,
    mpp: Annotated[float, typer.Option(help="Micrometres per pixel.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Another number, another cohort.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, for example purity=0.97."),
    ] = None,
) -> None:
    """Make a cohort of procedural HER2 tissue with exact masks.

    Interrupted, the same command goes on; finished slides are kept.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from counterstain.config import build, parse_overrides
    from counterstain.data.phantom.render import write_phantom
    from counterstain.data.phantom.styles import PhantomConfig

    options = {"slides": slides, "regions_per_slide": regions, "size_px": size, "mpp": mpp, "seed": seed}
    config = build(PhantomConfig, options | parse_overrides(settings or []), "phantom")
    columns = (TextColumn("slides"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("slides", total=config.slides)
        cohort = write_phantom(config, out, lambda: progress.advance(task))
    tumour_px = int(cohort.instances["area_px"].sum())
    share = tumour_px / int((cohort.regions["height_px"] * cohort.regions["width_px"]).sum())
    typer.echo(
        f"{out}: {config.slides} slides, {len(cohort)} regions of {config.size_px} px at {config.mpp:g} mpp, "
        f"{len(cohort.instances)} instances, {share:.0%} tumour"
    )
    typer.echo(f"next: counterstain split {out}, then counterstain inspect {out}")


# Commands from tissue to a cohort: import, split, inspect.

CohortFolder = Annotated[Path, typer.Argument(help="Folder of the cohort.", metavar="COHORT")]


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
    from counterstain.io.import_table import import_table as import_rows
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
    from counterstain.data.cohort import Cohort, missing_subtypes
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
    from counterstain.data.cohort import missing_subtypes

    _print_parts(cohort)
    _print_subtypes(cohort)
    _print_warnings(missing_subtypes(cohort))
    unsplit = cohort.regions["split"].isna().all()
    typer.echo(f"next: counterstain {'split' if unsplit else 'inspect'} {cohort.folder}")


def _print_parts(cohort: Cohort) -> None:
    from counterstain.data.cohort import parts_table

    table = _table("part", "patients", "slides", "regions", "mm²")
    for row in parts_table(cohort).itertuples():
        table.add_row(str(row.part), f"{row.patients:,}", f"{row.slides:,}", f"{row.regions:,}", f"{row.area_mm2:,.3f}")
    _print(table)


def _print_subtypes(cohort: Cohort) -> None:
    from counterstain.data.cohort import subtypes_table

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


# The command that hands cohorts, synthetic sets and trained weights on: export.


def export(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A cohort, a synthetic set or the checkpoint of a generator.")
    ],
    *,
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="png: images, label images and a table; nnunet: a raw dataset of nnU-Net v2; "
            "hf: an image folder of Hugging Face's datasets; weights: a generator's checkpoint as NVlabs/SPADE or "
            "CompVis/latent-diffusion publish theirs.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the export; for nnunet …/Dataset001_NAME.")
    ],
    labels: Annotated[str, typer.Option(help="subtypes: a label for each; tumour: one label for all.")] = "subtypes",
    split: Annotated[
        list[str] | None, typer.Option(help="train, val or test; may be given twice.", show_default="everything")
    ] = None,
) -> None:
    """Export a cohort, a synthetic set or weights for other tools; the same command goes on if interrupted."""
    if file_format == "weights":
        _export_weights(source, out, labels, split)
        return
    from counterstain.config import build
    from counterstain.errors import ConfigError
    from counterstain.io.exports import ExportConfig
    from counterstain.io.exports import export as write
    from counterstain.progress import bar

    if file_format not in _NEXT:
        raise ConfigError(f"--format {file_format}: expected {', '.join(_NEXT)} or weights")
    settings = {"file_format": file_format, "labels": labels, "parts": tuple(dict.fromkeys(split or ()))}
    count = write(source, out, build(ExportConfig, settings, f"export of {source}"), progress=bar)
    typer.echo(f"{out}: {count:,} images")
    typer.echo(_NEXT[file_format].format(out=out))


def _export_weights(source: Path, out: Path, labels: str, split: list[str] | None) -> None:
    from counterstain.errors import ConfigError
    from counterstain.generators.published_weights import export_weights

    if labels != "subtypes" or split:
        raise ConfigError("--format weights: --labels and --split are for images")
    for file in export_weights(source, out):
        typer.echo(f"{file}")


_NEXT = {
    "png": "read back: counterstain import table {out}/table.csv --labels ids --taxonomy {out}/taxonomy.yaml --mpp …",
    "nnunet": "next: nnUNetv2_plan_and_preprocess -d NUMBER --verify_dataset_integrity, then copy "
    "{out}/splits_final.json beside the preprocessed data, so that training and validation are split by patient",
    "hf": 'read with: load_dataset("imagefolder", data_dir="{out}")',
}
