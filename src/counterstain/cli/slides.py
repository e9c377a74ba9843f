"""Commands from whole slides to a cohort: import slides, import labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from counterstain.cli.data import import_app, print_imported

if TYPE_CHECKING:
    from counterstain.data.cohort import Cohort

FormatName = Annotated[str, typer.Option("--format", help="exact, qupath, asap or aperio.", metavar="FORMAT")]
TypesFile = Annotated[
    Path | None, typer.Option(help="EXACT: saved annotation types, where rows hold their numbers alone.")
]


def register(_app: typer.Typer) -> None:
    """Add the commands of this module to ``counterstain import``."""
    import_app.command("slides")(import_slides)
    import_app.command("labels")(import_labels)


def import_slides(
    slides: Annotated[Path, typer.Argument(help="Folder of slides, or one slide.", metavar="SLIDES")],
    *,
    annotations: Annotated[Path, typer.Option(help="Folder of annotation files, or one file.")],
    file_format: FormatName,
    labels: Annotated[Path, typer.Option(help="LABELS.yaml; 'counterstain import labels' writes a draft.")],
    mpp: Annotated[float, typer.Option(help="Micrometres per pixel of the cohort.")],
    out: Annotated[Path, typer.Option(help="Folder of the cohort.")],
    regions: Annotated[
        str | None,
        typer.Option(
            help="drawn: rectangles among the annotations; auto: placed on annotated tissue; or a CSV table.",
            show_default="drawn where LABELS.yaml names regions, else auto",
        ),
    ] = None,
    regions_per_slide: Annotated[int, typer.Option(help="--regions auto: how many at most.")] = 10,
    region_size_um: Annotated[float, typer.Option(help="--regions auto: edge in micrometres.")] = 1500.0,
    origin: Annotated[
        str | None,
        typer.Option(
            help="Annotations count from the corner of the whole canvas, or of the scanned area (bounds).",
            show_default="bounds for qupath, else canvas",
        ),
    ] = None,
    mpp_level0: Annotated[
        float | None,
        typer.Option("--mpp-level0", help="Micrometres per level-0 pixel, where files do not say.", show_default=False),
    ] = None,
    patients: Annotated[
        Path | None, typer.Option(help="CSV with slide, patient, perhaps score.", show_default="a patient per slide")
    ] = None,
    taxonomy: Annotated[
        str | None, typer.Option(help="her2 or a YAML file.", show_default="her2, or the subtypes of LABELS.yaml")
    ] = None,
    types: TypesFile = None,
) -> None:
    """Import whole slides and their annotations; the same command goes on if interrupted."""
    from counterstain.data.import_slides import import_slides as import_all
    from counterstain.progress import bar
    from counterstain.taxonomy import Taxonomy

    cohort = import_all(
        slides,
        annotations,
        file_format=_format(file_format),
        labels=labels,
        mpp=mpp,
        out=out,
        regions=regions,
        origin=origin,
        patients=patients,
        types=types,
        taxonomy=Taxonomy.load(taxonomy) if taxonomy else None,
        progress=bar,
        mpp_level0=mpp_level0,
        regions_per_slide=regions_per_slide,
        region_size_um=region_size_um,
    )
    _print_report(cohort)
    print_imported(cohort)


def import_labels(
    annotations: Annotated[
        Path, typer.Argument(help="Folder of annotation files, or one file.", metavar="ANNOTATIONS")
    ],
    *,
    file_format: FormatName,
    taxonomy: Annotated[str, typer.Option(help="her2 or a YAML file: names of subtypes are filled in.")] = "her2",
    types: TypesFile = None,
) -> None:
    """Print a draft of LABELS.yaml: every label of the annotations, to be given a meaning."""
    from counterstain.data.annotations import annotation_files, read_annotations
    from counterstain.data.labels import draft_labels
    from counterstain.taxonomy import Taxonomy

    known = _format(file_format)
    files = [read_annotations(path, known, types=types) for path in annotation_files(annotations, known)]
    typer.echo(draft_labels(files, Taxonomy.load(taxonomy)), nl=False)


def _format(name: str) -> Any:
    from counterstain.data.annotations import FORMATS
    from counterstain.errors import InputError

    if name not in FORMATS:
        raise InputError(f"--format {name}: unknown; expected {', '.join(FORMATS)}")
    return name


_LINES = {
    "repaired": "{} outlines crossed themselves and were mended",
    "cut_at_slide_edge": "{} annotations reach over the edge of their slide and were cut there",
    "cut_at_region_edge": "{} annotations reach over the edge of a region and were cut there",
    "outside_of_regions": "{} annotations lie outside of all regions",
    "hidden_or_smaller_than_a_pixel": "{} instances are hidden by others or smaller than a pixel",
    "background": "{} annotations are background",
    "ignored": "{} annotations are to be ignored",
    "regions_without_instance": "{} regions have no instance",
    "overlapping_regions": "{} pairs of regions overlap: what both show counts twice",
}


def _print_report(cohort: Cohort) -> None:
    from counterstain.storage import read_json

    report = read_json(cohort.folder / "import.json")
    typer.echo(f"annotations count from the corner of the {_CORNERS[report['origin']]} (--origin {report['origin']})")
    for name, line in _LINES.items():
        if report[name]:
            typer.echo(line.format(f"{report[name]:,}"))
    for reason, count in report["skipped"].items():
        typer.echo(f"left out: {count:,} x {reason}")
    for slide in report["slides_coarser_than_mpp"]:
        typer.secho(f"warning: slide {slide} was scanned coarser than {cohort.mpp:g} mpp", err=True, fg="yellow")
    typer.echo(f"overview pictures: {cohort.folder / 'overview'}")


_CORNERS = {"canvas": "whole canvas", "bounds": "scanned area"}
