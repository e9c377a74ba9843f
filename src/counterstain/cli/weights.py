"""The command that takes in weights of other projects: import weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from counterstain.generators.published_weights import Facts


KINDS = ("spade", "autoencoder", "diffusion")
NOBODY = "none"


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
    from counterstain.generators import published_weights
    from counterstain.recipe import load_recipe

    if kind not in KINDS:
        raise ConfigError(f"--kind {kind}: expected one of {', '.join(KINDS)}")
    if kind != "diffusion" and (autoencoder is not None or averaged):
        raise ConfigError(f"--kind {kind}: --autoencoder and --averaged are for diffusion")
    recipe = load_recipe(preset, config, settings or ())
    facts = _facts(taxonomy, cohort, mpp, size, patients_seen)
    if kind == "spade":
        header = published_weights.import_spade(files, out, recipe.spade, facts)
    elif kind == "autoencoder":
        header = published_weights.import_autoencoder(files, out, recipe.autoencoder, facts)
    else:
        header = published_weights.import_diffusion(
            files, out, recipe.diffusion, facts,
            first_stage_config=recipe.autoencoder, autoencoder=autoencoder, averaged=averaged,
        )  # fmt: skip
    typer.echo(f"{out}: {kind} of {len(header.taxonomy.names)} subtypes, {header.size_px} px at {header.mpp} um/px")
    seen = len(header.patients_seen)
    typer.echo(f"it counts as trained on {seen} patients" if seen else "it counts as trained on no patient of yours")


def _facts(taxonomy: str | None, cohort: Path | None, mpp: float | None, size_px: int, patients_seen: str) -> Facts:
    from counterstain.data.cohort import Cohort
    from counterstain.errors import ConfigError
    from counterstain.generators.published_weights import Facts
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
    from counterstain.data.split import read_patients_seen
    from counterstain.errors import InputError

    try:
        return read_patients_seen(path)
    except InputError as error:
        raise InputError(f"--patients-seen {error}; say {NOBODY} if nobody of yours was seen") from error


# The command that says what this machine has: versions, device, weights that can be had.

PACKAGES = (
    "counterstain", "torch", "torchvision", "lightning", "diffusers", "segmentation-models-pytorch", "zarr",
    "openslide-python", "tifffile", "shapely", "lpips",
)  # fmt: skip


def doctor() -> None:
    """Say which versions, which device and which pre-trained weights this machine has."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "found", "means", title="counterstain doctor", title_justify="left")
    for row in (*_versions(), *_machine(), *_weights()):
        table.add_row(*row)
    Console().print(table)


def _versions() -> list[tuple[str, str, str]]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    rows = [("python", platform.python_version(), "")]
    for package in PACKAGES:
        try:
            rows.append((package, version(package), ""))
        except PackageNotFoundError:
            rows.append((package, "not installed", "optional: perceptual loss of the autoencoder"))
    return rows


def _machine() -> list[tuple[str, str, str]]:
    import os
    import shutil
    from pathlib import Path

    import torch

    rows = [("CPU cores", str(os.cpu_count()), f"torch uses {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        rows.append(("GPU", f"{torch.cuda.get_device_name()}, {memory:.0f} GB", "precision auto = bf16"))
    else:
        fast = torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - torch has no public name for it
        rows.append(("GPU", "none", f"precision auto = {'bf16' if fast else 'fp32'} on this CPU; use --preset demo"))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    rows.append(("disk", f"{free:.0f} GB free here", "" if free > 10 else "little room for a study"))
    return rows


def _weights() -> list[tuple[str, str, str]]:
    from pathlib import Path

    import torch

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    rows = []
    for network, pattern, used, remedy in (
        ("VGG19, ImageNet", "vgg19-*.pth", "SPADE's perceptual loss", "spade.vgg_weights=FILE or spade.vgg_weight=0"),
        ("VGG16, ImageNet", "vgg16-*.pth", "LPIPS", "autoencoder.lpips_weights=FILE or autoencoder.lpips_weight=0"),
        ("ResNet-34, ImageNet", "resnet34-*.pth", "segmenter", "segmenter.encoder_weights=FILE or null"),
    ):
        found = sorted(cache.glob(pattern))
        where = found[0].name if found else "not in the cache"
        meaning = (
            f"for the {used}" if found else f"for the {used}: fetched on first use; without a network --set {remedy}"
        )
        rows.append((network, where, meaning))
    return rows
