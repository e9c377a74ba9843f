"""Commands that train generators and draw synthetic sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from counterstain.cli.options import Logger, logged

if TYPE_CHECKING:
    from counterstain.data.cohort import Cohort
    from counterstain.generators.interface import ImageGenerator
    from counterstain.recipe import Recipe


CohortArgument = Annotated[Path, typer.Argument(metavar="COHORT", help="A cohort with a split.")]
Preset = Annotated[str, typer.Option(help="Recipe to start from: paper, best or demo.")]
DrawingPreset = Annotated[
    str | None,
    typer.Option(help="Recipe to draw by: paper, best or demo.", show_default="what the checkpoint was trained with"),
]
MethodName = Annotated[str, typer.Option(help="How to draw: spade, diffusion, inpainting or oracle (phantoms only).")]
Checkpoint = Annotated[Path | None, typer.Option(help="Checkpoint to draw with; none for the oracle.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML with changes to the preset.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change over both, e.g. spade.latent=64.")
]
Seed = Annotated[int, typer.Option(help="Another number, other random choices.")]
Init = Annotated[Path | None, typer.Option(help="Checkpoint whose weights it starts from.", show_default="none")]


def train_spade(
    cohort: CohortArgument,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    preset: Preset = "best",
    config: ConfigFile = None,
    settings: Settings = None,
    seed: Seed = 0,
    logger: Logger = None,
    init: Init = None,
) -> None:
    """Train SPADE with its VAE."""
    from counterstain.data.cohort import Cohort
    from counterstain.generators.train import train_spade as train
    from counterstain.recipe import load_recipe

    recipe = load_recipe(preset, config, settings or ())
    train(Cohort.open(cohort), logged(recipe.spade, logger), out, size_px=recipe.size_px, seed=seed, init=init)
    _print_warnings(out)
    typer.echo(f"{out}: SPADE is trained; draw with: counterstain synthesize {cohort} --method spade --generator {out}")


def train_autoencoder(
    cohort: CohortArgument,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    preset: Preset = "best",
    config: ConfigFile = None,
    settings: Settings = None,
    seed: Seed = 0,
    logger: Logger = None,
    init: Init = None,
) -> None:
    """Train the first stage of latent diffusion."""
    from counterstain.data.cohort import Cohort
    from counterstain.generators.train import train_autoencoder as train
    from counterstain.recipe import load_recipe

    recipe = load_recipe(preset, config, settings or ())
    train(Cohort.open(cohort), logged(recipe.autoencoder, logger), out, size_px=recipe.size_px, seed=seed, init=init)
    typer.echo(f"{out}: the autoencoder is trained; next: counterstain train diffusion {cohort} --autoencoder {out}")


def train_judge(
    cohort: CohortArgument,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    preset: Preset = "best",
    config: ConfigFile = None,
    settings: Settings = None,
    seed: Seed = 0,
    logger: Logger = None,
) -> None:
    """Train the network that says which subtype generated tissue looks like."""
    from counterstain.audit.judge import train_judge as train
    from counterstain.data.cohort import Cohort
    from counterstain.recipe import load_recipe

    recipe = load_recipe(preset, config, settings or ())
    train(Cohort.open(cohort), logged(recipe.judge, logger), out, size_px=recipe.size_px, seed=seed)
    typer.echo(f"{out}: the judge is trained; next: counterstain audit SET --cohort {cohort} --judge {out} --out DIR")


def train_diffusion(
    cohort: CohortArgument,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    autoencoder: Annotated[Path, typer.Option(help="Checkpoint of 'train autoencoder'.")],
    preset: Preset = "best",
    config: ConfigFile = None,
    settings: Settings = None,
    seed: Seed = 0,
    logger: Logger = None,
    init: Init = None,
) -> None:
    """Train latent diffusion, for whole images and for inpainting."""
    from counterstain.data.cohort import Cohort
    from counterstain.generators.train import train_diffusion as train
    from counterstain.recipe import load_recipe

    recipe = load_recipe(preset, config, settings or ())
    train(
        Cohort.open(cohort),
        logged(recipe.diffusion, logger),
        out,
        autoencoder=autoencoder,
        size_px=recipe.size_px,
        seed=seed,
        init=init,
    )
    typer.echo(
        f"{out}: diffusion is trained; draw with: counterstain synthesize {cohort} --method diffusion --generator {out}"
    )


def _print_warnings(checkpoint: Path) -> None:
    from counterstain.checkpoints import read_header

    for warning in read_header(checkpoint).notes.get("warnings", ()):
        typer.secho(f"warning: {warning}", err=True, fg=typer.colors.YELLOW)


def train_distilled(
    cohort: CohortArgument,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    teacher: Annotated[Path, typer.Option(help="Checkpoint of 'train diffusion'.")],
    preset: Preset = "best",
    config: ConfigFile = None,
    settings: Settings = None,
    seed: Seed = 0,
    logger: Logger = None,
) -> None:
    """Teach a diffusion checkpoint to draw in few steps (progressive distillation), its guidance included."""
    from counterstain.data.cohort import Cohort
    from counterstain.errors import ConfigError
    from counterstain.generators.train import train_distilled as train
    from counterstain.recipe import load_recipe

    distillation = load_recipe(preset, config, settings or ()).distillation
    if distillation is None:
        raise ConfigError("distillation: null; give its settings, for example --set distillation.training.steps=1000")
    train(Cohort.open(cohort), logged(distillation, logger), out, teacher=teacher, seed=seed)
    typer.echo(
        f"{out}: draws in {distillation.steps} steps; "
        f"next: counterstain synthesize {cohort} --method diffusion --generator {out}"
    )


def synthesize(
    cohort: CohortArgument,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the synthetic set.")],
    method: MethodName,
    count: Annotated[int, typer.Option(help="Patches to draw; a finished set can be given a larger count.")],
    generator: Checkpoint = None,
    size_px: Annotated[
        int | None,
        typer.Option(
            min=32,
            help="Edge of the patches; diffusion draws any size.",
            show_default="as the checkpoint, or the recipe",
        ),
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw again what this judge takes for another subtype.")
    ] = None,
    agreement: Annotated[
        float, typer.Option(help="With --judge: share of an image's instances that it must agree on.")
    ] = 0.75,
    preset: DrawingPreset = None,
    config: ConfigFile = None,
    settings: Settings = None,
    seed: Seed = 0,
) -> None:
    """Give the instances of real masks new subtypes and draw an image for each new mask.

    Interrupted, the same command goes on; finished shards are kept.
    """
    from counterstain.audit.instance_predictions import JudgeFilter
    from counterstain.audit.judge_config import JudgeFilterConfig
    from counterstain.config import build
    from counterstain.synthesis.synthesize import synthesize as draw

    tissue, drawer, recipe = opened(cohort, method, generator, preset=preset, config=config, settings=settings)
    size_px = size_px or recipe.size_px
    chosen = None
    if judge is not None:
        chosen = JudgeFilter.load(
            judge, tissue, build(JudgeFilterConfig, {"agreement": agreement}, "--agreement"), size_px=size_px
        )
    found = draw(drawer, tissue, out, recipe.synthesis, count=count, size_px=size_px, seed=seed, judge=chosen)
    assert found is not None
    _print_balance(out, found)


def opened(
    cohort: Path,
    method: str,
    checkpoint: Path | None,
    *,
    preset: str | None,
    config: Path | None,
    settings: list[str] | None,
) -> tuple[Cohort, ImageGenerator, Recipe]:
    """Open a cohort, a generator and the recipe that it draws by."""
    from counterstain.data.cohort import Cohort
    from counterstain.generators.interface import load_generator
    from counterstain.generators.methods import METHODS
    from counterstain.recipe import drawing_recipe

    entry = METHODS.named(method, "--method")
    recipe = drawing_recipe(entry, checkpoint, preset=preset, file=config, overrides=settings or ())
    tissue = Cohort.open(cohort)
    return tissue, load_generator(method, checkpoint, tissue, recipe.drawing(entry)), recipe


def _print_balance(out: Path, found: object) -> None:
    from rich.console import Console
    from rich.table import Table

    from counterstain.data.patch_set import PatchSet

    assert isinstance(found, PatchSet)
    table = Table(title=f"{out}: {len(found)} patches ({found.header.method})", title_justify="left")
    for column in (
        "subtype",
        "instances before",
        "instances",
        "share",
        "area before (px)",
        "area (px)",
        "share of area",
    ):
        table.add_column(column, justify="left" if column == "subtype" else "right")
    balance = found.balance()
    totals = balance[["instances", "area_px"]].sum()
    for row in balance.itertuples():
        table.add_row(
            str(row.subtype),
            f"{row.instances_before}",
            f"{row.instances}",
            f"{row.instances / max(totals['instances'], 1):.1%}",
            f"{row.area_px_before:,}",
            f"{row.area_px:,}",
            f"{row.area_px / max(totals['area_px'], 1):.1%}",
        )
    Console().print(table)
    drawn = int(found.patches["attempts"].sum())
    typer.echo(f"{drawn} images drawn, {drawn - len(found.patches)} refused by the filter")


# The command that shows what a generator makes of every subtype: preview.


def preview(
    cohort: CohortArgument,
    *,
    out: Annotated[Path, typer.Option(help="Picture to write (svg, png or pdf).")],
    method: MethodName,
    generator: Checkpoint = None,
    per_subtype: Annotated[int, typer.Option(min=1, max=20, help="Training patches of each subtype.")] = 2,
    size_px: Annotated[
        int | None, typer.Option(min=32, help="Edge of the patches.", show_default="as the checkpoint, or the recipe")
    ] = None,
    preset: DrawingPreset = None,
    config: ConfigFile = None,
    settings: Settings = None,
    seed: Seed = 0,
) -> None:
    """Look at a generator: training patches of every subtype, redrawn as every subtype from the same noise."""
    from counterstain.report.example_figures import redrawn_as_every_subtype
    from counterstain.report.figure_style import figure_kind, save_figure
    from counterstain.synthesis.preview import preview as redrawn

    figure_kind(out)
    tissue, drawer, recipe = opened(cohort, method, generator, preset=preset, config=config, settings=settings)
    size_px = size_px or recipe.size_px
    rows = redrawn(drawer, tissue, recipe.synthesis, size_px=size_px, seed=seed, per_subtype=per_subtype)
    save_figure(redrawn_as_every_subtype(rows, tissue.taxonomy, mpp=tissue.mpp), out)
    typer.echo(f"{out}: {len(rows)} patches, each redrawn as {len(rows[0].drawn)} subtypes")


# The command that draws whole regions anew: redraw.


def redraw(
    cohort: CohortArgument,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the new cohort.")],
    method: MethodName,
    generator: Checkpoint = None,
    region: Annotated[
        list[str] | None,
        typer.Option(help="Name of a training region; may be given again.", show_default="all training regions"),
    ] = None,
    preset: DrawingPreset = None,
    config: ConfigFile = None,
    settings: Settings = None,
    seed: Seed = 0,
) -> None:
    """Give the instances of whole training regions new subtypes and draw the regions, of any size, as a new cohort.

    Interrupted, the same command goes on; finished regions are kept.
    """
    from counterstain.synthesis.redraw import redraw_regions

    tissue, drawer, recipe = opened(cohort, method, generator, preset=preset, config=config, settings=settings)
    drawn = redraw_regions(drawer, tissue, out, recipe.synthesis, seed=seed, regions=region or ())
    typer.echo(f"{out}: {len(drawn)} regions")
    typer.echo(f"images with masks: counterstain export {out} --format png --out …; look: counterstain inspect {out}")
