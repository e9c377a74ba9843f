"""Import of images with label files into a cohort: of those that a table lists, or of a dataset of another tool.

docs/inputs.md describes the table, docs/import.md all other inputs. All rows are checked before anything is written;
slides are written one by one, so that an interrupted import continues where it stopped.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from counterstain.config import build
from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.data.patches import Components, areas_of, components, image_key
from counterstain.data.region_store import Region
from counterstain.data.split import PATIENTS_SEEN_FILE, SAME_IMAGE, read_patients_seen
from counterstain.errors import ConfigError, CounterstainWarning, InputError
from counterstain.io.dataset_files import rows_of_text
from counterstain.io.datasets import READERS, Layout, layout_of
from counterstain.io.instances import commonest, kept, shows_labels
from counterstain.io.parts import hash_of
from counterstain.io.pixel_readers import read_image
from counterstain.io.row_labels import Labels, RowLabels, TableConfig
from counterstain.io.slides import area_average
from counterstain.io.table import checked_rows, csv_rows, read_table
from counterstain.progress import Progress, silent
from counterstain.storage import fingerprint, read_json, sha256_of, write_json
from counterstain.taxonomy import MEANINGS, Taxonomy

SAME_MPP = 0.01  # by which a given resolution may differ from the dataset's without a word
SHOWN = 5  # pairs of images that are alike
PACK_BYTES = 256 * 2**20  # decoded regions of a slide that are held in memory at once


def import_table(
    table: str | Path,
    *,
    mpp: float,
    out: str | Path,
    taxonomy: Taxonomy | None = None,
    legend: str | Path | None = None,
    instance_table: str | Path | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Cohort:
    """Import a CSV table of images and label images; ``import.json`` of the cohort counts what was taken and dropped.

    See :func:`counterstain.import_table` for the parameters; ``options`` are fields of :class:`TableConfig`. Where
    ``patients_seen.txt`` lies beside the table or its rows have the column patients_seen (a JSON list), as after an
    export of generated images, these patients count as trained on. An interrupted import is continued.

    Raises InputError where a row, an image or an option cannot be used; MismatchError where ``out`` belongs to another
    import. Nothing is left behind.
    """
    table = Path(table)
    config = build(TableConfig, {"mpp": mpp, **options}, f"import of {table}")
    subtypes = config.labels in {"mask", "instances"} and legend is None and instance_table is None
    rows = read_table(table, config.columns, subtypes=subtypes, known_subtypes=taxonomy is not None)
    labels = RowLabels(table, rows, config, taxonomy=taxonomy, legend=legend, instance_table=instance_table)
    source = {"kind": "table", "sha256": sha256_of(table)}
    return _import_rows(labels, Path(out), source=source, behind=patients_behind(table), progress=progress)


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
    progress: Progress = silent,
    **options: Any,
) -> Cohort:
    """Import a dataset in one of LAYOUTS, or in the one that its files show.

    See :func:`counterstain.import_dataset` for the parameters; ``options`` are fields of :class:`TableConfig`.
    """
    folder = Path(folder)
    root = folder.parent if folder.is_file() else folder
    layout = layout or layout_of(folder)
    dataset = READERS[layout](folder)
    if not dataset.rows:
        said = "".join(f"; left out: {count} x {reason}" for reason, count in sorted(dataset.left_out.items()))
        raise InputError(f"{folder}: no image with labels, laid out as {layout}{said}; --format names another layout")
    for reason, count in sorted(dataset.left_out.items()):
        warnings.warn(f"{folder}: left out: {count:,} x {reason}", CounterstainWarning, stacklevel=3)
    settings = {"mpp": _mpp(folder, mpp, dataset.mpp), **dataset.options, **options}
    config = build(TableConfig, settings, f"import of {folder}")
    text = rows_of_text(folder, dataset, patients, ignore_split=ignore_split)
    rows = checked_rows(folder, root, text, config.columns, known_subtypes=taxonomy is not None)
    places = [n for n in ("mpp_level0", "x_level0_px", "y_level0_px") if all(n in row for row in dataset.rows)]
    rows = rows.assign(**{name: [row[name] for row in dataset.rows] for name in places})
    taxonomy = taxonomy or (dataset.taxonomy if legend is None else None)
    labels = RowLabels(folder, rows, config, taxonomy=taxonomy, legend=legend, legend_map=dataset.legend)
    source = {"kind": "dataset", "layout": layout, "rows": fingerprint(text.astype(str).to_dict("records"))}
    beside = root / PATIENTS_SEEN_FILE
    behind = sorted(read_patients_seen(beside)) if beside.exists() else ()
    return _import_rows(labels, Path(out), source=source, behind=behind, progress=progress)


def _mpp(folder: Path, given: float | None, said: float | None) -> float:
    mpp = given if given is not None else said
    if mpp is None:
        raise ConfigError(f"{folder}: does not say its micrometres per pixel; give --mpp")
    if said is not None and abs(mpp - said) > SAME_MPP * said:
        warnings.warn(f"--mpp {mpp:g} overrules {said:g} of {folder}", CounterstainWarning, stacklevel=4)
    return mpp


def _import_rows(
    labels: RowLabels, out: Path, *, source: dict[str, Any], behind: Collection[str], progress: Progress
) -> Cohort:
    """Import rows that were checked; ``behind`` are the patients behind generated images.

    ``source`` tells this import from another; what the files, the options and the legend add to it is added here.
    """
    table, rows, config = labels.table, labels.rows, labels.config
    files, of_labels = rows["image"].map(hash_of), rows["label"].map(hash_of)
    maps = rows["instances"].dropna().map(hash_of)
    flat = [image for image in rows["image"][files.duplicated()] if image_key(read_image(image)) is None]
    with warnings.catch_warnings(action="ignore"):  # said at the end, of all that are alike in their pixels
        repeated_images(table, rows, files.where(~files.isin([hash_of(image) for image in flat])))
    source |= {
        "files": fingerprint([files.tolist(), of_labels.tolist(), *([maps.tolist()] if len(maps) else [])]),
        "options": config.identity(),
        **labels.identity,
    }
    if behind:
        source["patients_seen"] = sorted(behind)
    else:  # generated images share masks
        _check_labels(table, rows.assign(file=files, key=of_labels))
    writer = CohortWriter(out, taxonomy=labels.taxonomy, mpp=config.mpp * config.shrink, source=source)
    if writer.finished:
        return writer.finish(len(rows))
    try:
        with progress("regions", len(rows)) as advance:
            for slide, part, members in _packs(rows):
                if not writer.has(slide, part):
                    notes = _Notes()
                    regions = [_region(row, labels, notes) for row in members]
                    write_json(out / "notes" / f"{members[0]['number']}.json", vars(notes))
                    writer.add(slide, regions, part)
                elif labels.depends_on_order:
                    for row in members:
                        labels.read(row)  # for the colours that it draws values in
                advance(len(members))
        total = _total(out / "notes")
        report = _report(total, rows) | repeated_images(table, rows, rows["region"].map(total.images))
        _check_any(table, report, config)
    except InputError:
        _discard(out)
        raise
    write_json(out / "import.json", report)
    cohort = writer.finish(len(rows))
    shutil.rmtree(out / "notes", ignore_errors=True)
    return cohort


def repeated_images(table: Path, rows: pd.DataFrame, keys: pd.Series) -> dict[str, Any]:
    """Return how many rows repeat the image of another, and which pairs of patients have one image.

    Raises InputError where the two are in different parts. ``keys`` are hashes of the images, nothing for those of few
    colours; the column ``row`` names the place of each for messages.
    """
    known = rows.assign(key=keys, split=rows["split"].fillna("")).dropna(subset="key")
    pairs: dict[tuple[str, str], str] = {}
    for _, alike in known[known["key"].duplicated(keep=False)].groupby("key", sort=False):
        first, *others = alike[["row", "patient", "image", "split"]].itertuples(index=False, name=None)
        for row, patient, image, part in others:
            if patient != first[1]:
                said = (
                    f"{table} {row}: {image.name} of patient {patient} is the same image as {first[2].name} of "
                    f"patient {first[1]} in {first[0]}; remove one, or give both one patient"
                )
                if part != first[3]:
                    raise InputError(said)
                pairs.setdefault((first[1], patient), said)
    for said in islice(pairs.values(), SHOWN):
        warnings.warn(said, CounterstainWarning, stacklevel=4)
    return {"repeated_images": int(known["key"].duplicated().sum()), SAME_IMAGE: [list(pair) for pair in pairs]}


def _check_labels(table: Path, rows: pd.DataFrame) -> None:
    """Say where images have one label image, in two parts as an InputError; those of one value may be shared."""
    different = rows.drop_duplicates(["key", "file"])
    shared = different[different["key"].duplicated(keep=False)].groupby("key", sort=False)
    drawn = (alike for _, alike in shared if shows_labels(alike["label"].iloc[0]))
    for number, alike in enumerate(drawn):
        first, second = alike.iloc[0], alike.iloc[1]
        said = (
            f"{table} {second['row']}: {second['label'].name} of {second['image'].name} is the same as "
            f"{first['label'].name} of {first['image'].name} in {first['row']}; give each image its own label"
        )
        if len(set(alike["split"].dropna())) > 1:
            raise InputError(said)
        if number < SHOWN:
            warnings.warn(said, CounterstainWarning, stacklevel=3)


def patients_behind(table: Path) -> set[str]:
    """Return the patients behind generated images: those of the file beside a table, and of its own column."""
    beside = table.parent / PATIENTS_SEEN_FILE
    seen = set(read_patients_seen(beside)) if beside.exists() else set()
    for where, row in csv_rows(table, (), ("patients_seen",)):
        cell = row.get("patients_seen") or "[]"
        try:
            names = json.loads(cell)
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f'{where}: patients_seen is {cell[:40]!r}; expected a list such as ["p1", "p2"]')
        seen.update(names)
    return seen


def _check_any(table: Path, report: dict[str, Any], config: TableConfig) -> None:
    if report["subtypes"].keys() - MEANINGS.keys():
        return
    if report["subtypes"]:
        raise InputError(
            f"{table}: its label images hold nothing but 0 and 255 (ignore); if they are masks, give --labels mask"
        )
    if dropped := report["dropped_components"]:
        raise InputError(
            f"{table}: all {dropped} components are smaller than {config.min_area_px} px; give a lower --min-area-px"
        )
    left_out = ", ".join(f"{count:,} x {reason}" for reason, count in report.get("left_out", {}).items())
    raise InputError(
        f"{table}: no label image has a pixel of a subtype; "
        + (f"left out: {left_out}" if left_out else "are they the right files?")
    )


def _packs(rows: pd.DataFrame) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """Yield the rows of each slide; those of a slide too large for the memory in several parts, 0, 1, 2, …"""
    size = rows["height_px"] * rows["width_px"] * 7  # RGB and an int32 instance id
    number = size.groupby(rows["slide"]).cumsum() // PACK_BYTES
    for (slide, part), members in rows.groupby(["slide", number], sort=True):
        values = members.astype(object).where(members.notna(), None)
        records = [{str(key): value for key, value in row.items()} for row in values.to_dict("records")]
        yield str(slide), int(str(part)), records


def _region(row: dict[str, Any], read: RowLabels, notes: _Notes) -> Region:
    labels, image, config = read.read(row), read_image(row["image"]), read.config
    pixels = labels.pixels
    key = image_key(image)
    if config.shrink > 1:
        if min(pixels.shape) < config.shrink:
            size = f"{pixels.shape[1]} x {pixels.shape[0]} px"
            raise InputError(f"{row['label']}: {size} cannot be shrunk {config.shrink} times")
        y_edges, x_edges = (np.arange(side // config.shrink + 1) * config.shrink for side in pixels.shape)
        image, pixels = area_average(image, y_edges, x_edges), commonest(pixels, config.shrink)
    if labels.of_instances is None:
        found = components(pixels, config.min_area_px)
    else:
        found = kept(pixels, labels.of_instances, config.min_area_px)
    notes.add(found, read.taxonomy, labels)
    if key:
        notes.images[row["region"]] = key
    return Region(
        region=row["region"],
        slide=row["slide"],
        patient=row["patient"],
        image=image,
        instances=found.instances,
        subtypes=found.labels,
        score=row["score"],
        split=row["split"],
        mpp_level0=row.get("mpp_level0", config.mpp),
        origin_xy_level0_px=(int(row.get("x_level0_px") or 0), int(row.get("y_level0_px") or 0)),
    )


@dataclass
class _Notes:
    """Counts of a pack for the report: anything dropped, instances and area by subtype."""

    counts: Counter[str] = field(default_factory=Counter)
    instances: Counter[str] = field(default_factory=Counter)
    area_px: Counter[str] = field(default_factory=Counter)
    masks: Counter[str] = field(default_factory=Counter)
    images: dict[str, str] = field(default_factory=dict)  # region -> key of its image
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> objects of label files

    def add(self, found: Components, taxonomy: Taxonomy, labels: Labels) -> None:
        for instance, area in zip(*(part.tolist() for part in areas_of(found.instances)), strict=True):
            self.instances[taxonomy.name_of(found.labels[instance])] += 1
            self.area_px[taxonomy.name_of(found.labels[instance])] += area
        self.counts["dropped_components"] += found.dropped
        self.counts["dropped_px"] += found.dropped_px
        self.counts["regions_without_instance"] += not found.labels
        self.left_out.update(labels.left_out)
        if labels.kind:
            self.masks[labels.kind] += 1


def _total(notes: Path) -> _Notes:
    total = _Notes()
    for file in sorted(notes.glob("*.json")):
        for name, counts in read_json(file).items():
            getattr(total, name).update(counts)
    return total


def _report(total: _Notes, rows: pd.DataFrame) -> dict[str, Any]:
    return {
        "regions": len(rows),
        "slides": int(rows["slide"].nunique()),
        "patients": int(rows["patient"].nunique()),
        "masks": dict(sorted(total.masks.items())),
        **({"left_out": dict(sorted(total.left_out.items()))} if total.left_out else {}),
        **total.counts,
        "subtypes": {
            n: {"instances": total.instances[n], "area_px": total.area_px[n]} for n in sorted(total.instances)
        },
    }


def _discard(out: Path) -> None:
    """Remove what this import wrote; the folder itself too, unless something else lies in it."""
    for name in ("packs", "parts", "notes"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "run.json").unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()
