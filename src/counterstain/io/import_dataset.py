"""Import of a whole dataset in the layout of another tool, as rows of a table that nobody has to write.

What the files tell is read by :mod:`counterstain.io.datasets`; of which patient an image is, is often said nowhere, so
that users say it. Everything after that is as for a table.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from counterstain.config import build
from counterstain.data.cohort import Cohort
from counterstain.data.split import PATIENTS_SEEN_FILE, read_patients_seen
from counterstain.errors import ConfigError, CounterstainWarning, InputError
from counterstain.io.datasets import READERS, Layout, layout_of
from counterstain.io.file_pairs import OF_IMAGES, OF_LABELS, PARTS_BY_NAME, Dataset, Row
from counterstain.io.import_table import import_rows
from counterstain.io.row_labels import RowLabels, TableConfig
from counterstain.io.table import checked_rows, csv_rows
from counterstain.progress import Progress
from counterstain.storage import fingerprint
from counterstain.taxonomy import Taxonomy

SAME_MPP = 0.01  # by which a given resolution may differ from the dataset's without a word


def import_dataset(
    folder: str | Path,
    *,
    out: str | Path,
    mpp: float | None = None,
    layout: Layout | None = None,
    patients: str | None = None,
    ignore_split: bool = False,
    taxonomy: Taxonomy | None = None,
    legend: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Cohort:
    """Import a dataset in one of LAYOUTS, or in the one that its files show.

    See :func:`counterstain.import_dataset` for the parameters; ``options`` are fields of :class:`TableConfig`.
    """
    folder = Path(folder)
    root = folder.parent if folder.is_file() else folder
    found_layout = layout or layout_of(folder)
    dataset = READERS[found_layout](folder)
    if not dataset.rows:
        said = "".join(f"; left out: {count} x {reason}" for reason, count in sorted(dataset.left_out.items()))
        raise InputError(f"{folder}: no image with labels, laid out as {found_layout}{said}")
    for reason, count in sorted(dataset.left_out.items()):
        warnings.warn(f"{folder}: left out: {count:,} x {reason}", CounterstainWarning, stacklevel=3)
    config = build(
        TableConfig,
        {"mpp": _mpp(folder, mpp, dataset.mpp), **dataset.options, **options},
        f"import of {folder}",
    )
    rows = _rows_of_text(folder, dataset, patients, ignore_split=ignore_split)
    checked = checked_rows(folder, root, rows, config.columns, known_subtypes=taxonomy is not None)
    checked = checked.assign(**_places(dataset.rows))
    labels = RowLabels(
        folder,
        checked,
        config,
        taxonomy=taxonomy or (dataset.taxonomy if legend is None else None),
        legend=None if legend is None else Path(legend),
        legend_map=dataset.legend,
    )
    source = {"kind": "dataset", "layout": found_layout, "rows": fingerprint(rows.astype(str).to_dict("records"))}
    beside = root / PATIENTS_SEEN_FILE
    behind = sorted(read_patients_seen(beside)) if beside.exists() else ()
    return import_rows(folder, checked, labels, config, out=Path(out), source=source, behind=behind, progress=progress)


def _mpp(folder: Path, given: float | None, said: float | None) -> float:
    mpp = given if given is not None else said
    if mpp is None:
        raise ConfigError(f"{folder}: does not say its micrometres per pixel; give --mpp")
    if said is not None and abs(mpp - said) > SAME_MPP * said:
        warnings.warn(f"--mpp {mpp:g} overrules {said:g} of {folder}", CounterstainWarning, stacklevel=4)
    return mpp


def _places(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return where regions lie on their slides, for exports that say it."""
    names = ("mpp_level0", "x_level0_px", "y_level0_px")
    return {name: [row[name] for row in rows] for name in names if all(name in row for row in rows)}


def _rows_of_text(folder: Path, dataset: Dataset, patients: str | None, *, ignore_split: bool) -> pd.DataFrame:
    """Return the rows with the patients that the dataset or the user names; InputError where nobody does."""
    known = [
        {name: "" if value is None else str(value) for name, value in row.items() if not isinstance(value, dict)}
        for row in dataset.rows
    ]
    if patients is not None:
        told = _patients(folder, dataset.rows, patients)
        known = [row | more for row, more in zip(known, told, strict=True)]
    unknown = [row for row in known if not row.get("patient")]
    if unknown:
        raise InputError(
            f"{folder}: which patients its {len(known):,} images are of is not said (first: {unknown[0]['image']}). "
            "Give --patients: a CSV table with the columns image and patient; folder, if each patient has a folder; a "
            "regular expression such as 'TCGA-..-....' that finds the patient in an image's path; or image, if no "
            "two images are of one patient"
        )
    names = ["image", "label", "instances", "patient", "slide", "part", "score", "region", "subtype"]
    frame = pd.DataFrame(known)
    held = [name for name in names if name in frame and not frame[name].isna().all() and (frame[name] != "").any()]
    frame = frame[held].fillna("")
    if ignore_split and "part" in frame:
        frame = frame.drop(columns="part")
    if "part" in frame and (frame["part"] == "").any():
        raise InputError(f"{folder}: some images are in train, val or test and some are not; give --ignore-split")
    frame.insert(0, "row", [f"image {row['image']}" for row in known])
    return frame


def _patients(folder: Path, rows: Sequence[Row], given: str) -> Iterator[Row]:
    """Yield what a rule or a table says of each image: its patient, and perhaps slide, part, score and subtype."""
    images = [str(row["image"]) for row in rows]
    if Path(given).is_file() or given.lower().endswith(".csv"):
        yield from _of_table(Path(given), images)
    elif given == "image":
        yield from ({"patient": row.get("region") or image} for row, image in zip(rows, images, strict=True))
    elif given == "folder":
        parents = [Path(image).parent for image in images]
        while parents and all(parent.name.lower() in OF_IMAGES | OF_LABELS for parent in parents):
            parents = [parent.parent for parent in parents]
        if any(parent.name.lower() in {"", *PARTS_BY_NAME, *OF_IMAGES} for parent in parents):
            raise InputError(f"--patients folder: {images[0]} lies in no folder of a patient; give another rule")
        yield from ({"patient": parent.name} for parent in parents)
    elif all(given in row.get("columns", {}) for row in rows):
        yield from ({"patient": str(row["columns"][given])} for row in rows)
    else:
        try:
            rule = re.compile(given)
        except re.error as error:
            raise InputError(f"--patients {given}: no such file, and no regular expression ({error})") from error
        for image in images:
            found = rule.search(image)
            name = found[1 if rule.groups else 0] if found else ""
            if not name:
                raise InputError(f"--patients {given}: finds no patient in {image} of {folder}; change the expression")
            yield {"patient": name}


def _of_table(path: Path, images: Sequence[str]) -> Iterator[Row]:
    known: dict[str, Row] = {}
    for where, row in csv_rows(path, ("image", "patient"), ("slide", "part", "score", "subtype")):
        name = row["image"].replace("\\", "/").removeprefix("./")
        if name in known:
            raise InputError(f"{where}: image {name!r} is there twice; remove one")
        wanted = ("patient", "slide", "part", "score", "subtype")
        known[name] = {key: row[key] for key in wanted if row.get(key)}
    told: dict[str, str] = {}  # row -> image
    for image in images:
        file = Path(image)
        fitting = [name for name in (image, file.with_suffix("").as_posix(), file.name, file.stem) if name in known]
        if not fitting:
            raise InputError(f"{path}: no row for {image}; the column image holds file names, with folders or without")
        if any(known[name] != known[fitting[0]] for name in fitting):
            raise InputError(f"{path}: rows {fitting[0]} and {fitting[1]} say different things of {image}; keep one")
        if told.setdefault(fitting[0], image) != image:
            raise InputError(f"{path}: {fitting[0]} is {told[fitting[0]]} or {image}; give them with their folders")
        yield known[fitting[0]]
