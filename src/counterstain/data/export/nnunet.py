"""A raw dataset of nnU-Net v2, to be put into the folder ``nnUNet_raw``.

    Dataset042_NAME/
      imagesTr/NAME_0000.png  RGB, read by nnU-Net's NaturalImage2DIO
      labelsTr/NAME.png       0 = background, 1, 2, … = subtypes, the highest = ignore (where there is any)
      imagesTs/, labelsTs/    the test part
      dataset.json
      splits_final.json       training and validation by patient; nnU-Net looks for it in
                              nnUNet_preprocessed/Dataset042_NAME, so copy it there after planning

Without that file nnU-Net deals the images out at random, and a patient's would lie on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from counterstain.data.export.contents import Contents, Row
from counterstain.data.export.labels import ExportedLabels
from counterstain.data.export.layout import IMAGE, LABELS, Layout
from counterstain.errors import InputError
from counterstain.storage import write_json
from counterstain.taxonomy import IGNORE

FOLDS = 5
_DATASET = re.compile(r"Dataset\d{3}_\w+")
_RESERVED = {"background", "ignore"}


def _places(row: Row) -> Mapping[str, str]:
    ending = "Ts" if row["part"] == "test" else "Tr"
    return {IMAGE: f"images{ending}/{row['name']}_0000.png", LABELS: f"labels{ending}/{row['name']}.png"}


def _lookup(labels: ExportedLabels) -> np.ndarray:
    """Ignore is the highest label in nnU-Net."""
    lookup = labels.lookup.copy()
    lookup[IGNORE] = labels.taxonomy.num_labels
    return lookup


def _check(out: Path, contents: Contents, labels: ExportedLabels) -> None:
    if not _DATASET.fullmatch(out.name):
        word = re.sub(r"\W", "_", contents.source.resolve().name)
        raise InputError(
            f"--out {out}: nnU-Net knows datasets by a number and a name; give --out {out.parent / 'Dataset001_'}{word}"
        )
    reserved = _RESERVED.intersection(labels.taxonomy.names)
    if reserved:
        raise InputError(
            f"{contents.source}: a subtype is called {min(reserved)!r}, which nnU-Net keeps for itself; rename it"
        )
    if not _training(contents):
        raise InputError(f"{contents.source}: nothing to train on; export the training part too")


def _finish(out: Path, contents: Contents, labels: ExportedLabels) -> None:
    folds = training_folds(_training(contents))
    if folds:
        write_json(out / "splits_final.json", folds)
    write_json(out / "dataset.json", _dataset(out.name, contents, labels))


def _dataset(name: str, contents: Contents, labels: ExportedLabels) -> dict[str, Any]:
    values = {"background": 0} | {s.name: s.id for s in labels.taxonomy.subtypes}
    if (contents.instances["subtype"] == IGNORE).any():
        values["ignore"] = labels.taxonomy.num_labels
    return {
        "name": name,
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": values,
        "numTraining": len(_training(contents)),
        "file_ending": ".png",
        "overwrite_image_reader_writer": "NaturalImage2DIO",
        "mpp": contents.mpp,
    }


def training_folds(rows: list[Row]) -> list[dict[str, list[str]]]:
    """Return nnU-Net's folds: the cohort's own validation part, otherwise up to five folds by patient.

    A single patient cannot be validated on another one: no fold then, and nnU-Net's fold ``all`` is to be trained.
    """
    validated = [row["name"] for row in rows if row["part"] == "val"]
    if validated:
        return [{"train": [row["name"] for row in rows if row["part"] != "val"], "val": validated}]
    patients = sorted({row["patient"] for row in rows})
    folds = []
    for number in range(min(FOLDS, len(patients)) if len(patients) > 1 else 0):
        held_out = set(patients[number::FOLDS])
        train, val = ([row["name"] for row in rows if (row["patient"] in held_out) == out] for out in (False, True))
        folds.append({"train": train, "val": val})
    return folds


def _training(contents: Contents) -> list[Row]:
    return [row for row in contents.rows if row["part"] != "test"]


NNUNET = Layout(places=_places, lookup=_lookup, check=_check, finish=_finish)
