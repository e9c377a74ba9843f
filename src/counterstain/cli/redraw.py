"""The command that draws whole regions anew: redraw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from counterstain.cli.generators import (
    CohortArgument,
    ConfigFile,
    Preset,
    Seed,
    Settings,
    opened_generator,
    require_method,
)


def register(app: typer.Typer) -> None:
    """Add ``counterstain redraw``."""
    app.command()(redraw)


def redraw(
    cohort: CohortArgument,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the new cohort.")],
    method: Annotated[str, typer.Option(help="diffusion, inpainting, or oracle (phantoms only).")],
    generator: Annotated[Path | None, typer.Option(help="Checkpoint to draw with; none for the oracle.")] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(help="Name of a training region; may be given again.", show_default="all training regions"),
    ] = None,
    preset: Preset = "best",
    config: ConfigFile = None,
    settings: Settings = None,
    seed: Seed = 0,
) -> None:
    """Give the instances of whole training regions new subtypes and draw the regions, of any size, as a new cohort.

    Interrupted, the same command goes on; finished regions are kept.
    """
    from counterstain.data.cohort import Cohort
    from counterstain.generators.redraw import redraw_regions
    from counterstain.recipe import load_recipe

    require_method(method)
    recipe = load_recipe(preset, config, settings or ())
    opened = Cohort.open(cohort)
    drawer, header = opened_generator(method, generator, opened, recipe)
    drawn = redraw_regions(drawer, opened, out, recipe.synthesis, seed=seed, regions=region or (), header=header)
    typer.echo(f"{out}: {len(drawn)} regions")
    typer.echo(f"images with masks: counterstain export {out} --format png --out …; look: counterstain inspect {out}")
