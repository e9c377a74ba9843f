"""Export of a cohort or a synthetic set: ordinary images, a dataset of nnU-Net, an image folder of Hugging Face.

``png``: a table that ``counterstain import table`` reads, with its images. The import gives the same label masks; it
takes connected components for instances, so that neighbours of one subtype that touch become one, while
``instances/`` keeps them apart. ::

    images/NAME.png     RGB
    labels/NAME.png     8 bits grey: 0 = background, the id of the subtype, 255 = ignore
    instances/NAME.png  16 bits grey: 0 = background, the instance
    table.csv           a row per image: image, label, instances, region, slide, patient, part, score, mpp, …
    instances.csv       a row per instance: image, instance, subtype_id, subtype, area_px
    taxonomy.yaml       the subtype of each id

``nnunet``: a raw dataset of nnU-Net v2, to be put into the folder ``nnUNet_raw``. Without ``splits_final.json``, which
belongs into ``nnUNet_preprocessed/Dataset042_NAME``, nnU-Net distributes images over the folds at random, and one
patient's would be on both sides. ::

    Dataset042_NAME/
      imagesTr/NAME_0000.png  RGB, read by nnU-Net's NaturalImage2DIO; imagesTs/ and labelsTs/ hold the test part
      labelsTr/NAME.png       0 = background, 1, 2, … = subtypes, the highest = ignore (if anything is ignored)
      dataset.json
      splits_final.json       training and validation by patient

``hf``: a folder that ``load_dataset("imagefolder", data_dir=DIR)`` reads. ::

    train/, validation/, test/  data/ where there is no split
      images/, masks/, instances/
      metadata.jsonl            a line per image: its files, region, slide, patient, score, mpp, subtypes, …
    taxonomy.yaml, README.md

Generated images bring ``patients_seen.txt``, a line per patient behind them; the import keeps these out of evaluation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image

from counterstain.config import Config, build, to_yaml
from counterstain.data.patches import label_mask
from counterstain.data.split import PATIENTS_SEEN_FILE
from counterstain.errors import InputError
from counterstain.io.export_contents import (
    Contents,
    ExportedLabels,
    Row,
    choose_parts,
    exported_labels,
    open_contents,
    stored_instances,
    stored_numbers,
)
from counterstain.progress import Progress, silent
from counterstain.storage import claim, replacing, write_csv, write_json, write_text
from counterstain.taxonomy import IGNORE

REPORT_FILE = "export.json"
IMAGE, LABELS, INSTANCES = "image", "label", "instances"
FIRST_COLUMNS = [IMAGE, LABELS, INSTANCES, "region", "slide", "patient", "part", "score", "mpp"]
NNUNET_NAME = re.compile(r"Dataset\d{3}_\w+")
NNUNET_RESERVED = {"background", "ignore"}
NNUNET_FOLDS = 5
CARD = """\
# {source}

{count} images at {mpp:g} micrometres per pixel, exported by counterstain.

```python
from datasets import load_dataset

dataset = load_dataset("imagefolder", data_dir=".")
```

`mask` holds 0 = background, {labels}, 255 = ignore; `instances` a number per instance.
Patients never lie in two splits.
"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A kind of export."""

    files: Mapping[str, str]
    """``image``, ``label`` and perhaps ``instances`` -> path in the export, of {name} and {folder}."""
    folders: Mapping[str | None, str]
    """Part of the split -> {folder}."""
    write_tables: Callable[[Path, Contents, ExportedLabels], None]
    """Write the tables, when all images are there."""
    check: Callable[[Path, Contents, ExportedLabels], None] = lambda _out, _contents, _labels: None
    """Raise InputError where the contents cannot be laid out so."""
    ignore_is_highest: bool = False
    """Whether the highest label, instead of 255, is ignored."""

    def files_of(self, row: Row) -> dict[str, str]:
        """Return the files of an image."""
        folder = self.folders[row["part"]]
        return {kind: path.format(name=row["name"], folder=folder) for kind, path in self.files.items()}


class ExportConfig(Config):
    """What an export holds."""

    file_format: Literal["png", "nnunet", "hf"]
    """Ordinary images, a raw dataset of nnU-Net v2, or an image folder of Hugging Face's ``datasets``."""
    labels: Literal["subtypes", "tumour"] = "subtypes"
    """A label for every subtype, or one for all of them."""
    parts: tuple[Literal["train", "val", "test"], ...] = ()
    """Parts of the split; everything if empty."""


def export(
    source: str | Path,
    out: str | Path,
    config: ExportConfig | str,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> int:
    """Export a cohort or a synthetic set.

    Images are written one by one, so that memory does not grow with their number. ``export.json`` comes last: an
    export that has it is complete and left untouched.

    Parameters
    ----------
    source : str or Path
        Folder of a cohort or of a synthetic set. The patches of a set belong to the training part, from which their
        masks come.
    out : str or Path
        Folder of the export. An interrupted export into it is continued.
    config : ExportConfig or ``png``, ``nnunet``, ``hf``
    progress : callable, optional
        Such as :func:`counterstain.progress.bar`.
    **settings
        Further fields of :class:`ExportConfig`, where ``config`` is the name of a format.

    Returns
    -------
    int
        Number of images.

    Raises
    ------
    InputError
        There is no such source or part, or the format cannot hold it.
    MismatchError
        ``out`` holds something else.
    """
    source, out = Path(source), Path(out)
    if isinstance(config, str):
        config = build(ExportConfig, {"file_format": config, **settings}, f"export of {source}")
    contents = choose_parts(open_contents(source), config.parts)
    labels = exported_labels(contents.taxonomy, whole_class=config.labels == "tumour")
    layout = LAYOUTS[config.file_format]
    layout.check(out, contents, labels)
    claim(out, "export", {"source": contents.fingerprint, **config.model_dump(mode="json")})
    if not (out / REPORT_FILE).exists():
        for half_written in out.rglob(".*.partial-*"):
            half_written.unlink(missing_ok=True)
        with (progress or silent)("images", len(contents.table)) as advance:
            for row in contents.rows:
                write_image(out, row, contents, layout, labels)
                advance(1)
        if contents.patients_seen:  # before any table that could be imported without it
            write_text(out / PATIENTS_SEEN_FILE, "\n".join(contents.patients_seen) + "\n")
        layout.write_tables(out, contents, labels)
        write_json(out / REPORT_FILE, _report(contents, config))
    return len(contents.table)


def write_image(out: Path, row: Row, contents: Contents, layout: Layout, labels: ExportedLabels) -> None:
    """Write the files of one image that are not there yet."""
    missing = {kind: out / path for kind, path in layout.files_of(row).items() if not (out / path).exists()}
    if not missing:
        return
    lookup = labels.lookup.copy()
    if layout.ignore_is_highest:
        lookup[IGNORE] = labels.taxonomy.num_labels
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


def _write_csv_tables(out: Path, contents: Contents, labels: ExportedLabels) -> None:
    write_text(out / "taxonomy.yaml", to_yaml(labels.taxonomy))
    found = contents.instances
    subtype = pd.Series(labels.lookup[found["subtype"].to_numpy()], index=found.index)
    instances = {
        "image": "images/" + found["name"] + ".png",
        "instance": found.groupby("name")["instance"].transform(stored_numbers),
        "subtype_id": subtype,
        "subtype": subtype.map({s.id: s.name for s in labels.taxonomy.subtypes} | {IGNORE: "ignore"}),
        "area_px": found["area_px"],
    }
    write_csv(out / "instances.csv", pd.DataFrame(instances))
    rows = []
    for row in contents.rows:
        plain = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
        rows.append(plain | LAYOUTS["png"].files_of(row) | {"mpp": contents.mpp})
    table = pd.DataFrame(rows).drop(columns=["name", "index"])
    write_csv(out / "table.csv", table[[*FIRST_COLUMNS, *table.columns.drop(FIRST_COLUMNS)]])


def _check_nnunet(out: Path, contents: Contents, labels: ExportedLabels) -> None:
    if not NNUNET_NAME.fullmatch(out.name):
        word = re.sub(r"\W", "_", contents.source.resolve().name)
        raise InputError(
            f"--out {out}: nnU-Net needs a dataset name with a number; give --out {out.parent / 'Dataset001_'}{word}"
        )
    reserved = NNUNET_RESERVED.intersection(labels.taxonomy.names)
    if reserved:
        raise InputError(f"{contents.source}: nnU-Net reserves the name {min(reserved)!r}; rename that subtype")
    if not _training(contents):
        raise InputError(f"{contents.source}: nothing to train on; export the training part too")


def _write_nnunet_tables(out: Path, contents: Contents, labels: ExportedLabels) -> None:
    rows = _training(contents)
    if folds := training_folds(rows):
        write_json(out / "splits_final.json", folds)
    values = {"background": 0} | {s.name: s.id for s in labels.taxonomy.subtypes}
    if (contents.instances["subtype"] == IGNORE).any():
        values["ignore"] = labels.taxonomy.num_labels
    description = {
        "name": out.name,
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": values,
        "numTraining": len(rows),
        "file_ending": ".png",
        "overwrite_image_reader_writer": "NaturalImage2DIO",
        "mpp": contents.mpp,
    }
    write_json(out / "dataset.json", description)


def training_folds(rows: list[Row]) -> list[dict[str, list[str]]]:
    """Return nnU-Net's folds: the cohort's own validation part, otherwise up to five folds by patient.

    A single patient cannot be validated on another one: there is no fold then, and nnU-Net trains its fold ``all``.
    """
    validated = [row["name"] for row in rows if row["part"] == "val"]
    if validated:
        return [{"train": [row["name"] for row in rows if row["part"] != "val"], "val": validated}]
    patients = sorted({row["patient"] for row in rows})
    folds = []
    for number in range(min(NNUNET_FOLDS, len(patients)) if len(patients) > 1 else 0):
        held_out = set(patients[number::NNUNET_FOLDS])
        train, val = ([row["name"] for row in rows if (row["patient"] in held_out) == out] for out in (False, True))
        folds.append({"train": train, "val": val})
    return folds


def _training(contents: Contents) -> list[Row]:
    return [row for row in contents.rows if row["part"] != "test"]


def _write_hf_tables(out: Path, contents: Contents, labels: ExportedLabels) -> None:
    write_text(out / "taxonomy.yaml", to_yaml(labels.taxonomy))
    meanings = ", ".join(f"{s.id} = {s.name}" for s in labels.taxonomy.subtypes)
    name, count = contents.source.resolve().name, len(contents.table)
    write_text(out / "README.md", CARD.format(source=name, count=count, mpp=contents.mpp, labels=meanings))
    layout, counts = LAYOUTS["hf"], _counts(contents, labels)
    lines: dict[str, list[str]] = {}
    for row in contents.rows:
        files = {kind: path.partition("/")[2] for kind, path in layout.files_of(row).items()}  # from the line's folder
        line = {
            "file_name": files[IMAGE],
            "mask_file_name": files[LABELS],
            "instances_file_name": files[INSTANCES],
            **{key: value for key, value in row.items() if key not in {"name", "index", "part"}},
            "mpp": contents.mpp,
            **counts[row["name"]],
        }
        lines.setdefault(layout.folders[row["part"]], []).append(json.dumps(line))
    for folder, of_part in lines.items():
        write_text(out / folder / "metadata.jsonl", "\n".join(of_part) + "\n")


def _counts(contents: Contents, labels: ExportedLabels) -> dict[str, dict[str, dict[str, int]]]:
    """Return instances and area of every subtype for every name."""
    found = contents.instances.assign(label=labels.lookup[contents.instances["subtype"].to_numpy()])
    groups = found.groupby(["name", "label"])["area_px"].agg(["size", "sum"])
    counts = {(str(key[0]), int(key[1])): (int(count), int(area)) for key, count, area in groups.itertuples()}
    subtypes = labels.taxonomy.subtypes
    return {
        name: {
            "subtype_instances": {s.name: counts.get((name, s.id), (0, 0))[0] for s in subtypes},
            "subtype_area_px": {s.name: counts.get((name, s.id), (0, 0))[1] for s in subtypes},
        }
        for name in contents.table["name"]
    }


LAYOUTS: dict[str, Layout] = {
    "png": Layout(
        files={IMAGE: "images/{name}.png", LABELS: "labels/{name}.png", INSTANCES: "instances/{name}.png"},
        folders={"train": "", "val": "", "test": "", None: ""},
        write_tables=_write_csv_tables,
    ),
    "nnunet": Layout(
        files={IMAGE: "images{folder}/{name}_0000.png", LABELS: "labels{folder}/{name}.png"},
        folders={"train": "Tr", "val": "Tr", "test": "Ts", None: "Tr"},
        write_tables=_write_nnunet_tables,
        check=_check_nnunet,
        ignore_is_highest=True,
    ),
    "hf": Layout(
        files={
            IMAGE: "{folder}/images/{name}.png",
            LABELS: "{folder}/masks/{name}.png",
            INSTANCES: "{folder}/instances/{name}.png",
        },
        folders={"train": "train", "val": "validation", "test": "test", None: "data"},
        write_tables=_write_hf_tables,
    ),
}
