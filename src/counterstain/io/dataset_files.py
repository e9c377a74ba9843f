"""The files of a dataset: images and label files of the same names, and which patient an image is of.

They lie in folders beside each other (``images/a.png``, ``labels/a.png``), or side by side with an ending (``a.png``,
``a_mask.png``) or as files of two kinds (``a.tif``, ``a.xml``).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from counterstain.data.cohort import PARTS
from counterstain.errors import InputError
from counterstain.io.labels import LabelMap
from counterstain.io.parts import CLASSED, OUTLINES
from counterstain.io.table import csv_rows
from counterstain.taxonomy import Taxonomy

IMAGE_ENDINGS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp", ".webp", ".svs")
LABEL_ENDINGS = (*OUTLINES, *CLASSED, ".npy", ".npz")
OF_IMAGES = {"image", "images", "img", "imgs", "tissue images", "tiles"}
OF_LABELS = {
    "label", "labels", "mask", "masks", "annotation", "annotations", "gt", "ground_truth", "groundtruth", "seg",
    "segmentation", "segmentations", "instance", "instances", "xml", "json", "geojson", "mat",
}  # fmt: skip
LABEL_ENDING = re.compile(
    r"[-_. ](labels?|(cp_)?masks?|seg|segmentation|gt|anno|annotations?|instances?)$", re.IGNORECASE
)
KEY = re.compile(r"\[[^\[\]]+\]$")  # of a part of a file
PARTS_BY_NAME = {
    **{name: name for name in PARTS},
    "training": "train",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "testing": "test",
}
Row = dict[str, Any]
Key = tuple[tuple[str, ...], str]  # folders and name of an image and its label file


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What the files of a dataset tell."""

    rows: list[Row]  # image and label, relative to the folder, perhaps patient, slide, part, score, region, columns
    options: Mapping[str, Any] = field(default_factory=dict)  # fields of TableConfig
    taxonomy: Taxonomy | None = None
    legend: LabelMap | None = None
    mpp: float | None = None
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> images


def read_pairs(folder: Path) -> Dataset:
    """Read images and label files of the same names: in folders beside each other, or with endings such as _mask."""
    images: dict[Key, list[Path]] = {}
    labels: dict[Key, list[Path]] = {}
    for file in files_of(folder):
        place, stem, is_label = _kind(folder, file)
        if is_label is not None:
            (labels if is_label else images).setdefault((place, stem), []).append(file)
    if not images.keys() & labels.keys():  # folders of other names: files go together by their own
        images, labels = _by_name(images), _by_name(labels)
    rows, left_out = list[Row](), Counter[str]()
    for key, files in images.items():
        if key not in labels:
            left_out["image without a label file of its name"] += 1
            continue
        files.sort(key=lambda file: IMAGE_ENDINGS.index(file.suffix.lower()))
        for name, several in (("image", [f for f in files if f.suffix.lower() != ".svs"]), ("label", labels[key])):
            if len(several) > 1:
                raise InputError(
                    f"{several[0]}: {several[1].name} in {several[1].parent} is another {name} of the same name; move "
                    "those that are not to be imported to another folder"
                )
        row = paths_in(folder, files[0], labels[key][0])
        rows.append(row | {"part": part_of(files[0].relative_to(folder))})
    left_out["label file without an image of its name"] += len(labels.keys() - images.keys())
    if not rows:
        known = (*IMAGE_ENDINGS, *LABEL_ENDINGS)
        others = (file.suffix.lower() for file in files_of(folder) if file.suffix.lower() not in known)
        left_out.update(f"file of another kind ({ending})" for ending in others)
    return Dataset(rows=split_rows(rows), left_out=+left_out)


def _by_name(files: Mapping[Key, list[Path]]) -> dict[Key, list[Path]]:
    found: dict[Key, list[Path]] = {}
    for (_, stem), several in files.items():
        found.setdefault(((), stem), []).extend(several)
    return found


def key_of(folder: Path, file: Path) -> Key:
    """Return the folders of a file without those that say whether it is an image or a label, and its name."""
    *places, _ = map(_composed, file.relative_to(folder).parts)
    kept = (place for place in places if place.lower() not in OF_IMAGES | OF_LABELS)
    return tuple(kept), LABEL_ENDING.sub("", _composed(file.stem))


def _composed(name: str) -> str:
    """Return a name in one spelling of Unicode: Macs decompose the names of files."""
    return unicodedata.normalize("NFC", name)


def _kind(folder: Path, file: Path) -> tuple[tuple[str, ...], str, bool | None]:
    """Return the key of a file and whether it is a label file; None of a file that is neither image nor label."""
    key = key_of(folder, file)
    if file.suffix.lower() in LABEL_ENDINGS:
        return *key, True
    if file.suffix.lower() not in IMAGE_ENDINGS:
        return *key, None
    among = [part.lower() for part in file.relative_to(folder).parts[:-1]]
    named = any(part in OF_LABELS for part in among) or LABEL_ENDING.search(file.stem) is not None
    return *key, named


def files_of(folder: Path) -> list[Path]:
    """Return all files of a folder, sorted, without hidden ones and those inside Zarr folders.

    A folder that links lead to several times is entered once.
    """
    if folder.is_file():
        return [folder]
    found, folders, entered = [], [folder], {folder.resolve()}
    while folders:
        for entry in sorted(folders.pop().iterdir()):
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir() and entry.suffix != ".zarr":
                if (place := entry.resolve()) not in entered:
                    entered.add(place)
                    folders.append(entry)
            elif entry.is_file():
                found.append(entry)
    return sorted(found)


def part_of(path: Path) -> str | None:
    """Return the part of the split that a folder of a path names."""
    named = [PARTS_BY_NAME[part.lower()] for part in path.parts[:-1] if part.lower() in PARTS_BY_NAME]
    return named[-1] if named else None


def split_rows(rows: list[Row]) -> list[Row]:
    """Return rows without parts where all are in one, which is no split."""
    return rows if len({row["part"] for row in rows}) > 1 else [row | {"part": None} for row in rows]


def paths_in(folder: Path, image: Path, label: Path) -> Row:
    """Return a row of an image and its label file, relative to the folder, or to that of the one file given."""
    root = folder.parent if folder.is_file() else folder
    return {"image": image.relative_to(root).as_posix(), "label": label.relative_to(root).as_posix()}


def rows_of_text(folder: Path, dataset: Dataset, patients: str | None, *, ignore_split: bool) -> pd.DataFrame:
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
        parents = [Path(KEY.sub("", image)).parent for image in images]
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
                columns = ", ".join({key: None for row in rows for key in row.get("columns", {})})
                column = f" or give one of its columns ({columns})" if columns else ""
                raise InputError(
                    f"--patients {given}: finds no patient in {image} of {folder}; change the expression{column}"
                )
            yield {"patient": name}


def _of_table(path: Path, images: Sequence[str]) -> Iterator[Row]:
    known: dict[str, Row] = {}
    for where, row in csv_rows(path, ("image", "patient"), ("slide", "part", "score", "subtype")):
        name = _composed(row["image"].replace("\\", "/").removeprefix("./"))
        if name in known:
            raise InputError(f"{where}: image {name!r} is there twice; remove one")
        wanted = ("patient", "slide", "part", "score", "subtype")
        known[name] = {key: row[key] for key in wanted if row.get(key)}
    told: dict[str, str] = {}  # row -> image
    for image in images:
        file = Path(_composed(KEY.sub("", image)))
        names = (_composed(image), file.as_posix(), file.with_suffix("").as_posix(), file.name, file.stem)
        fitting = [name for name in dict.fromkeys(names) if name in known]
        if not fitting:
            raise InputError(f"{path}: no row for {image}; the column image holds file names, with folders or without")
        if any(known[name] != known[fitting[0]] for name in fitting):
            raise InputError(f"{path}: rows {fitting[0]} and {fitting[1]} say different things of {image}; keep one")
        if told.setdefault(fitting[0], image) != image:
            raise InputError(f"{path}: {fitting[0]} is {told[fitting[0]]} or {image}; give them with their folders")
        yield known[fitting[0]]
