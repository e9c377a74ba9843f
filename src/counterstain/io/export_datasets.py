"""Exports to train with elsewhere: a raw dataset of nnU-Net v2, an image folder or a dataset of Hugging Face."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from counterstain.config import to_yaml
from counterstain.data.pseudonyms import pseudonyms
from counterstain.data.split import patient_key
from counterstain.errors import InputError
from counterstain.io.export_contents import FOR_FILES, Advance, Contents, Layout, Row, Sample
from counterstain.storage import replacing, write_json, write_text
from counterstain.taxonomy import BACKGROUND, IGNORE

IMAGE, LABELS, INSTANCES = "image", "label", "instances"
MAX_INSTANCE = 2**16 - 1  # in a PNG
NNUNET_NAME = re.compile(r"Dataset\d{3}_\w+")
NNUNET_FOLDS = 5
HF_SPLITS: dict[str | None, str] = {"train": "train", "val": "validation", "test": "test", None: "data"}
SHARD_PIXELS = 2**27  # of images in a Parquet file, some 300 MB of tissue
GROUP_PIXELS = 2**24  # that are in memory
COUNTS = ("subtype_instances", "subtype_area_px")
SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**12: "1M<n<10M"}
CARD = """\
---
license: other
license_name: to-be-filled-in
task_categories:
- image-segmentation
tags:
{tags}
size_categories:
- {size}
{configs}---
# {title}

| | |
|---|---|
{facts}

## Subtypes
| mask | subtype | instances | images | area (mm²) |
|---|---|---|---|---|
{subtypes}

## Use
{use}

Masks hold 0 = background, the numbers above, 255 = ignore; maps of instances a number per instance. Patients never lie
in two splits.{names} Not for diagnosis.
{recipe}"""
LOADING = """\
```python
from datasets import load_dataset

dataset = load_dataset({how})
```"""
PSEUDONYMS = " `patient` is a pseudonym, `number` that of the image in its source."


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


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
    counts, use = _counts_of(contents), LOADING.format(how='"imagefolder", data_dir="FOLDER"')
    write_text(out / "README.md", dataset_card(contents, use=use))
    layout, lines = IMAGE_FOLDER, dict[str, list[str]]()
    for row in contents.rows:
        files = {kind: path.partition("/")[2] for kind, path in layout.files_of(row).items()}  # from the line's folder
        line = {
            "file_name": files[IMAGE],
            "mask_file_name": files[LABELS],
            "instances_file_name": files[INSTANCES],
            **{key: value for key, value in row.items() if key not in {*FOR_FILES, "part"}},
            "mpp": contents.mpp,
            **counts(row["name"]),
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


# Parquet files with a dataset card


def _by_pixels(rows: Iterable[Row], limit: int) -> Iterator[list[Row]]:
    """Cut rows into runs of at most ``limit`` pixels, but of at least one image."""
    run, pixels = list[Row](), 0
    for row in rows:
        size = int(row["height_px"]) * int(row["width_px"])
        if run and pixels + size > limit:
            yield run
            run, pixels = [], 0
        run.append(row)
        pixels += size
    if run:
        yield run


def _parquet_shards(contents: Contents) -> dict[str, list[Row]]:
    shards, rows = dict[str, list[Row]](), contents.rows
    for part, split in HF_SPLITS.items():
        runs = list(_by_pixels((row for row in rows if row["part"] == part), SHARD_PIXELS))
        named = {f"data/{split}-{n:05d}-of-{len(runs):05d}.parquet": run for n, run in enumerate(runs)}
        shards |= named
    return shards


def _schema(names: Iterable[str]) -> pa.Schema:
    """Return the columns, with what ``datasets`` needs to decode them."""
    picture, counts = pa.struct({"bytes": pa.binary(), "path": pa.string()}), dict.fromkeys(names, pa.int64())
    pictures = dict.fromkeys((IMAGE, "mask", INSTANCES), picture)
    plain = {"number": pa.int64(), "patient": pa.string(), "score": pa.string(), "mpp": pa.float64()}
    values = {
        name: {"dtype": "float64" if kind == pa.float64() else str(kind), "_type": "Value"}
        for name, kind in plain.items()
    }
    features: dict[str, Any] = {name: {"_type": "Image"} for name in pictures} | values
    features |= {name: {s: {"dtype": "int64", "_type": "Value"} for s in counts} for name in COUNTS}
    schema = pa.schema(pictures | plain | {name: pa.struct(counts) for name in COUNTS})
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _counts_of(contents: Contents) -> Callable[[str], Row]:
    """Return what says of an image by its name how many instances of each subtype it has, and of what area."""
    areas, subtypes = contents.instances.groupby(["name", "subtype"])["area_px"], contents.taxonomy.subtypes
    known = dict(zip(COUNTS, (areas.size().to_dict(), areas.sum().to_dict()), strict=True))
    return lambda name: {kind: {s.name: int(of.get((name, s.id), 0)) for s in subtypes} for kind, of in known.items()}


def _parquet_row(contents: Contents, row: Row) -> Row:
    sample, name = contents.sample(row), f"{row['index']:06d}.png"
    pixels = {IMAGE: sample.image, "mask": sample.labels, INSTANCES: in_16_bits(sample)}
    return {
        **{kind: {"bytes": _png(of), "path": name} for kind, of in pixels.items()},
        "number": row["index"],
        "patient": pseudonyms([patient_key(str(row["patient"]))])[0],
        "score": None if row["score"] is None else str(row["score"]),
        "mpp": contents.mpp,
    }


def _write_parquet(path: Path, contents: Contents, rows: list[Row], advance: Advance) -> None:
    schema, counts = _schema(contents.taxonomy.names), _counts_of(contents)
    with replacing(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for group in _by_pixels(rows, GROUP_PIXELS):
            lines = []
            for row in group:
                lines.append(_parquet_row(contents, row) | counts(row["name"]))
                advance(1)
            writer.write_table(pa.Table.from_pylist(lines, schema))


def _write_parquet_tables(out: Path, contents: Contents) -> None:
    write_text(out / "taxonomy.yaml", to_yaml(contents.taxonomy))
    if (out / "README.md").exists():  # perhaps filled in since
        return
    splits = dict.fromkeys(Path(name).name.partition("-")[0] for name in _parquet_shards(contents))
    files = "\n".join(f"  - split: {split}\n    path: data/{split}-*" for split in splits)
    configs = f"configs:\n- config_name: default\n  data_files:\n{files}\n"
    use = LOADING.format(how='"FOLDER or OWNER/NAME"')
    write_text(out / "README.md", dataset_card(contents, use=use, configs=configs, names=PSEUDONYMS))


def dataset_card(contents: Contents, *, use: str, configs: str = "", names: str = "", recipe: str = "") -> str:
    """Return the card of a dataset; what only its owner knows is to be filled in."""
    table, recipe = contents.table, recipe or contents.recipe
    facts = {
        "images": f"{len(table):,} at {contents.mpp:g} micrometres per pixel",
        **({"patients": f"{table['patient'].nunique():,}"} if "patient" in table else {}),
        **({"patients behind generated images": f"{len(contents.patients_seen):,}"} if contents.patients_seen else {}),
        **contents.facts,
        **(
            {"left out": f"{len(contents.review['rejected']):,} images that people rejected"} if contents.review else {}
        ),
        "licence": "**fill in**: who may use this, and for what",
    }
    tags = ["histopathology", "counterstain", *(["synthetic"] if contents.patients_seen else [])]
    return CARD.format(
        title=contents.source.resolve().name,
        tags="\n".join(f"- {tag}" for tag in tags),
        size=next(name for most, name in SIZES.items() if len(table) < most),
        configs=configs,
        facts="\n".join(f"| {name} | {_in_table(said)} |" for name, said in facts.items()),
        subtypes="\n".join(_subtype_lines(contents)),
        use=use,
        names=names,
        recipe=f"\n## Recipe\n{recipe}\n" if recipe else "",
    )


def _subtype_lines(contents: Contents) -> Iterator[str]:
    for subtype in contents.taxonomy.subtypes:
        found = contents.instances[contents.instances["subtype"] == subtype.id]
        area = found["area_px"].sum() * contents.mpp**2 / 1e6
        name = _in_table(subtype.name)
        yield f"| {subtype.id} | {name} | {len(found):,} | {found['name'].nunique():,} | {area:.3g} |"


def _in_table(text: str) -> str:
    return text.replace("|", "\\|")


PARQUET = Layout(
    files={},
    writers={},
    shards=_parquet_shards,
    write_shard=_write_parquet,
    write_tables=_write_parquet_tables,
    of_others=("README.md",),
    names_patients=False,
)
