"""Export of a cohort or a synthetic set: ordinary images, a dataset of nnU-Net, an image folder of Hugging Face.

docs/inputs.md shows the files of each. ``png`` is read back by ``counterstain import dataset``, instances included;
``import table`` reads its table with connected components for instances. Generated
images bring ``patients_seen.txt``, a line per patient behind them, and a column of the same name in ``table.csv``; the
import keeps these patients out of evaluation.
"""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image

from counterstain.config import Config, to_yaml
from counterstain.data.cohort import PARTS, Cohort
from counterstain.data.patch_set import HEADER_FILE, PatchSet
from counterstain.data.patches import label_mask
from counterstain.data.review import not_rejected
from counterstain.data.split import PATIENTS_SEEN_FILE
from counterstain.errors import CounterstainWarning, InputError, MismatchError
from counterstain.progress import Progress, silent
from counterstain.remote import Place
from counterstain.storage import RUN_FILE, claim, fingerprint, read_json, replacing, write_csv, write_json, write_text
from counterstain.taxonomy import BACKGROUND, IGNORE, Subtype, Taxonomy, colours

REPORT_FILE = "export.json"
IMAGE, LABELS, INSTANCES = "image", "label", "instances"
FIRST_COLUMNS = [IMAGE, LABELS, INSTANCES, "region", "slide", "patient", "part", "score", "mpp"]
MAX_INSTANCE = 2**16 - 1  # in a PNG
PNG_END = b"IEND\xaeB`\x82"
MAX_NAME = 100  # some file systems stop at 143 characters
NNUNET_NAME = re.compile(r"Dataset\d{3}_\w+")
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

Row = dict[str, Any]


class ExportConfig(Config):
    """What an export holds."""

    file_format: Literal["png", "nnunet", "hf"]
    """Ordinary images, a raw dataset of nnU-Net v2, or an image folder of Hugging Face's ``datasets``."""
    labels: Literal["subtypes", "tumour"] = "subtypes"
    """A label for every subtype, or one for all of them."""
    parts: tuple[Literal["train", "val", "test"], ...] = ()
    """Parts of the split; everything if empty."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A cohort or a synthetic set, laid out for export."""

    source: Place
    taxonomy: Taxonomy  # labels of the export
    mpp: float
    fingerprint: str  # what distinguishes these contents from others
    table: pd.DataFrame  # a row per image: name (of its files), index, region, slide, patient, part, score, its source
    instances: pd.DataFrame  # a row per instance: name, instance, subtype (label in the export), area_px
    read: Callable[[int], tuple[np.ndarray, np.ndarray, dict[int, int]]]  # index -> image, instances, their subtypes
    review: Mapping[str, Any] = field(default_factory=dict)  # what of a set is left out, because people rejected it
    patients_seen: tuple[str, ...] = ()  # behind generated images: those of the masks and those the generator saw

    @property
    def rows(self) -> list[Row]:
        """The table as records; unknown values are None, arrays are lists."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        return [{str(k): v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in rows]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A kind of export."""

    files: Mapping[str, str]  # image, label and perhaps instances -> path in the export, of {name} and {folder}
    folders: Mapping[str | None, str]  # part of the split -> {folder}
    write_tables: Callable[[Path, Contents], None]  # called when all images are there
    check: Callable[[Path, Contents], None] = lambda _out, _contents: None  # InputError where it cannot be laid out so
    ignore_is_highest: bool = False  # whether the highest label, instead of 255, is ignored

    def files_of(self, row: Row) -> dict[str, str]:
        """Return the files of an image."""
        folder = self.folders[row["part"]]
        return {kind: path.format(name=row["name"], folder=folder) for kind, path in self.files.items()}


def export(source: Place, out: Path, config: ExportConfig, progress: Progress = silent) -> int:
    """Export a cohort, or a synthetic set as a training part, and return the number of images.

    ``export.json`` comes last: an export that has it is complete, and only files that are missing or cut short since
    are written again, with a warning; one that was interrupted is continued.

    Raises InputError where there is no such source or part, or the format cannot hold it, and MismatchError where
    ``out`` holds something else, or a file that somebody has changed.
    """
    contents = _contents_of(source)
    contents = _choose_parts(contents, config.parts) if config.parts else contents
    layout, lookup = LAYOUTS[config.file_format], np.arange(256, dtype=np.uint8)
    if config.labels == "tumour":
        contents, lookup = _whole_class(contents)
    layout.check(out, contents)
    claim(out, "export", {"source": contents.fingerprint, **config.model_dump(mode="json")})
    if (out / REPORT_FILE).exists():
        images = {path for row in contents.rows for path in layout.files_of(row).values()}
        lost = _lost_files(out, images)
        if not lost:
            return len(contents.table)
        for name in lost & images:
            (out / name).unlink(missing_ok=True)
        said = f"{out}: {len(lost)} files are missing or cut short; they are written again"
        warnings.warn(said, CounterstainWarning, stacklevel=2)
    for half_written in out.rglob(".*.partial-*"):
        half_written.unlink(missing_ok=True)
    if layout.ignore_is_highest:
        lookup[IGNORE] = contents.taxonomy.num_labels
    with progress("images", len(contents.table)) as advance:
        for row in contents.rows:
            write_image(out, row, contents, layout, lookup)
            advance(1)
    if contents.patients_seen:  # before any table that could be imported without it
        write_text(out / PATIENTS_SEEN_FILE, "\n".join(contents.patients_seen) + "\n")
    layout.write_tables(out, contents)
    report = {
        **config.model_dump(mode="json"),
        "source": contents.source.resolve().name,
        "fingerprint": contents.fingerprint,
        "mpp": contents.mpp,
        "images": len(contents.table),
        "patients": int(contents.table["patient"].nunique()),
        "instances": len(contents.instances),
        **contents.review,
    }
    written = (file for file in sorted(out.rglob("*")) if file.is_file() and file.name not in {REPORT_FILE, RUN_FILE})
    sizes = {file.relative_to(out).as_posix(): file.stat().st_size for file in written}
    write_json(out / REPORT_FILE, report | {"bytes": sizes})
    return len(contents.table)


def _lost_files(out: Path, images: Iterable[str]) -> set[str]:
    """Return the files of a finished export that are missing or cut short; MismatchError where one was changed."""
    lost, sizes = set(), read_json(out / REPORT_FILE).get("bytes")  # which earlier versions did not note
    for name, size in (dict.fromkeys(images) if sizes is None else sizes).items():
        file = out / name
        found = file.stat().st_size if file.is_file() else 0
        if found == size:
            continue
        with file.open("rb") if found else io.BytesIO() as content:
            content.seek(-min(found, len(PNG_END)), os.SEEK_END)
            end = content.read()
        if not end.endswith(PNG_END if file.suffix == ".png" else b"\n"):
            lost.add(name)
        elif size is not None:
            raise MismatchError(f"{file}: was changed since it was exported; move it away or give another --out")
    return lost


def write_image(out: Path, row: Row, contents: Contents, layout: Layout, lookup: np.ndarray) -> None:
    """Write the files of one image that are not there yet; ``lookup`` is (256,) subtype -> label of the export."""
    missing = {kind: out / path for kind, path in layout.files_of(row).items() if not (out / path).exists()}
    if not missing:
        return
    image, instances, subtypes = contents.read(row["index"])
    pixels: dict[str, Callable[[], np.ndarray]] = {
        IMAGE: lambda: image,
        LABELS: lambda: lookup[label_mask(instances, subtypes)],
        INSTANCES: lambda: _in_16_bits(instances, list(subtypes), f"{contents.source} region {row['region']}"),
    }
    for kind, path in missing.items():
        with replacing(path) as partial:
            Image.fromarray(pixels[kind]()).save(partial, format="PNG")


def file_names(names: Sequence[str]) -> list[str]:
    """Return a file name without suffix for each name: safe on every system, unique even where case is ignored."""
    safe = [re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".-")[:MAX_NAME] or "_" for name in names]
    counts = pd.Series([name.lower() for name in safe]).value_counts()
    return [
        short if short == name and counts[short.lower()] == 1 else f"{short}-{fingerprint(name)[:8]}"
        for short, name in zip(safe, names, strict=True)
    ]


def _in_16_bits(instances: np.ndarray, ids: Sequence[int], name: str) -> np.ndarray:
    """Replace ids by their rank among all of the image where one exceeds 16 bits."""
    if len(ids) > MAX_INSTANCE:
        raise InputError(f"{name}: has {len(ids):,} instances, PNG holds {MAX_INSTANCE:,}; import smaller regions")
    if instances.max(initial=0) > MAX_INSTANCE:
        instances = np.where(instances == BACKGROUND, 0, np.searchsorted(np.sort(ids), instances) + 1)
    return instances.astype(np.uint16)


def _contents_of(source: Place) -> Contents:
    if isinstance(source, Path) and ((source / HEADER_FILE).exists() or (source / "shards").exists()):
        return _of_set(PatchSet.open(source))
    return _of_cohort(Cohort.open(source))


def _of_cohort(cohort: Cohort) -> Contents:
    known = ["region", "slide", "patient", "score", "mpp_level0", "x_level0_px", "y_level0_px"]
    table = cohort.regions[known].assign(
        name=file_names(cohort.regions["region"].tolist()), index=range(len(cohort)), part=cohort.regions["split"]
    )
    names = dict(zip(table["region"], table["name"], strict=True))
    return Contents(
        source=cohort.folder,
        taxonomy=cohort.taxonomy,
        mpp=cohort.mpp,
        fingerprint=cohort.fingerprint,
        table=table,
        instances=cohort.instances.assign(name=cohort.instances["region"].map(names)),
        read=lambda index: (*cohort.read(index), cohort.subtypes(index)),
        patients_seen=tuple(cohort.source.get("patients_seen", ())),
    )


def _of_set(synthetic: PatchSet) -> Contents:
    patches = PatchSet(synthetic.folder, synthetic.header, cache_bytes=1)  # one shard at a time
    known, (review, shown, instances) = patches.header.model_dump(mode="json"), not_rejected(patches)
    table = shown.drop(columns="attempts").rename(columns={"region": "source_region"})
    names = [f"{index:06d}" for index in table["index"]]
    return Contents(
        source=patches.folder,
        taxonomy=patches.header.taxonomy,
        mpp=patches.header.mpp,
        fingerprint=fingerprint(known | ({"rejected": review["rejected"]} if review else {})),
        table=table.assign(name=names, region=names, part=patches.header.part, score=None),
        instances=instances.assign(name=[f"{index:06d}" for index in instances["index"]]),
        read=lambda index: ((patch := patches[index]).image, patch.instances, patch.subtypes),
        patients_seen=patches.header.patients_seen,
        review=review,
    )


def _choose_parts(contents: Contents, parts: Sequence[str]) -> Contents:
    found = [known for known in PARTS if (contents.table["part"] == known).any()]
    for part in sorted(set(parts) - set(found)):
        raise InputError(
            f"{contents.source}: nothing in split {part!r}; it has {', '.join(found) or 'no split'}; "
            "leave out --split to export everything"
        )
    table = contents.table[contents.table["part"].isin(parts)]
    return replace(contents, table=table, instances=contents.instances[contents.instances["name"].isin(table["name"])])


def _whole_class(contents: Contents) -> tuple[Contents, np.ndarray]:
    """Give all subtypes label 1; return with it the lookup, (256,) uint8."""
    known = contents.taxonomy
    whole = Subtype(id=1, name=known.tissue_class, colour=colours(1)[0])
    taxonomy = Taxonomy(name=f"{known.name[:70]}:tumour", tissue_class=known.tissue_class, subtypes=(whole,))
    lookup = np.arange(256, dtype=np.uint8)
    lookup[(lookup != BACKGROUND) & (lookup != IGNORE)] = 1
    instances = contents.instances.assign(subtype=lookup[contents.instances["subtype"].to_numpy()])
    return replace(contents, taxonomy=taxonomy, instances=instances), lookup


def _write_csv_tables(out: Path, contents: Contents) -> None:
    write_text(out / "taxonomy.yaml", to_yaml(contents.taxonomy))
    found = contents.instances
    numbers = found.groupby("name")["instance"]
    instances = {
        "image": "images/" + found["name"] + ".png",
        "instance": found["instance"].where(
            numbers.transform("max") <= MAX_INSTANCE, numbers.rank(method="dense").astype("int64")
        ),
        "subtype_id": found["subtype"],
        "subtype": found["subtype"].map({s.id: s.name for s in contents.taxonomy.subtypes} | {IGNORE: "ignore"}),
        "area_px": found["area_px"],
    }
    write_csv(out / "instances.csv", pd.DataFrame(instances))
    rows, behind = [], {}
    if contents.patients_seen:  # in each row, so that none is without it in another table
        behind["patients_seen"] = json.dumps(contents.patients_seen, ensure_ascii=False)
    for row in contents.rows:
        plain = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
        rows.append(plain | LAYOUTS["png"].files_of(row) | {"mpp": contents.mpp} | behind)
    table = pd.DataFrame(rows).drop(columns=["name", "index"])
    write_csv(out / "table.csv", table[[*FIRST_COLUMNS, *table.columns.drop(FIRST_COLUMNS)]])


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


def _write_hf_tables(out: Path, contents: Contents) -> None:
    write_text(out / "taxonomy.yaml", to_yaml(contents.taxonomy))
    subtypes = contents.taxonomy.subtypes
    meanings = ", ".join(f"{s.id} = {s.name}" for s in subtypes)
    name, count = contents.source.resolve().name, len(contents.table)
    write_text(out / "README.md", CARD.format(source=name, count=count, mpp=contents.mpp, labels=meanings))
    by_subtype = contents.instances.groupby(["name", "subtype"])["area_px"]
    sizes, areas = by_subtype.size().to_dict(), by_subtype.sum().to_dict()
    layout, lines = LAYOUTS["hf"], dict[str, list[str]]()
    for row in contents.rows:
        files = {kind: path.partition("/")[2] for kind, path in layout.files_of(row).items()}  # from the line's folder
        line = {
            "file_name": files[IMAGE],
            "mask_file_name": files[LABELS],
            "instances_file_name": files[INSTANCES],
            **{key: value for key, value in row.items() if key not in {"name", "index", "part"}},
            "mpp": contents.mpp,
            "subtype_instances": {s.name: int(sizes.get((row["name"], s.id), 0)) for s in subtypes},
            "subtype_area_px": {s.name: int(areas.get((row["name"], s.id), 0)) for s in subtypes},
        }
        lines.setdefault(layout.folders[row["part"]], []).append(json.dumps(line))
    for folder, of_part in lines.items():
        write_text(out / folder / "metadata.jsonl", "\n".join(of_part) + "\n")


LAYOUTS: dict[str, Layout] = {
    "png": Layout(
        files={IMAGE: "images/{name}.png", LABELS: "labels/{name}.png", INSTANCES: "instances/{name}.png"},
        folders=dict.fromkeys((*PARTS, None), ""),
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
