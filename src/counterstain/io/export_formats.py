"""Ordinary images: ``images/``, ``labels/``, ``instances/`` and a table that ``counterstain import table`` reads.

    DIR/
      images/NAME.png     RGB
      labels/NAME.png     8 bits grey: 0 = background, the id of the subtype, 255 = ignore
      instances/NAME.png  16 bits grey: 0 = background, the instance
      table.csv           a row per image: image, label, instances, region, slide, patient, part, score, mpp, …
      instances.csv       a row per instance: image, instance, subtype_id, subtype, area_px
      taxonomy.yaml       what the ids mean
      patients_seen.txt   of generated images: a line per patient behind them; the import keeps them out of evaluation

``counterstain import table DIR/table.csv --labels ids --taxonomy DIR/taxonomy.yaml --mpp …`` gives the same label
masks back. It takes connected components for instances: neighbours of one subtype that touch become one there, while
``instances/`` keeps them apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image

from counterstain.config import Config, to_yaml
from counterstain.data.patches import label_mask
from counterstain.data.split import PATIENTS_SEEN_FILE
from counterstain.errors import InputError
from counterstain.io.exports import (
    IMAGE,
    INSTANCES,
    LABELS,
    Contents,
    ExportedLabels,
    LabelMode,
    Layout,
    Row,
    choose_parts,
    exported_labels,
    open_contents,
    stored_instances,
    stored_numbers,
)
from counterstain.storage import claim, replacing, write_csv, write_json, write_text
from counterstain.taxonomy import IGNORE

_FIRST = ["image", "label", "instances", "region", "slide", "patient", "part", "score", "mpp"]


def _places(row: Row) -> Mapping[str, str]:
    file = f"{row['name']}.png"
    return {IMAGE: f"images/{file}", LABELS: f"labels/{file}", INSTANCES: f"instances/{file}"}


def _finish(out: Path, contents: Contents, labels: ExportedLabels) -> None:
    write_text(out / "taxonomy.yaml", to_yaml(labels.taxonomy))
    write_csv(out / "instances.csv", _instance_table(contents, labels))
    rows = []
    for row in contents.rows:
        places = _places(row)
        files = {"image": places[IMAGE], "label": places[LABELS], "instances": places[INSTANCES]}
        plain = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
        rows.append(plain | files | {"mpp": contents.mpp})
    table = pd.DataFrame(rows).drop(columns=["name", "index"])
    write_csv(out / "table.csv", table[[*_FIRST, *table.columns.drop(_FIRST)]])


def _instance_table(contents: Contents, labels: ExportedLabels) -> pd.DataFrame:
    """Return a row per instance under the number that it has in its image."""
    found = contents.instances
    subtype = pd.Series(labels.lookup[found["subtype"].to_numpy()], index=found.index)
    named = {s.id: s.name for s in labels.taxonomy.subtypes} | {IGNORE: "ignore"}
    return pd.DataFrame(
        {
            "image": "images/" + found["name"] + ".png",
            "instance": found.groupby("name")["instance"].transform(stored_numbers),
            "subtype_id": subtype,
            "subtype": subtype.map(named),
            "area_px": found["area_px"],
        }
    )


PNG = Layout(
    places=_places,
    lookup=lambda labels: labels.lookup,
    check=lambda _out, _contents, _labels: None,
    finish=_finish,
)


# A raw dataset of nnU-Net v2, to be put into the folder ``nnUNet_raw``.
#
# Dataset042_NAME/ imagesTr/NAME_0000.png RGB, read by nnU-Net's NaturalImage2DIO labelsTr/NAME.png 0 = background, 1,
# 2, … = subtypes, the highest = ignore (where there is any) imagesTs/, labelsTs/ the test part dataset.json
# splits_final.json training and validation by patient; nnU-Net looks for it in nnUNet_preprocessed/Dataset042_NAME,
# so copy it there after planning
#
# Without that file nnU-Net deals the images out at random, and a patient's would lie on both sides.

FOLDS = 5
_DATASET = re.compile(r"Dataset\d{3}_\w+")
_RESERVED = {"background", "ignore"}


def _nnunet_files(row: Row) -> Mapping[str, str]:
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


def _finish_nnunet(out: Path, contents: Contents, labels: ExportedLabels) -> None:
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


NNUNET = Layout(places=_nnunet_files, lookup=_lookup, check=_check, finish=_finish_nnunet)


# An image folder of Hugging Face's ``datasets``: ``load_dataset("imagefolder", data_dir=DIR)``.
#
# DIR/ train/, validation/, test/ data/ where there is no split images/NAME.png masks/NAME.png instances/NAME.png
# metadata.jsonl a line per image: file_name, mask_file_name, instances_file_name, region, slide, patient, score, mpp,
# instances and area in pixels of every subtype, … taxonomy.yaml what the ids in the masks mean patients_seen.txt of
# generated images: a line per patient behind them README.md
#
# ``datasets`` gives ``image``, ``mask`` and ``instances`` as images and the rest as columns.

_FOLDERS = {"train": "train", "val": "validation", "test": "test", None: "data"}
_NOT_WRITTEN = {"name", "index", "part"}

_CARD = """\
# {source}

{count} images at {mpp:g} micrometres per pixel, exported by counterstain.

```python
from datasets import load_dataset

dataset = load_dataset("imagefolder", data_dir=".")
```

`mask` holds 0 = background, {labels}, 255 = ignore; `instances` a number per instance.
Patients never lie in two splits.
"""


def _hf_files(row: Row) -> Mapping[str, str]:
    folder, file = _FOLDERS[row["part"]], f"{row['name']}.png"
    return {IMAGE: f"{folder}/images/{file}", LABELS: f"{folder}/masks/{file}", INSTANCES: f"{folder}/instances/{file}"}


def _finish_hf(out: Path, contents: Contents, labels: ExportedLabels) -> None:
    write_text(out / "taxonomy.yaml", to_yaml(labels.taxonomy))
    meanings = ", ".join(f"{s.id} = {s.name}" for s in labels.taxonomy.subtypes)
    name = contents.source.resolve().name
    write_text(
        out / "README.md", _CARD.format(source=name, count=len(contents.table), mpp=contents.mpp, labels=meanings)
    )
    totals = _totals(contents, labels)
    lines: dict[str, list[str]] = {}
    for row in contents.rows:
        lines.setdefault(_FOLDERS[row["part"]], []).append(json.dumps(_record(row, contents, totals[row["name"]])))
    for folder, of_part in lines.items():
        write_text(out / folder / "metadata.jsonl", "\n".join(of_part) + "\n")


def _record(row: Row, contents: Contents, totals: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Return a line of the metadata; paths count from its folder."""
    files = {kind: place.partition("/")[2] for kind, place in _hf_files(row).items()}
    named = {
        "file_name": files[IMAGE],
        "mask_file_name": files[LABELS],
        "instances_file_name": files[INSTANCES],
    }
    known = {key: value for key, value in row.items() if key not in _NOT_WRITTEN}
    return named | known | {"mpp": contents.mpp} | totals


def _totals(contents: Contents, labels: ExportedLabels) -> dict[str, dict[str, dict[str, int]]]:
    """Return instances and area of every subtype for every name."""
    found = contents.instances.assign(label=labels.lookup[contents.instances["subtype"].to_numpy()])
    groups = found.groupby(["name", "label"])["area_px"].agg(["size", "sum"])
    counts = {(str(key[0]), int(key[1])): (int(n), int(area)) for key, n, area in groups.itertuples()}
    subtypes = labels.taxonomy.subtypes
    return {
        name: {
            "subtype_instances": {s.name: counts.get((name, s.id), (0, 0))[0] for s in subtypes},
            "subtype_area_px": {s.name: counts.get((name, s.id), (0, 0))[1] for s in subtypes},
        }
        for name in pd.unique(contents.table["name"])
    }


HUGGING_FACE = Layout(
    places=_hf_files,
    lookup=lambda labels: labels.lookup,
    check=lambda _out, _contents, _labels: None,
    finish=_finish_hf,
)


# Write an export image by image; interrupted, the same command goes on.

REPORT_FILE = "export.json"
LAYOUTS: dict[str, Layout] = {"png": PNG, "nnunet": NNUNET, "hf": HUGGING_FACE}

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class ExportConfig(Config):
    """What an export holds."""

    file_format: Literal["png", "nnunet", "hf"]
    """Ordinary images, a raw dataset of nnU-Net v2, or an image folder of Hugging Face's ``datasets``."""
    labels: LabelMode = "subtypes"
    """A label for every subtype, or one for all of them."""
    parts: tuple[Literal["train", "val", "test"], ...] = ()
    """Parts of the split; without any, everything."""


def export(source: Path, out: Path, config: ExportConfig, *, progress: Progress | None = None) -> int:
    """Export a cohort or a synthetic set.

    Region by region, so that memory does not grow with their number. ``export.json`` is written last: an export with
    it is whole, and is left as it is.

    Parameters
    ----------
    source : Path
        Folder of a cohort or of a synthetic set. A set's patches belong to the training part, where their masks come
        from.
    out : Path
        Folder of the export.
    config : ExportConfig
    progress : callable, optional
        As :func:`counterstain.progress.bar`.

    Returns
    -------
    int
        Number of images.

    Raises
    ------
    InputError
        There is no such source or part, or it cannot be laid out so.
    MismatchError
        ``out`` holds something else.
    """
    contents = choose_parts(open_contents(source), config.parts)
    labels = exported_labels(contents.taxonomy, config.labels)
    layout = LAYOUTS[config.file_format]
    layout.check(out, contents, labels)
    claim(out, "export", {"source": contents.fingerprint, **config.model_dump(mode="json")})
    if not (out / REPORT_FILE).exists():
        _sweep(out)
        with (progress or _silent)("images", len(contents.table)) as advance:
            for row in contents.rows:
                _write(out, row, contents, layout, layout.lookup(labels))
                advance(1)
        if contents.patients_seen:  # before any table that could be imported without it
            write_text(out / PATIENTS_SEEN_FILE, "\n".join(contents.patients_seen) + "\n")
        layout.finish(out, contents, labels)
        write_json(out / REPORT_FILE, _report(contents, config))
    return len(contents.table)


def _write(out: Path, row: Row, contents: Contents, layout: Layout, lookup: np.ndarray) -> None:
    """Write the files of one image that are not there yet."""
    missing = {kind: out / place for kind, place in layout.places(row).items() if not (out / place).exists()}
    if not missing:
        return
    image, instances, subtypes = contents.read(row["index"])
    pixels: dict[str, Callable[[], np.ndarray]] = {
        IMAGE: lambda: image,
        LABELS: lambda: lookup[label_mask(instances, subtypes)],
        INSTANCES: lambda: stored_instances(instances, subtypes, f"{contents.source} region {row['region']}"),
    }
    for kind, path in missing.items():
        with replacing(path) as partial:
            Image.fromarray(pixels[kind]()).save(partial, format="PNG")


def _report(contents: Contents, config: ExportConfig) -> dict[str, object]:
    return {
        **config.model_dump(mode="json"),
        "source": contents.source.resolve().name,
        "fingerprint": contents.fingerprint,
        "mpp": contents.mpp,
        "images": len(contents.table),
        "patients": int(contents.table["patient"].nunique()),
        "instances": len(contents.instances),
    }


def _sweep(out: Path) -> None:
    """Remove what a killed export left half-written."""
    for left_over in out.rglob(".*.partial-*"):
        left_over.unlink(missing_ok=True)


@contextmanager
def _silent(_label: str, _total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _images: None


# The way out: cohorts and synthetic sets as ordinary images, as an nnU-Net dataset, as a Hugging Face image folder.
