"""The command that takes in weights of other projects: import weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from counterstain.cli.data import import_app

if TYPE_CHECKING:
    from counterstain.generators.published.imports import Facts

KINDS = ("spade", "autoencoder", "diffusion")
NOBODY = "none"


def register(_app: typer.Typer) -> None:
    """Add ``counterstain import weights``."""
    import_app.command("weights")(import_weights)


def import_weights(
    files: Annotated[list[Path], typer.Argument(help="latest_net_G.pth and _E, _D; or one model.ckpt.")],
    *,
    kind: Annotated[str, typer.Option(help="spade (of NVlabs), autoencoder or diffusion (of CompVis).")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    size: Annotated[int, typer.Option(help="Edge of the training patches in pixels.")],
    patients_seen: Annotated[
        str,
        typer.Option(
            help="none, or a file with a patient a line: whose tissue the weights were trained on. Their synthetic "
            "images are refused where one of them is validated or tested on.",
            metavar="none|FILE",
        ),
    ],
    taxonomy: Annotated[str | None, typer.Option(help="her2 or a YAML file: the labels, in order.")] = None,
    cohort: Annotated[Path | None, typer.Option(help="Cohort to take taxonomy and mpp from.")] = None,
    mpp: Annotated[float | None, typer.Option(help="Micrometres per pixel of the training images.")] = None,
    autoencoder: Annotated[
        Path | None, typer.Option(help="diffusion: checkpoint of the first stage, where FILES has none.")
    ] = None,
    averaged: Annotated[bool, typer.Option("--averaged", help="diffusion: the moving average of the weights.")] = False,
    preset: Annotated[str, typer.Option(help="Recipe for what weights do not tell: heads, noise, sampler.")] = "paper",
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="YAML with changes to the preset.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change over both.")
    ] = None,
) -> None:
    """Make a checkpoint of weights that others published; sizes of the networks are read off the weights."""
    from counterstain.errors import ConfigError
    from counterstain.generators.published import imports
    from counterstain.recipe import load_recipe

    if kind not in KINDS:
        raise ConfigError(f"--kind {kind}: expected one of {', '.join(KINDS)}")
    if kind != "diffusion" and (autoencoder is not None or averaged):
        raise ConfigError(f"--kind {kind}: --autoencoder and --averaged are for diffusion")
    recipe = load_recipe(preset, config, settings or ())
    facts = _facts(taxonomy, cohort, mpp, size, patients_seen)
    if kind == "spade":
        header = imports.import_spade(files, out, recipe.spade, facts)
    elif kind == "autoencoder":
        header = imports.import_autoencoder(files, out, recipe.autoencoder, facts)
    else:
        header = imports.import_diffusion(
            files, out, recipe.diffusion, facts,
            first_stage_config=recipe.autoencoder, autoencoder=autoencoder, averaged=averaged,
        )  # fmt: skip
    typer.echo(f"{out}: {kind} of {len(header.taxonomy.names)} subtypes, {header.size_px} px at {header.mpp} um/px")
    seen = len(header.patients_seen)
    typer.echo(f"it counts as trained on {seen} patients" if seen else "it counts as trained on no patient of yours")


def _facts(taxonomy: str | None, cohort: Path | None, mpp: float | None, size_px: int, patients_seen: str) -> Facts:
    from counterstain.data.cohort import Cohort
    from counterstain.errors import ConfigError
    from counterstain.generators.published.imports import Facts
    from counterstain.taxonomy import Taxonomy

    if taxonomy is None and cohort is None:
        raise ConfigError("the labels of the network are not known: give --taxonomy or --cohort")
    opened = Cohort.open(cohort) if cohort is not None else None
    spacing = mpp if mpp is not None else (opened.mpp if opened is not None else None)
    if spacing is None or spacing <= 0:
        raise ConfigError(f"--mpp {spacing}: give the micrometres per pixel of the training images, or --cohort")
    if size_px < 1:
        raise ConfigError(f"--size {size_px}: expected the edge of the training patches in pixels")
    seen = () if patients_seen == NOBODY else _patients(Path(patients_seen))
    if opened is not None and seen:
        known = set(opened.regions["patient"])
        typer.echo(f"{sum(patient in known for patient in seen)} of {len(seen)} patients seen are of {cohort}")
    labels = Taxonomy.load(taxonomy) if taxonomy is not None else opened.taxonomy if opened is not None else None
    assert labels is not None
    return Facts(taxonomy=labels, mpp=spacing, size_px=size_px, patients_seen=seen)


def _patients(path: Path) -> tuple[str, ...]:
    from counterstain.data.leakage import read_patients_seen
    from counterstain.errors import InputError

    try:
        return read_patients_seen(path)
    except InputError as error:
        raise InputError(f"--patients-seen {error}; say {NOBODY} if nobody of yours was seen") from error
