"""Imports of images with label files: those that a table lists, or a whole dataset in the layout of another tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from counterstain.api import PathLike, verb
from counterstain.api.imports import taxonomy_option
from counterstain.errors import ConfigError

if TYPE_CHECKING:
    from counterstain.data.cohort import Cohort


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
    out : str or Path
        Folder of the cohort.
    taxonomy : str, optional
        her2 or a YAML file; without it, the subtypes of the table.
    taxonomy_of : str or Path, optional
        Folder of a trained network, such as a segmenter: the cohort gets its subtypes, present or not, so that it can
        be tested there.
    tissue_class : str
        What all subtypes are, where no taxonomy is given.
    labels : str
        mask: 255 (or 1, where no value is higher) is tissue class; ids: a subtype's id in every pixel; instances: the
        number of an instance; planes: the same in a channel for each class. Outlines and .mat files say it themselves.
    legend : str or Path, optional
        YAML file that says what colours, numbers or classes of the label files mean.
    instance_table : str or Path, optional
        CSV with the columns image, instance, subtype, for --labels instances.
    merge : str, optional
        Put subtypes together by this merge of the taxonomy.
    threshold : int, optional
        Masks with grey levels: values above it are tissue class [default: 127, at soft edges alone].
    mask_values : str or mapping, optional
        What values mean: 0=background,1-254=tissue,255=ignore, or #ff0000=tissue; for ids, subtypes as well.
    shrink : int
        Shrink images by this whole number; 2 turns 0.25 um into 0.5 um.
    min_area_px : int
        Smaller components become background.
    objects : str
        GeoJSON of QuPath: types of the objects to read, of annotation, detection, cell, tile, tma_core, with commas.
    point_um : float, optional
        Draw discs of this width, in micrometres, for points; they are left out otherwise.
    image_column, label_column, patient_column, subtype_column : str
        Name of this column in the table (subtypes are needed where labels are masks).
    slide_column, part_column, score_column, region_column : str
        Name of this column, where the table has one.
    instances_column : str, optional
        Column of instance maps beside the label images, which keep touching instances apart.
    """
    # First of all, while the parameters are the only local names.
    columns = {name.removesuffix("_column"): value for name, value in locals().items() if name.endswith("_column")}
    columns["instances"] = instances_column or ""
    if isinstance(mask_values, Mapping):
        mask_values = ",".join(f"{value}={meaning}" for value, meaning in mask_values.items())

    from counterstain.io.import_table import import_table as import_rows
    from counterstain.progress import bar

    return import_rows(
        table,
        mpp=mpp,
        out=out,
        taxonomy=taxonomy_option(taxonomy, taxonomy_of),
        legend=legend,
        instance_table=instance_table,
        progress=bar,
        tissue_class=tissue_class,
        labels=labels,
        merge=merge,
        threshold=threshold,
        mask_values=mask_values or "",
        shrink=shrink,
        min_area_px=min_area_px,
        objects=tuple(objects.replace(" ", "").split(",")),
        point_um=point_um,
        columns=columns,
    )


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
    taxonomy, taxonomy_of, tissue_class, merge, shrink, min_area_px, objects, point_um
        As for :func:`import_table`.
    """
    from counterstain.io.datasets import LAYOUTS
    from counterstain.io.import_dataset import import_dataset as import_all
    from counterstain.progress import bar

    layout = next((known for known in LAYOUTS if known == format), None)
    if format is not None and layout is None:
        raise ConfigError(f"--format {format}: unknown; expected {', '.join(LAYOUTS)}")
    return import_all(
        folder,
        out=out,
        mpp=mpp,
        layout=layout,
        patients=patients,
        ignore_split=ignore_split,
        legend=legend,
        taxonomy=taxonomy_option(taxonomy, taxonomy_of),
        progress=bar,
        tissue_class=tissue_class,
        merge=merge,
        shrink=shrink,
        min_area_px=min_area_px,
        objects=tuple(objects.replace(" ", "").split(",")),
        point_um=point_um,
        **({} if labels is None else {"labels": labels}),
    )
