"""Cohorts: make a phantom, discover subtypes, split, inspect, export."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterstain.api import PathLike, Settings, assignments, folder_of, open_cohort, verb
from counterstain.errors import ConfigError, CounterstainWarning, InputError
from counterstain.remote import on_disk

if TYPE_CHECKING:
    import pandas as pd

    from counterstain.data.cohort import Cohort
    from counterstain.data.patch_set import PatchSet
    from counterstain.discovery.discover import Discovery
    from counterstain.remote import Place

EXPORT_FORMATS = ("png", "nnunet", "hf", "huggingface", "qupath", "ome-zarr")
CORRECTIONS, STAINS, MOST_FOUND = ("tissue", "none"), ("dab", "eosin"), 20
CHECKPOINT_FORMATS = ("weights", "diffusers", "smp")


@verb
def make_phantom(
    out: PathLike,
    *,
    slides: int = 40,
    regions: int = 10,
    size_px: int = 256,
    mpp: float = 1.0,
    seed: int = 0,
    settings: Settings | None = None,
) -> Cohort:
    """Make a cohort of procedural HER2 tissue with exact masks.

    If interrupted, the same command continues; finished slides are kept.

    Parameters
    ----------
    out : str or Path
        Folder of the new cohort.
    slides : int
        Slides, one per patient.
    regions : int
        Regions of every slide.
    size_px : int
        Edge of the square regions in pixels.
    mpp : float
        Micrometres per pixel.
    seed : int
        Another number makes another cohort.
    settings : mapping or sequence of str, optional
        Any other setting, for example purity=0.97.
    """
    from counterstain.config import build, parse_overrides
    from counterstain.data.phantom import write_phantom
    from counterstain.data.phantom.styles import PhantomConfig
    from counterstain.progress import bar

    options = {"slides": slides, "regions_per_slide": regions, "size_px": size_px, "mpp": mpp, "seed": seed}
    config = build(PhantomConfig, options | parse_overrides(assignments(settings)), "phantom")
    with bar("phantom", config.slides) as advance:
        return write_phantom(config, Path(out), lambda: advance(1))


@verb
def split(
    cohort: PathLike | Cohort,
    *,
    train: float = 0.6,
    val: float = 0.2,
    test: float = 0.2,
    seed: int = 0,
    force: bool = False,
) -> Cohort:
    """Split a cohort by patient, each split with its share of every score.

    Parameters
    ----------
    cohort : str, Path or Cohort
        Folder of the cohort.
    train : float
        Patients to train on: a number, or a share of all.
    val : float
        Patients to tune with.
    test : float
        Patients of the final evaluation.
    seed : int
        Another seed deals the patients out differently.
    force : bool
        Replace a split that is there already.
    """
    from counterstain.config import build
    from counterstain.data.cohort import Cohort
    from counterstain.data.split import SplitConfig, split_cohort

    config = build(SplitConfig, {"train": train, "val": val, "test": test, "seed": seed}, "split")
    if not isinstance(cohort, Cohort):
        on_disk(cohort)
    parted, problems = split_cohort(open_cohort(cohort), config, force=force)
    for problem in problems:
        warnings.warn(problem, CounterstainWarning, stacklevel=3)
    return parted


@verb
def inspect(cohort: PathLike | Cohort, *, out: PathLike | None = None) -> pd.DataFrame:
    """Show what a cohort is made of, by split and subtype, as a table and a figure.

    Parameters
    ----------
    cohort : str, Path or Cohort
        Folder of the cohort.
    out : str or Path, optional
        Figure (svg, png or pdf) [default: COHORT/composition.svg; of a URL, NAME-composition.svg here].

    Returns
    -------
    pandas.DataFrame
        A row per split and subtype: slides, instances and area, with their shares.
    """
    from counterstain.data.cohort import subtypes_table
    from counterstain.data.composition import missing_subtypes
    from counterstain.data.split import check_disjoint
    from counterstain.report.figures import figure_kind, save_figure
    from counterstain.report.patch_figures import composition

    opened = open_cohort(cohort)
    figure = Path(out or composition_file(opened))
    figure_kind(figure)
    check_disjoint(opened)
    for problem in missing_subtypes(opened):
        warnings.warn(problem, CounterstainWarning, stacklevel=3)
    save_figure(composition(opened.composition(), opened.taxonomy, mpp=opened.mpp), figure)
    return subtypes_table(opened)


def composition_file(cohort: Cohort) -> Path:
    """Return where the figure of a cohort goes."""
    place = cohort.folder
    return place / "composition.svg" if isinstance(place, Path) else Path(f"{place.name}-composition.svg")


@verb
def discover(
    cohort: PathLike | Cohort,
    *,
    out: PathLike,
    k: str | int = "auto",
    names: str | None = None,
    features: str = "stains",
    weights: PathLike | None = None,
    correction: str = "tissue",
    ignore_below: float = 0.0,
    stain: str | None = None,
    device: str = "auto",
    seed: int = 0,
) -> Discovery:
    """Find subtypes that nobody annotated, and write them as a cohort with a picture of each.

    Instances are clustered by what they look like; subtypes that the cohort has already are compared with at the end.
    Of a split cohort, clusters are fitted on training patients alone. The new cohort shares the pixels of the first,
    which must stay where it is. The same command with other --names or --ignore-below writes it anew in a moment.

    Parameters
    ----------
    cohort : str, Path or Cohort
        Folder of a cohort with one class, or with any subtypes.
    out : str or Path
        Folder of the new cohort, with instances.csv and sheet.png.
    k : str or int
        How many subtypes: a number, or auto, the largest that resampled patients confirm.
    names : str, optional
        A name for each cluster, from the palest on, with commas between them; clusters of one name become one, those
        called ignore are left out [default: those given before, or found 1, found 2, ...].
    features : str
        What instances are described by: stains (and nuclei), the folder of a judge, timm:NAME or timm:FOLDER.
    weights : str or Path, optional
        State dict of timm:NAME; nothing is downloaded for it.
    correction : str
        tissue: take off what a slide's non-tumour tissue shares with its tumour; none: as it is.
    ignore_below : float
        Instances less certain than this, 0 to 1, are to be ignored.
    stain : str, optional
        As for :func:`audit`.
    device : str
        Where a network runs: auto, cpu or cuda.
    seed : int
        Of the clusters and of resampling.
    """
    from counterstain.data.stains import check_stains, stain_shares, stained_windows
    from counterstain.discovery.discover import discover_subtypes, open_network
    from counterstain.progress import bar

    number = None if k == "auto" else int(k) if str(k).isdecimal() else 0
    if number is not None and not 2 <= number <= MOST_FOUND:
        raise ConfigError(f"--k {k}: expected auto, or a number from 2 to {MOST_FOUND}")
    for option, value, expected in (("correction", correction, CORRECTIONS), ("stain", stain or "dab", STAINS)):
        if value not in expected:
            raise ConfigError(f"--{option} {value}: expected {' or '.join(expected)}")
    if not 0 <= ignore_below < 1:
        raise ConfigError(f"--ignore-below {ignore_below:g}: expected 0 to 1, 1 excluded")
    opened = open_cohort(cohort)
    check_stains(opened, [] if stain is None else [("stain", stain)])
    shown = stain or stain_shares(patch.image for patch in stained_windows(opened)).stain or "dab"
    return discover_subtypes(
        opened,
        Path(out),
        k=number,
        stain="eosin" if shown == "eosin" else "dab",
        network=open_network(features, None if weights is None else Path(weights), opened, device),
        correction=correction == "tissue",
        names=None if names is None else [name.strip() for name in names.split(",")],
        ignore_below=ignore_below,
        seed=seed,
        progress=bar,
    )


@verb
def export(
    source: PathLike | Cohort | PatchSet,
    *,
    format: str,
    out: PathLike,
    labels: str = "subtypes",
    split: Sequence[str] | None = None,
) -> list[Path] | int:
    """Export a cohort, a synthetic set or a checkpoint for other tools.

    If interrupted, the same command continues. Patches of a set that a review rejected are left out.

    Parameters
    ----------
    source : str, Path, Cohort or PatchSet
        A cohort, a synthetic set or a checkpoint.
    format : str
        png: images, label images and a table; nnunet: a raw dataset of nnU-Net v2; hf: an image folder of Hugging
        Face's datasets; huggingface: Parquet files with a dataset card, patients under pseudonyms; qupath: a QuPath
        project with outlines; ome-zarr: OME-Zarr images with labels, for napari. Of a checkpoint, weights: as
        NVlabs/SPADE or CompVis/latent-diffusion publish theirs; diffusers: a diffusion network that plain diffusers
        draws with; smp: a segmenter that segmentation_models_pytorch opens.
    out : str or Path
        Folder of the export; for nnunet …/Dataset001_NAME.
    labels : str
        subtypes: a label for each; tumour: one label for all.
    split : sequence of str, optional
        train, val or test, one or more [default: everything].

    Returns
    -------
    int or list of Path
        How many images were written; of a checkpoint, the files.
    """
    from counterstain.config import build
    from counterstain.io.exports import ExportConfig
    from counterstain.io.exports import export as write
    from counterstain.progress import bar

    place, out = folder_of(source), Path(out)
    if format in CHECKPOINT_FORMATS:
        from counterstain.sharing import export_checkpoint

        if labels != "subtypes" or split:
            raise ConfigError(f"--format {format}: --labels and --split are for images")
        return export_checkpoint(on_disk(place), out, format)
    if format in EXPORT_FORMATS and isinstance(place, Path) and (place / "model.json").exists():
        raise InputError(f"{place}: a checkpoint; its formats are {', '.join(CHECKPOINT_FORMATS)} (--format)")
    if format not in EXPORT_FORMATS:
        raise ConfigError(f"--format {format}: expected {', '.join((*EXPORT_FORMATS, *CHECKPOINT_FORMATS))}")
    settings = {"file_format": format, "labels": labels, "parts": tuple(dict.fromkeys(split or ()))}
    return write(place, out, build(ExportConfig, settings, f"export of {place}"), bar, **_about(place))


def _about(place: Place) -> dict[str, Any]:
    """Return what a dataset card says of how a synthetic set was drawn; nothing of a cohort."""
    from counterstain.data.patch_set import HEADER_FILE, PatchSet
    from counterstain.generators.methods import METHODS
    from counterstain.recipe import drawing_command

    if not (isinstance(place, Path) and (place / HEADER_FILE).exists()):
        return {}
    header = PatchSet.open(place).header
    method = METHODS.get(header.method)
    described = method.data_sheet(header.settings, {}) if method is not None and method.data_sheet is not None else {}
    drawing = {"Method": header.method if method is None else method.title, **described}
    facts = drawing | {
        "Generator": f"checkpoint {header.generator}" if header.generator else "none",
        "Seed": str(header.seed),
        "Drawn by": f"counterstain {header.version}",
    }
    return {"facts": facts, "recipe": drawing_command(header)}
