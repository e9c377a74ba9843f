"""Exports to train with elsewhere: a raw dataset of nnU-Net v2, an image folder or a dataset of Hugging Face."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from counterstain.config import to_yaml
from counterstain.errors import InputError
from counterstain.io.export_contents import FOR_FILES, Contents, Layout, Row, Sample
from counterstain.storage import replacing, write_json, write_text
from counterstain.taxonomy import BACKGROUND, IGNORE

IMAGE, LABELS, INSTANCES = "image", "label", "instances"
MAX_INSTANCE = 2**16 - 1  # in a PNG
NNUNET_NAME = re.compile(r"Dataset\d{3}_\w+")
NNUNET_FOLDS = 5
HF_SPLITS: dict[str | None, str] = {"train": "train", "val": "validation", "test": "test", None: "data"}
SHARD_PIXELS = 2**27  # of images in a Parquet file, some 300 MB of tissue
GROUP_ROWS = 100
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


def _save_png(path: Path, pixels: np.ndarray) -> None:
    with replacing(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")


def in_16_bits(sample: Sample) -> np.ndarray:
    """Return the instances of an image as (H, W) uint16; ids become ranks where one exceeds 16 bits.

    Raises InputError where there are too many.
    """
    instances, ids = sample.instances, list(sample.subtypes)
    if len(ids) > MAX_INSTANCE:
        raise InputError(
            f"{sample.where}: has {len(ids):,} instances, PNG holds {MAX_INSTANCE:,}; import smaller regions"
        )
    if instances.max(initial=0) > MAX_INSTANCE:
        instances = np.where(instances == BACKGROUND, 0, np.searchsorted(np.sort(ids), instances) + 1)
    return instances.astype(np.uint16)


PNG_FILES: dict[str, Callable[[Path, Sample], None]] = {
    IMAGE: lambda path, sample: _save_png(path, sample.image),
    LABELS: lambda path, sample: _save_png(path, sample.labels),
    INSTANCES: lambda path, sample: _save_png(path, in_16_bits(sample)),
}


def _check_nnunet(out: Path, contents: Contents) -> None:
    if not NNUNET_NAME.fullmatch(out.name):
        word = re.sub(r"\W", "_", contents.source.resolve().name)
        raise InputError(
            f"--out {out}: nnU-Net needs a dataset name with a number; give --out {out.parent / 'Dataset001_'}{word}"
        )
    reserved = {"background", "ignore"}.intersection(contents.taxonomy.names)
    if reserved:
        raise InputError(f"{contents.source}: nnU-Net reserves the name {min(reserved)!r}; rename that subtype")
    if (contents.table["part"] == "test").all():
        raise InputError(f"{contents.source}: nothing to train on; export the training part too")


def _write_nnunet_tables(out: Path, contents: Contents) -> None:
    training = [row for row in contents.rows if row["part"] != "test"]
    if folds := _training_folds(training):
        write_json(out / "splits_final.json", folds)
    values = {"background": 0} | {s.name: s.id for s in contents.taxonomy.subtypes}
    if (contents.instances["subtype"] == IGNORE).any():
        values["ignore"] = contents.taxonomy.num_labels
    description = {
        "name": out.name,
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": values,
        "numTraining": len(training),
        "file_ending": ".png",
        "overwrite_image_reader_writer": "NaturalImage2DIO",
        "mpp": contents.mpp,
    }
    write_json(out / "dataset.json", description)


def _training_folds(rows: list[Row]) -> list[dict[str, list[str]]]:
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


NNUNET = Layout(
    files={IMAGE: "images{folder}/{name}_0000.png", LABELS: "labels{folder}/{name}.png"},
    writers=PNG_FILES,
    folders={"train": "Tr", "val": "Tr", "test": "Ts", None: "Tr"},
    write_tables=_write_nnunet_tables,
    check=_check_nnunet,
    ignore_is_highest=True,
)


def _write_hf_tables(out: Path, contents: Contents) -> None:
    write_text(out / "taxonomy.yaml", to_yaml(contents.taxonomy))
    subtypes = contents.taxonomy.subtypes
    meanings = ", ".join(f"{s.id} = {s.name}" for s in subtypes)
    name, count = contents.source.resolve().name, len(contents.table)
    write_text(out / "README.md", CARD.format(source=name, count=count, mpp=contents.mpp, labels=meanings))
    by_subtype = contents.instances.groupby(["name", "subtype"])["area_px"]
    sizes, areas = by_subtype.size().to_dict(), by_subtype.sum().to_dict()
    layout, lines = IMAGE_FOLDER, dict[str, list[str]]()
    for row in contents.rows:
        files = {kind: path.partition("/")[2] for kind, path in layout.files_of(row).items()}  # from the line's folder
        line = {
            "file_name": files[IMAGE],
            "mask_file_name": files[LABELS],
            "instances_file_name": files[INSTANCES],
            **{key: value for key, value in row.items() if key not in {*FOR_FILES, "part"}},
            "mpp": contents.mpp,
            "subtype_instances": {s.name: int(sizes.get((row["name"], s.id), 0)) for s in subtypes},
            "subtype_area_px": {s.name: int(areas.get((row["name"], s.id), 0)) for s in subtypes},
        }
        lines.setdefault(layout.folders[row["part"]], []).append(json.dumps(line))
    for folder, of_part in lines.items():
        write_text(out / folder / "metadata.jsonl", "\n".join(of_part) + "\n")


IMAGE_FOLDER = Layout(
    files={
        IMAGE: "{folder}/images/{name}.png",
        LABELS: "{folder}/masks/{name}.png",
        INSTANCES: "{folder}/instances/{name}.png",
    },
    writers=PNG_FILES,
    folders=HF_SPLITS,
    write_tables=_write_hf_tables,
)
