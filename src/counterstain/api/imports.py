"""Imports: whole slides with annotations, an EXACT server."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from counterstain.api import Numbers, PathLike, numbers_of, verb
from counterstain.errors import ConfigError, CounterstainWarning, InputError

if TYPE_CHECKING:
    from counterstain.data.cohort import Cohort
    from counterstain.io.annotations import Format
    from counterstain.taxonomy import Taxonomy


@verb
def import_slides(
    slides: PathLike,
    *,
    annotations: PathLike,
    format: str,
    labels: PathLike,
    mpp: float,
    out: PathLike,
    regions: str | None = None,
    regions_per_slide: int = 10,
    region_size_um: float = 1500.0,
    origin: str | None = None,
    mpp_level0: float | None = None,
    patients: PathLike | None = None,
    taxonomy: str | None = None,
    taxonomy_of: PathLike | None = None,
    merge: str | None = None,
    types: PathLike | None = None,
    objects: str = "annotation",
    executor: str = "local",
    processes: int | None = None,
    address: str | None = None,
) -> Cohort:
    """Import whole slides and their annotations; if interrupted, the same command continues.

    Parameters
    ----------
    slides : str or Path
        Folder of slides, or one slide.
    annotations : str or Path
        Folder of annotation files, or one file.
    format : str
        exact, qupath, asap, aperio, halo, sliderunner, coco or labelme.
    labels : str or Path
        LABELS.yaml; 'counterstain import labels' writes a draft.
    mpp : float
        Micrometres per pixel of the cohort.
    out : str or Path
        Folder of the cohort.
    regions : str, optional
        drawn: rectangles among the annotations; auto: placed on annotated tissue; or a CSV table [default: drawn where
        LABELS.yaml names regions, else auto].
    regions_per_slide : int
        With --regions auto: how many at most.
    region_size_um : float
        With --regions auto: edge in micrometres.
    origin : str, optional
        Annotations count from the corner of the canvas, or of the scanned bounds [default: bounds for qupath].
    mpp_level0 : float, optional
        Micrometres per level-0 pixel, where files do not say.
    patients : str or Path, optional
        CSV with slide, patient, and optionally score and mpp_level0 [default: one patient per slide].
    taxonomy : str, optional
        her2 or a YAML file [default: her2, or the subtypes of LABELS.yaml].
    taxonomy_of, merge
        As for :func:`import_table`.
    types : str or Path, optional
        EXACT: saved annotation types, where rows hold only their numbers.
    objects : str
        QuPath: types of the objects to read, of annotation, detection, cell, tile, tma_core, with commas.
    executor : str
        Where slides are read: local, or ray (a cluster whose machines share all folders).
    processes : int, optional
        Processes on this machine, each with a slide at a time [default: one slide after another].
    address : str, optional
        A running Ray cluster, or auto [default: a new one on this machine alone].
    """
    from counterstain.io.import_slides import import_slides as import_all
    from counterstain.processes import executor_of
    from counterstain.progress import bar

    return import_all(
        slides,
        annotations,
        file_format=_annotation_format(format),
        labels=labels,
        mpp=mpp,
        out=out,
        regions=regions,
        origin=origin,
        patients=patients,
        types=types,
        objects=objects.replace(" ", "").split(","),
        taxonomy=taxonomy_option(taxonomy, taxonomy_of),
        merge=merge,
        progress=bar,
        executor=executor_of(executor, processes, address),
        mpp_level0=mpp_level0,
        regions_per_slide=regions_per_slide,
        region_size_um=region_size_um,
    )


def taxonomy_option(taxonomy: str | None, trained: PathLike | None) -> Taxonomy | None:
    """Return the taxonomy of ``--taxonomy`` or ``--taxonomy-of``; ConfigError where both are given."""
    from counterstain.taxonomy import Taxonomy

    if taxonomy and trained:
        raise ConfigError("--taxonomy and --taxonomy-of: give one of them")
    if trained:
        from counterstain.checkpoints import read_header  # it loads torch

        return read_header(Path(trained)).taxonomy
    return Taxonomy.load(taxonomy) if taxonomy else None


@verb
def import_labels(
    annotations: PathLike,
    *,
    format: str,
    taxonomy: str | None = None,
    types: PathLike | None = None,
    objects: str = "annotation",
) -> str:
    """Draft LABELS.yaml: every label of the annotations, to be given a meaning.

    Parameters
    ----------
    taxonomy : str, optional
        her2 or a YAML file: names of subtypes are filled in [default: her2 where labels have its names].
    annotations, format, types, objects
        As for :func:`import_slides`.
    """
    from counterstain.io.annotations import files_of_other_formats, read_all
    from counterstain.io.labels import draft_labels
    from counterstain.taxonomy import Taxonomy

    known = _annotation_format(format)
    files = read_all(annotations, known, types=types, objects=objects.replace(" ", "").split(","))
    for message in (message for file in files for message in file.odd):
        warnings.warn(message, CounterstainWarning, stacklevel=3)
    if others := files_of_other_formats(annotations, known):
        more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        warnings.warn(f"{others[0].name}{more}: another format, left out", CounterstainWarning, stacklevel=3)
    return draft_labels(files, Taxonomy.load(taxonomy) if taxonomy else None)


@verb
def import_exact(
    *,
    server: str,
    out: PathLike,
    image_set: int | None = None,
    images: Numbers | None = None,
    ca_file: PathLike | None = None,
) -> Path:
    """Fetch annotations from an EXACT server and save them.

    Credentials come from the environment: EXACT_TOKEN, or EXACT_USERNAME and EXACT_PASSWORD.

    Parameters
    ----------
    server : str
        Address of the server, https://…
    out : str or Path
        JSON file, for 'counterstain import slides --format exact'.
    image_set : int, optional
        Number of the image set.
    images : str or sequence of int, optional
        Numbers of images, such as 1,2,3.
    ca_file : str or Path, optional
        Certificates to trust (PEM), for a server of your own institution.
    """
    from counterstain.config import build
    from counterstain.io.annotations.exact_server import ExactServer, fetch_exact
    from counterstain.storage import write_json

    out = Path(out)
    if out.suffix != ".json" or out.is_dir():
        raise InputError(f"--out {out}: expected the name of a file that ends in .json")
    chosen = {"image_set": image_set, "images": tuple(numbers_of(images, "images") or ()), "ca_file": ca_file}
    config = build(ExactServer, {"url": server, **chosen}, "import exact")
    write_json(out, fetch_exact(config, told=_tell))
    return out


def _tell(done: int, images: int) -> None:
    """Say how many images are fetched, over one line of a terminal; a log file gets only the end."""
    if sys.stderr.isatty() or done == images:
        sys.stderr.write(f"\rimages: {done:,} of {images:,}" + ("\n" if done == images else ""))


def _annotation_format(name: str) -> Format:
    from counterstain.io.annotations import FORMATS

    for known in FORMATS:
        if known == name:
            return known
    raise InputError(f"--format {name}: unknown; expected {', '.join(FORMATS)}")
