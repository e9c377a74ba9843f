"""The command that makes procedural tissue."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add ``counterstain phantom``."""
    app.command()(phantom)


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
    from counterstain.data.phantom import PhantomConfig, write_phantom

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
