"""The command that shows what a generator makes of every subtype: preview."""

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
    """Add ``counterstain preview``."""
    app.command()(preview)


def preview(
    cohort: CohortArgument,
    *,
    out: Annotated[Path, typer.Option(help="Picture to write (svg, png or pdf).")],
    method: Annotated[str, typer.Option(help="spade, diffusion, inpainting, or oracle (phantoms only).")],
    generator: Annotated[Path | None, typer.Option(help="Checkpoint to draw with; none for the oracle.")] = None,
    per_subtype: Annotated[int, typer.Option(min=1, max=20, help="Training patches of each subtype.")] = 2,
    size_px: Annotated[
        int | None, typer.Option(min=32, help="Edge of the patches.", show_default="as in the recipe")
    ] = None,
    preset: Preset = "best",
    config: ConfigFile = None,
    settings: Settings = None,
    seed: Seed = 0,
) -> None:
    """Look at a generator: training patches of every subtype, redrawn as every subtype from the same noise."""
    from counterstain.data.cohort import Cohort
    from counterstain.generators.preview import preview as redrawn
    from counterstain.recipe import load_recipe
    from counterstain.report.figure_examples import redrawn_as_every_subtype
    from counterstain.report.figure_style import figure_kind, save_figure

    figure_kind(out)
    require_method(method)
    recipe = load_recipe(preset, config, settings or ())
    opened = Cohort.open(cohort)
    drawer, header = opened_generator(method, generator, opened, recipe)
    rows = redrawn(
        drawer,
        opened,
        recipe.synthesis,
        size_px=size_px or recipe.size_px,
        seed=seed,
        per_subtype=per_subtype,
        header=header,
    )
    save_figure(redrawn_as_every_subtype(rows, opened.taxonomy, mpp=opened.mpp), out)
    typer.echo(f"{out}: {len(rows)} patches, each redrawn as {len(rows[0].drawn)} subtypes")
