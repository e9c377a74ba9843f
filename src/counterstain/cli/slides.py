"""Commands from whole slides to a cohort: import slides, import labels, import exact."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from counterstain.cli.data import print_imported

if TYPE_CHECKING:
    from counterstain.data.cohort import Cohort

FormatName = Annotated[str, typer.Option("--format", help="exact, qupath, asap or aperio.", metavar="FORMAT")]
TypesFile = Annotated[
    Path | None, typer.Option(help="EXACT: saved annotation types, where rows hold their numbers alone.")
]


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
        Path | None,
        typer.Option(help="CSV with slide, patient, perhaps score and mpp_level0.", show_default="a patient per slide"),
    ] = None,
    taxonomy: Annotated[
        str | None, typer.Option(help="her2 or a YAML file.", show_default="her2, or the subtypes of LABELS.yaml")
    ] = None,
    types: TypesFile = None,
) -> None:
    """Import whole slides and their annotations; the same command goes on if interrupted."""
    from counterstain.io.import_slides import import_slides as import_all
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
    from counterstain.io.annotations import annotation_files, files_of_other_formats, read_annotations
    from counterstain.io.labels import draft_labels
    from counterstain.taxonomy import Taxonomy

    known = _format(file_format)
    files = [read_annotations(path, known, types=types) for path in annotation_files(annotations, known)]
    _warn_of_other_formats([path.name for path in files_of_other_formats(annotations, known)])
    typer.echo(draft_labels(files, Taxonomy.load(taxonomy)), nl=False)


def import_exact(
    *,
    server: Annotated[str, typer.Option(help="Address of the server, https://…", metavar="URL")],
    out: Annotated[Path, typer.Option(help="JSON file, for 'counterstain import slides --format exact'.")],
    image_set: Annotated[int | None, typer.Option(help="Number of the image set.")] = None,
    images: Annotated[str | None, typer.Option(help="Numbers of images, such as 1,2,3.")] = None,
    ca_file: Annotated[
        Path | None, typer.Option(help="Certificates to trust (PEM), for a server of your own institution.")
    ] = None,
) -> None:
    """Fetch annotations from an EXACT server and save them.

    Credentials come from the environment: EXACT_TOKEN, or EXACT_USERNAME and EXACT_PASSWORD.
    """
    from counterstain.config import build
    from counterstain.errors import InputError
    from counterstain.io.annotations.exact_server import ExactServer, fetch_exact
    from counterstain.storage import write_json

    if out.suffix != ".json" or out.is_dir():
        raise InputError(f"--out {out}: expected the name of a file that ends in .json")
    chosen = {"image_set": image_set, "images": _numbers(images), "ca_file": ca_file}
    fetched = fetch_exact(build(ExactServer, {"url": server, **chosen}, "import exact"), told=_tell)
    write_json(out, fetched)
    typer.echo(f"{out}: {fetched['count']:,} annotations")
    typer.echo(f"next: counterstain import labels {out} --format exact > LABELS.yaml")


def _numbers(text: str | None) -> tuple[int, ...]:
    from counterstain.errors import InputError

    try:
        return tuple(int(number) for number in (text or "").split(",") if number.strip())
    except ValueError:
        raise InputError(f"--images {text}: expected numbers with commas between them, such as 1,2,3") from None


def _tell(done: int, images: int) -> None:
    """Say how far it is, over one line of a terminal; a log file gets the end alone."""
    if sys.stderr.isatty() or done == images:
        sys.stderr.write(f"\rimages: {done:,} of {images:,}" + ("\n" if done == images else ""))


def _format(name: str) -> Any:
    from counterstain.errors import InputError
    from counterstain.io.annotations import FORMATS

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
    _warn_of_other_formats(report["files_of_other_formats"])
    for slide in report["slides_coarser_than_mpp"]:
        typer.secho(f"warning: slide {slide} was scanned coarser than {cohort.mpp:g} mpp", err=True, fg="yellow")
    typer.echo(f"overview pictures: {cohort.folder / 'overview'}")


def _warn_of_other_formats(names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        typer.secho(f"warning: {names[0]}{more}: of another format, left out", err=True, fg="yellow")


_CORNERS = {"canvas": "whole canvas", "bounds": "scanned area"}
