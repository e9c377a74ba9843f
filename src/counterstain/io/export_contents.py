"""What an export holds: the regions of a cohort or the patches of a synthetic set, and what their labels become.

Shapes: H, W = rows and columns in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from counterstain.data.cohort import PARTS, Cohort
from counterstain.data.patch_set import HEADER_FILE, PatchSet
from counterstain.errors import InputError
from counterstain.storage import fingerprint
from counterstain.taxonomy import BACKGROUND, IGNORE, Subtype, Taxonomy, colours

MAX_INSTANCE = 2**16 - 1  # in a PNG
MAX_NAME = 100  # some file systems stop at 143 characters

Row = dict[str, Any]


class ExportedLabels(NamedTuple):
    """The labels of an export."""

    taxonomy: Taxonomy
    lookup: np.ndarray  # (256,) uint8, label in the cohort -> label in the export


def exported_labels(taxonomy: Taxonomy, *, whole_class: bool) -> ExportedLabels:
    """Return the labels of an export: those of the subtypes, or label 1 for all of them."""
    lookup = np.arange(256, dtype=np.uint8)
    if not whole_class:
        return ExportedLabels(taxonomy, lookup)
    lookup[(lookup != BACKGROUND) & (lookup != IGNORE)] = 1
    whole = Subtype(id=1, name=taxonomy.tissue_class, colour=colours(1)[0])
    name = f"{taxonomy.name[:70]}:tumour"
    return ExportedLabels(Taxonomy(name=name, tissue_class=taxonomy.tissue_class, subtypes=(whole,)), lookup)


def stored_numbers(ids: pd.Series) -> pd.Series:
    """Return the number of each instance in the file of its image: its id, or its rank where an id exceeds 16 bits."""
    return ids if ids.max() <= MAX_INSTANCE else ids.rank(method="dense").astype("int64")


def stored_instances(instances: np.ndarray, ids: Iterable[int], name: str) -> np.ndarray:
    """Return an instance map, (H, W) int32, as it is stored, (H, W) uint16.

    ``ids`` are all instances of the image, ``name`` is the image's for the message.

    Raises
    ------
    InputError
        There are more instances than 16 bits can number.
    """
    known = np.array(sorted(ids), np.int64)
    if len(known) > MAX_INSTANCE:
        raise InputError(f"{name}: has {len(known):,} instances, PNG holds {MAX_INSTANCE:,}; import smaller regions")
    if instances.max(initial=0) <= MAX_INSTANCE:
        return instances.astype(np.uint16)
    return np.where(instances == 0, 0, np.searchsorted(known, instances) + 1).astype(np.uint16)


class Shown(NamedTuple):
    """The pixels of one region or patch."""

    image: np.ndarray  # (H, W, 3) uint8
    instances: np.ndarray  # (H, W) int32, 0 = background
    subtypes: dict[int, int]
    """Subtype of every instance, 255 = ignore."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A cohort or a synthetic set, laid out for export."""

    source: Path
    taxonomy: Taxonomy
    mpp: float
    fingerprint: str
    """What distinguishes these contents from others."""
    table: pd.DataFrame
    """A row per image: name (of its files), index, region, slide, patient, part, score, and its source."""
    instances: pd.DataFrame
    """A row per instance: name, instance, subtype, area_px."""
    read: Callable[[int], Shown]
    """Return the pixels of the image with this index in the table."""
    patients_seen: tuple[str, ...] = ()
    """Patients behind generated images: those of the masks and those that the generator saw."""

    @property
    def rows(self) -> list[Row]:
        """The table as records; unknown values are None, arrays are lists."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        return [{str(k): v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in rows]


def open_contents(source: Path) -> Contents:
    """Open a cohort or a synthetic set, whichever the folder holds.

    Raises
    ------
    InputError
        It holds neither, or one that is not finished.
    """
    if (source / HEADER_FILE).exists() or (source / "shards").exists():
        return _of_set(PatchSet.open(source))
    return _of_cohort(Cohort.open(source, cache_bytes=1))


def choose_parts(contents: Contents, parts: Sequence[str]) -> Contents:
    """Keep the images of the given parts; without any, all of them.

    Raises
    ------
    InputError
        A part is empty.
    """
    if not parts:
        return contents
    for part in parts:
        if not (contents.table["part"] == part).any():
            found = [known for known in PARTS if (contents.table["part"] == known).any()]
            raise InputError(
                f"{contents.source}: nothing in part {part!r}; it has {', '.join(found) or 'no split'}; "
                "leave out --split to export everything"
            )
    table = contents.table[contents.table["part"].isin(parts)]
    kept = contents.instances["name"].isin(table["name"])
    return replace(contents, table=table, instances=contents.instances[kept])


def file_names(names: Sequence[str]) -> list[str]:
    """Return a file name without suffix for each name: safe on every system, unique even where case is ignored."""
    safe = [re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".-")[:MAX_NAME] or "_" for name in names]
    counts = pd.Series([name.lower() for name in safe]).value_counts()
    return [
        short if short == name and counts[short.lower()] == 1 else f"{short}-{fingerprint(name)[:8]}"
        for short, name in zip(safe, names, strict=True)
    ]


def _of_cohort(cohort: Cohort) -> Contents:
    known = ["region", "slide", "patient", "score", "mpp_level0", "x_level0_px", "y_level0_px"]
    table = cohort.regions[known].assign(
        name=file_names(cohort.regions["region"].tolist()), index=range(len(cohort)), part=cohort.regions["split"]
    )
    names = dict(zip(table["region"], table["name"], strict=True))
    instances = cohort.instances[["instance", "subtype", "area_px"]].assign(name=cohort.instances["region"].map(names))
    return Contents(
        source=cohort.folder,
        taxonomy=cohort.taxonomy,
        mpp=cohort.mpp,
        fingerprint=cohort.fingerprint,
        table=table,
        instances=instances,
        read=lambda index: Shown(*cohort.read(index), cohort.subtypes(index)),
        patients_seen=tuple(cohort.source.get("patients_seen", ())),
    )


def _of_set(synthetic: PatchSet) -> Contents:
    patches = PatchSet(synthetic.folder, synthetic.header, cache_bytes=1)  # one shard at a time
    table = patches.patches.drop(columns="attempts").rename(columns={"region": "source_region"})
    names = [f"{index:06d}" for index in table["index"]]
    table = table.assign(name=names, region=names, part="train", score=None)  # masks come from the training part
    instances = patches.instances[["instance", "subtype", "area_px"]]

    def read(index: int) -> Shown:
        patch = patches[index]
        return Shown(patch.image, patch.instances, patch.subtypes)

    return Contents(
        source=patches.folder,
        taxonomy=patches.header.taxonomy,
        mpp=patches.header.mpp,
        fingerprint=fingerprint(patches.header.model_dump(mode="json")),
        table=table,
        instances=instances.assign(name=[f"{index:06d}" for index in patches.instances["index"]]),
        read=read,
        patients_seen=patches.header.patients_seen,
    )
