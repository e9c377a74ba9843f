"""Imports: whole slides with annotations, images with label files, datasets of other tools, an EXACT server."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    taxonomy_of, merge, objects
        As for :func:`import_dataset`.
    types : str or Path, optional
        EXACT: saved annotation types, where rows hold only their numbers.
    executor : str
        Where slides are read: local, or ray (a cluster whose machines share all folders).
    processes : int, optional
        Processes on this machine, each with a slide at a time [default: one slide after another].
    address : str, optional
        A running Ray cluster, or auto [default: a new one on this machine alone].
    """
    given = dict(locals())  # first of all, while the parameters are the only local names

    from counterstain.io.import_slides import import_slides as import_all
    from counterstain.processes import executor_of

    spread = executor_of(*(given.pop(name) for name in ("executor", "processes", "address")))
    return import_all(file_format=_annotation_format(given.pop("format")), executor=spread, **_opened(given))


@verb
def import_table(
    table: PathLike,
    *,
    mpp: float,
    out: PathLike,
    taxonomy: str | None = None,
    taxonomy_of: PathLike | None = None,
    tissue_class: str = "tumour",
    labels: str = "mask",
    legend: PathLike | None = None,
    instance_table: PathLike | None = None,
    merge: str | None = None,
    threshold: int | None = None,
    mask_values: str | Mapping[str, str] | None = None,
    shrink: int = 1,
    min_area_px: int = 0,
    objects: str = "annotation",
    point_um: float | None = None,
    image_column: str = "image",
    label_column: str = "label",
    patient_column: str = "patient",
    subtype_column: str = "subtype",
    slide_column: str = "slide",
    part_column: str = "part",
    score_column: str = "score",
    region_column: str = "region",
    instances_column: str | None = None,
) -> Cohort:
    """Import pairs of an image and a label image listed in a CSV table; if interrupted, the same command continues.

    Parameters
    ----------
    table : str or Path
        CSV with the columns image, label, patient, subtype; label files are images, arrays, .mat files or outlines.
    mpp : float
        Micrometres per pixel of the images.
    labels : str
        mask: 255 (or 1, where no value is higher) is tissue class; ids: a subtype's id in every pixel; instances: the
        number of an instance; planes: the same in a channel for each class. Outlines and .mat files say it themselves.
    instance_table : str or Path, optional
        CSV with the columns image, instance, subtype, for --labels instances.
    threshold : int, optional
        Masks with grey levels: values above it are tissue class [default: 127, at soft edges alone].
    mask_values : str or mapping, optional
        What values mean: 0=background,1-254=tissue,255=ignore, or #ff0000=tissue; for ids, subtypes as well.
    image_column, label_column, patient_column, subtype_column : str
        Name of this column in the table (subtypes are needed where labels are masks).
    slide_column, part_column, score_column, region_column : str
        Name of this column, where the table has one.
    instances_column : str, optional
        Column of instance maps beside the label images, which keep touching instances apart.
    out, taxonomy, taxonomy_of, tissue_class, legend, merge, shrink, min_area_px, objects, point_um
        As for :func:`import_dataset`.
    """
    given = dict(locals())
    columns = {name.removesuffix("_column"): given.pop(name) or "" for name in list(given) if name.endswith("_column")}
    if isinstance(mask_values, Mapping):
        given["mask_values"] = ",".join(f"{value}={meaning}" for value, meaning in mask_values.items())

    from counterstain.io.import_images import import_table as import_all

    return import_all(columns=columns, **_opened(given))


@verb
def import_dataset(
    folder: PathLike,
    *,
    out: PathLike,
    mpp: float | None = None,
    format: str | None = None,
    patients: str | None = None,
    ignore_split: bool = False,
    legend: PathLike | None = None,
    labels: str | None = None,
    taxonomy: str | None = None,
    taxonomy_of: PathLike | None = None,
    tissue_class: str = "tumour",
    merge: str | None = None,
    shrink: int = 1,
    min_area_px: int = 0,
    objects: str = "annotation",
    point_um: float | None = None,
) -> Cohort:
    """Import a dataset in the layout of another tool; if interrupted, the same command continues.

    Parameters
    ----------
    folder : str or Path
        Folder of the dataset, or its COCO or Parquet file.
    out : str or Path
        Folder of the cohort.
    mpp : float, optional
        Micrometres per pixel of the images, unless the dataset says it.
    format : str, optional
        export (of counterstain), nnunet, hf, parquet, coco, pannuke, ome-zarr, deepliif or pairs (images and label
        files of the same names) [default: what the files show].
    patients : str, optional
        Which patient an image is of, unless the dataset says it: a CSV with image and patient; folder, for a folder of
        each patient; a regular expression that finds the patient in the path of an image; a column of the dataset; or
        image, if no two images are of one patient.
    ignore_split : bool
        Leave out which images are train, val and test.
    legend : str or Path, optional
        YAML file that says what colours, numbers or classes of the label files mean.
    labels : str, optional
        What pixels of label files hold: mask, ids, instances or planes, as in import table [default: what the dataset
        says, else mask].
    taxonomy : str, optional
        her2 or a YAML file; without it, the subtypes of the table or the dataset.
    taxonomy_of : str or Path, optional
        Folder of a trained network, such as a segmenter: the cohort gets its subtypes, present or not, so that it can
        be tested there.
    tissue_class : str
        What all subtypes are, where no taxonomy is given.
    merge : str, optional
        Put subtypes together by this merge of the taxonomy.
    shrink : int
        Shrink images by this whole number; 2 turns 0.25 um into 0.5 um.
    min_area_px : int
        Smaller components become background.
    objects : str
        GeoJSON of QuPath: types of the objects to read, of annotation, detection, cell, tile, tma_core, with commas.
    point_um : float, optional
        Draw discs of this width, in micrometres, for points; they are left out otherwise.
    """
    given = dict(locals())

    from counterstain.io.datasets import LAYOUTS
    from counterstain.io.import_images import import_dataset as import_all

    layout = given.pop("format")
    if layout not in {None, *LAYOUTS}:
        raise ConfigError(f"--format {layout}: unknown; expected {', '.join(LAYOUTS)}")
    return import_all(layout=layout, **_opened(given))


def _opened(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of an import as its function takes them: the taxonomy opened, objects as a list."""
    from counterstain.progress import bar

    taxonomy = _taxonomy(given["taxonomy"], given["taxonomy_of"])
    more = {"taxonomy": taxonomy, "objects": _names(given["objects"]), "progress": bar}
    plain = {name: value for name, value in given.items() if name != "taxonomy_of" and value is not None}
    return {**plain, **more}


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.replace(" ", "").split(","))


def _taxonomy(taxonomy: str | None, trained: PathLike | None) -> Taxonomy | None:
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
    files = read_all(annotations, known, types=types, objects=_names(objects))
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
