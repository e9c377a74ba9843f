"""Export of a cohort or a synthetic set for other tools: ordinary images, training data, QuPath, OME-Zarr.

docs/exports.md shows the files of each format. ``png``, made here, is read back by ``counterstain import dataset``,
instances included; ``import table`` reads its table with connected components for instances. Generated images bring
``patients_seen.txt``, a line per patient behind them, and a column of the same name in ``table.csv``; the import keeps
these patients out of evaluation.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pandas as pd

from counterstain.config import Config, to_yaml
from counterstain.data.pseudonyms import pseudonyms
from counterstain.data.split import PATIENTS_SEEN_FILE, patient_key
from counterstain.errors import CounterstainWarning, MismatchError
from counterstain.io import export_datasets, export_viewers
from counterstain.io.export_contents import Contents, Layout, choose_parts, contents_of, whole_class
from counterstain.io.export_datasets import IMAGE, INSTANCES, LABELS, MAX_INSTANCE, PNG_FILES
from counterstain.progress import Progress, silent
from counterstain.remote import Place
from counterstain.storage import RUN_FILE, claim, read_json, write_csv, write_json, write_text
from counterstain.taxonomy import IGNORE

REPORT_FILE = "export.json"
FIRST_COLUMNS = [IMAGE, LABELS, INSTANCES, "region", "slide", "patient", "part", "score", "mpp"]
ENDS = {".png": b"IEND\xaeB`\x82", ".parquet": b"PAR1"}  # how whole files end
TEXTS = {".csv", ".geojson", ".groovy", ".json", ".jsonl", ".md", ".txt", ".yaml"}
LONGEST_END = 8


class ExportConfig(Config):
    """What an export holds."""

    file_format: Literal["png", "nnunet", "hf", "huggingface", "qupath", "ome-zarr"]
    """Ordinary images, a raw dataset of nnU-Net v2, an image folder or a Parquet dataset of Hugging Face, a QuPath
    project, or OME-Zarr images with labels."""
    labels: Literal["subtypes", "tumour"] = "subtypes"
    """A label for every subtype, or one for all of them."""
    parts: tuple[Literal["train", "val", "test"], ...] = ()
    """Parts of the split; everything if empty."""


def export(
    source: Place,
    out: Path,
    config: ExportConfig,
    progress: Progress = silent,
    *,
    facts: Mapping[str, str] | None = None,
    recipe: str = "",
) -> int:
    """Export a cohort, or a synthetic set as a training part, and return the number of images.

    ``facts`` and ``recipe`` are what else a card says of a synthetic set. ``export.json`` comes last: an export that
    has it is complete, and only files that are missing or cut short since are written again, with a warning; one that
    was interrupted is continued.

    Raises InputError where there is no such source or part, or the format cannot hold it, and MismatchError where
    ``out`` holds something else, or a file that somebody has changed.
    """
    contents, layout = replace(contents_of(source), facts=facts or {}, recipe=recipe), LAYOUTS[config.file_format]
    contents = choose_parts(contents, config.parts) if config.parts else contents
    contents = whole_class(contents) if config.labels == "tumour" else contents
    layout.check(out, contents)
    claim(out, "export", {"source": contents.fingerprint, **config.model_dump(mode="json")})
    if (out / REPORT_FILE).exists() and not _lost_again(out, contents, layout):
        return len(contents.table)
    for half_written in out.rglob(".*.partial-*"):
        _remove(half_written)
    if layout.ignore_is_highest:
        contents.lookup[IGNORE] = contents.taxonomy.num_labels
    with progress("images", len(contents.table)) as advance:
        layout.write_images(out, contents, advance)
    if seen := contents.patients_seen:  # before any table that could be imported without it
        names = seen if layout.names_patients else pseudonyms(map(patient_key, seen))
        write_text(out / PATIENTS_SEEN_FILE, "\n".join(names) + "\n")
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
    kept = {name: size for name, size in sizes.items() if not name.startswith(layout.of_others)}
    write_json(out / REPORT_FILE, report | {"bytes": kept})
    return len(contents.table)


def _lost_again(out: Path, contents: Contents, layout: Layout) -> set[str]:
    """Return the files that a finished export has lost, and remove what is left of their images."""
    images = layout.images(contents)
    lost = _lost_files(out, images)
    for name in images:
        if name in lost or any(file.startswith(f"{name}/") for file in lost):
            _remove(out / name)
    if lost:
        said = f"{out}: {len(lost)} files are missing or cut short; they are written again"
        warnings.warn(said, CounterstainWarning, stacklevel=3)
    return lost


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _lost_files(out: Path, images: Iterable[str]) -> set[str]:
    """Return the files of a finished export that are missing or cut short; MismatchError where one was changed."""
    lost, sizes = set(), read_json(out / REPORT_FILE).get("bytes")  # which earlier versions did not note
    for name, size in (dict.fromkeys(images) if sizes is None else sizes).items():
        file = out / name
        found = file.stat().st_size if file.is_file() else 0
        if found == size:
            continue
        with file.open("rb") if found else io.BytesIO() as content:
            content.seek(-min(found, LONGEST_END), os.SEEK_END)
            end = content.read()
        expected = ENDS.get(file.suffix, b"\n" if file.suffix in TEXTS else None) if ".zarr/" not in name else None
        if not (end.endswith(expected) if expected else size is not None and found > size):
            lost.add(name)
        elif size is not None:
            raise MismatchError(f"{file}: was changed since it was exported; move it away or give another --out")
    return lost


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
    table = PNG.table(contents)
    if contents.patients_seen:  # in each row, so that none is without it in another table
        table["patients_seen"] = json.dumps(contents.patients_seen, ensure_ascii=False)
    write_csv(out / "table.csv", table[[*FIRST_COLUMNS, *table.columns.drop(FIRST_COLUMNS)]])


PNG = Layout(
    files={IMAGE: "images/{name}.png", LABELS: "labels/{name}.png", INSTANCES: "instances/{name}.png"},
    writers=PNG_FILES,
    write_tables=_write_csv_tables,
)
LAYOUTS = {
    "png": PNG,
    "nnunet": export_datasets.NNUNET,
    "hf": export_datasets.IMAGE_FOLDER,
    "huggingface": export_datasets.PARQUET,
    "qupath": export_viewers.PROJECT,
    "ome-zarr": export_viewers.STORES,
}
