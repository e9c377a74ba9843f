"""Import of a table of images and label images into a cohort.

Two kinds of label images: a ``mask`` of the tissue class, soft or binary, whose subtype stands in the table, and
``ids``, where every pixel holds the id of its subtype (0 = background, 255 = ignore). Instances are connected
components. The whole table is checked before anything is written; slides are written one by one, so that a killed
import goes on where it was. Where ``patients_seen.txt`` lies beside the table, as after an export of generated images,
the patients that it names count as trained on.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from counterstain.config import Config, build
from counterstain.data.cohort import Cohort, CohortWriter, Region
from counterstain.data.instances import Components, components
from counterstain.data.split import PATIENTS_SEEN_FILE, read_patients_seen
from counterstain.errors import InputError, TaxonomyError
from counterstain.io.slides import area_average
from counterstain.io.table import Columns, check_subtypes, read_image, read_label_image, read_table
from counterstain.storage import fingerprint, read_json, sha256_of, write_json
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy, colours

PACK_BYTES = 256 * 2**20  # decoded regions of a slide that are held in memory at once
BYTES_PER_PIXEL = 7  # RGB and an int32 instance id

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class TableConfig(Config):
    """How a table of images becomes a cohort."""

    mpp: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
    """Micrometres per pixel of the images."""
    shrink: Annotated[int, Field(ge=1, le=64)] = 1
    """Whole number by which images are shrunk: 2 makes a cohort of 0.5 from images of 0.25 um per pixel. Colours are
    averaged; a pixel of the cohort gets the label that most of its area has. What is left over at the right and lower
    edge is cut off."""
    tissue_class: Annotated[str, Field(min_length=1, max_length=80)] = "tumour"
    """What all subtypes together are called, where no taxonomy is given."""
    labels: Literal["mask", "ids"] = "mask"
    """``mask``: the tissue class is where pixels are above the threshold; ``ids``: each pixel holds a subtype's id."""
    threshold: Annotated[int, Field(ge=0, le=254)] = 127
    """Masks: values above it are tissue class. Masks of just 0 and 1 are recognised and need none."""
    min_area_px: Annotated[int, Field(ge=0)] = 0
    """Smaller components, in pixels of the cohort, become background; they are counted in ``import.json``."""
    columns: Columns = Columns()
    """What the columns of the table are called."""


def import_table(
    table: Path,
    *,
    mpp: float,
    out: Path,
    taxonomy: Taxonomy | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Cohort:
    """Import a CSV table of images and label images.

    Parameters
    ----------
    table : Path
        CSV with columns image, label, patient, subtype (masks only) and perhaps slide, part, score, region.
    mpp : float
        Micrometres per pixel of the images.
    out : Path
        Folder of the cohort. An interrupted import into it goes on.
    taxonomy : Taxonomy, optional
        Required for ``labels="ids"``; otherwise built from the subtypes of the table, sorted by name.
    progress : callable, optional
        As :func:`counterstain.progress.bar`: opened with a label and the number of regions, told of those done.
    **options
        Fields of :class:`TableConfig`.

    Returns
    -------
    Cohort
        Its ``import.json`` holds counts by subtype and what was dropped.

    Raises
    ------
    InputError
        A row, an image or an option cannot be used. Nothing is left behind.
    MismatchError
        ``out`` belongs to another import.
    """
    config = build(TableConfig, {"mpp": mpp, **options}, f"import of {table}")
    rows = read_table(table, config.columns, labels=config.labels)
    taxonomy = _taxonomy(table, rows, config, taxonomy)
    threshold = _threshold(table, rows, config) if config.labels == "mask" else None
    source = {
        "kind": "table",
        "sha256": sha256_of(table),
        "files": fingerprint([[sha256_of(file) for file in rows[column]] for column in ("image", "label")]),
        "options": config.model_dump(mode="json"),
        **_patients_seen(table),
    }
    writer = CohortWriter(out, taxonomy=taxonomy, mpp=config.mpp * config.shrink, source=source)
    if writer.finished:
        return writer.finish()
    try:
        with (progress or _silent)("regions", len(rows)) as advance:
            _write_packs(writer, rows, config, threshold, advance)
        report = _report(out / "notes", rows, threshold, config)
        _check_any(table, report, config)
    except InputError:
        _discard(out)
        raise
    write_json(out / "import.json", report)
    cohort = writer.finish()
    shutil.rmtree(out / "notes", ignore_errors=True)
    return cohort


def _taxonomy(path: Path, rows: pd.DataFrame, config: TableConfig, given: Taxonomy | None) -> Taxonomy:
    if config.labels == "ids" and given is None:
        raise InputError(f"{path}: label images of ids need a taxonomy that names the ids; give one with --taxonomy")
    if given is not None:
        if config.labels == "mask":
            check_subtypes(path, rows, given)
        return given
    names = sorted(rows["subtype"].unique())
    subtypes = [
        {"id": i, "name": name, "colour": colour}
        for i, (name, colour) in enumerate(zip(names, colours(len(names)), strict=True), start=1)
    ]
    content = {"name": path.stem[:80], "tissue_class": config.tissue_class, "subtypes": subtypes}
    return build(Taxonomy, content, f"{path}: column {config.columns.subtype!r}")


def _patients_seen(table: Path) -> dict[str, list[str]]:
    """Return who is behind images that counterstain generated and exported; nothing of real ones."""
    file = table.parent / PATIENTS_SEEN_FILE
    return {"patients_seen": list(read_patients_seen(file))} if file.exists() else {}


def _threshold(path: Path, rows: pd.DataFrame, config: TableConfig) -> int:
    """Return 0 where no mask of the table goes above 1, otherwise the configured threshold."""
    if config.threshold == 0:
        return 0
    highest = 0
    for label in rows["label"]:
        highest = max(highest, int(read_label_image(label).max()))
        if highest > config.threshold:
            return config.threshold
    if highest > 1:
        raise InputError(
            f"{path}: its masks hold values up to {highest}, none above the threshold of {config.threshold}; "
            f"give a lower --threshold, or --labels ids where values are the ids of subtypes"
        )
    return 0


def _check_any(table: Path, report: dict[str, Any], config: TableConfig) -> None:
    """Raise InputError where nothing but background was imported."""
    if report["subtypes"]:
        return
    dropped = report["dropped_components"]
    why = "no label image has a pixel of a subtype; are they the right files?"
    if dropped:
        why = f"all {dropped} components are smaller than {config.min_area_px} px; give a lower --min-area-px"
    raise InputError(f"{table}: {why}")


def _write_packs(
    writer: CohortWriter,
    rows: pd.DataFrame,
    config: TableConfig,
    threshold: int | None,
    advance: Callable[[int], None],
) -> None:
    for name, members in _packs(rows):
        if not writer.has(name):
            notes = _Notes()
            regions = [_region(row, config, threshold, writer.taxonomy, notes) for row in members]
            write_json(writer.folder / "notes" / f"{members[0]['row']}.json", notes.as_json())
            writer.add(name, regions)
        advance(len(members))


def _packs(rows: pd.DataFrame) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the rows of each slide under its name; a slide too large for the memory in several packs."""
    size = rows["height_px"] * rows["width_px"] * BYTES_PER_PIXEL
    number = size.groupby(rows["slide"]).cumsum() // PACK_BYTES
    for (slide, part), members in rows.groupby(["slide", number], sort=True):
        values = members.astype(object).where(members.notna(), None)
        records = [{str(key): value for key, value in row.items()} for row in values.to_dict("records")]
        yield f"{slide}/{part}" if part else str(slide), records


def _region(
    row: dict[str, Any], config: TableConfig, threshold: int | None, taxonomy: Taxonomy, notes: _Notes
) -> Region:
    label_image = read_label_image(row["label"], palette_ids=config.labels == "ids")
    if threshold is None:
        _check_ids(row["label"], label_image, taxonomy)
    else:
        label_image = np.where(label_image > threshold, taxonomy.id_of(row["subtype"]), BACKGROUND).astype(np.uint8)
    found = components(_shrunk_labels(row["label"], label_image, config.shrink), config.min_area_px)
    notes.add(found, taxonomy)
    return Region(
        region=row["region"],
        slide=row["slide"],
        patient=row["patient"],
        image=_shrunk(read_image(row["image"]), config.shrink),
        instances=found.instances,
        subtypes=found.labels,
        score=row["score"],
        split=row["split"],
        mpp_level0=config.mpp,
    )


def _shrunk(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Average blocks of (H, W, C) pixels; what is left over at the edges is cut off."""
    if factor == 1:
        return pixels
    y_edges, x_edges = (np.arange(length // factor + 1) * factor for length in pixels.shape[:2])
    return area_average(pixels, y_edges, x_edges)


def _shrunk_labels(path: Path, labels: np.ndarray, factor: int) -> np.ndarray:
    """Give each block of (H, W) labels the label that most of it has, the lowest of several."""
    if factor == 1:
        return labels
    if min(labels.shape) < factor:
        raise InputError(f"{path}: {labels.shape[1]} x {labels.shape[0]} px cannot be shrunk {factor} times")
    ids = np.unique(labels)
    shares = _shrunk(np.where(labels[..., None] == ids, 255, 0).astype(np.uint8), factor)
    return np.asarray(ids[shares.argmax(-1)])


def _check_ids(path: Path, label_image: np.ndarray, taxonomy: Taxonomy) -> None:
    known = np.zeros(256, dtype=bool)
    known[[BACKGROUND, IGNORE, *(subtype.id for subtype in taxonomy.subtypes)]] = True
    wrong = np.argwhere(~known[label_image])
    if len(wrong):
        y, x = wrong[0]
        names = ", ".join(f"{subtype.id} {subtype.name}" for subtype in taxonomy.subtypes)
        raise TaxonomyError(
            f"{path}: unknown id {label_image[y, x]} at row {y}, column {x} ({len(wrong)} pixels in all); "
            f"{taxonomy.name} has 0 background, {names}, 255 ignore"
        )


class _Notes:
    """What is to be known about a pack that its tables do not say."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.instances: Counter[str] = Counter()
        self.area_px: Counter[str] = Counter()

    def add(self, found: Components, taxonomy: Taxonomy) -> None:
        areas = np.bincount(found.instances.ravel(), minlength=len(found.labels) + 1).tolist()
        for instance, label in found.labels.items():
            self.instances[taxonomy.name_of(label)] += 1
            self.area_px[taxonomy.name_of(label)] += areas[instance]
        self.counts["dropped_components"] += found.dropped
        self.counts["dropped_px"] += found.dropped_px
        self.counts["regions_without_instance"] += not found.labels

    def as_json(self) -> dict[str, dict[str, int]]:
        return {"counts": self.counts, "instances": self.instances, "area_px": self.area_px}


def _report(notes: Path, rows: pd.DataFrame, threshold: int | None, config: TableConfig) -> dict[str, Any]:
    total = _Notes()
    for file in sorted(notes.glob("*.json")):
        for name, counts in read_json(file).items():
            getattr(total, name).update(counts)
    by_subtype = {
        name: {"instances": total.instances[name], "area_px": total.area_px[name]} for name in sorted(total.instances)
    }
    return {
        "regions": len(rows),
        "slides": int(rows["slide"].nunique()),
        "patients": int(rows["patient"].nunique()),
        "threshold": threshold,
        "masks_of_0_and_1": threshold == 0 and config.threshold != 0,
        **total.counts,
        "subtypes": by_subtype,
    }


@contextmanager
def _silent(_label: str, _total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _regions: None


def _discard(out: Path) -> None:
    """Remove what this import wrote; the folder itself too, unless something else lies in it."""
    for name in ("packs", "parts", "notes"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "run.json").unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()
