"""What is exported: the images of a cohort or a synthetic set with their masks, and how a format lays them out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from counterstain.data.cohort import PARTS, Cohort
from counterstain.data.patch_set import HEADER_FILE, PatchSet
from counterstain.data.patches import label_mask
from counterstain.data.review import not_rejected
from counterstain.errors import InputError
from counterstain.remote import Place
from counterstain.storage import fingerprint
from counterstain.taxonomy import BACKGROUND, IGNORE, Subtype, Taxonomy, colours

FOR_FILES = ["name", "index", "height_px", "width_px"]  # columns: name of the files, number in the source, size
MAX_NAME = 100  # some file systems stop at 143 characters

Row = dict[str, Any]
Advance = Callable[[int], None]


class Sample(NamedTuple):
    """An image of an export with its mask."""

    name: str  # of its files
    image: np.ndarray  # (H, W, 3) uint8
    instances: np.ndarray  # (H, W) int32
    subtypes: dict[int, int]  # of every instance, its label in the export
    taxonomy: Taxonomy
    mpp: float
    where: str  # source and region, for messages

    @property
    def labels(self) -> np.ndarray:
        """(H, W) uint8."""
        return label_mask(self.instances, self.subtypes)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A cohort or a synthetic set, laid out for export."""

    source: Place
    taxonomy: Taxonomy  # labels of the export
    mpp: float
    fingerprint: str  # what distinguishes these contents from others
    table: pd.DataFrame
    """A row per image: those of FOR_FILES, and region, slide, patient, part, score, its source."""
    instances: pd.DataFrame  # a row per instance: name, instance, subtype (label in the export), area_px
    read: Callable[[int], tuple[np.ndarray, np.ndarray, dict[int, int]]]  # index -> image, instances, their subtypes
    review: Mapping[str, Any] = field(default_factory=dict)  # what of a set is left out, because people rejected it
    patients_seen: tuple[str, ...] = ()  # behind generated images: those of the masks and those the generator saw
    facts: Mapping[str, str] = field(default_factory=dict)  # what else a data sheet says
    recipe: str = ""  # how it was made, for its card
    lookup: np.ndarray = field(default_factory=lambda: np.arange(256, dtype=np.uint8))
    """(256,) uint8: subtype of the source -> label of the export."""

    def sample(self, row: Row) -> Sample:
        """Read the image of a row."""
        image, instances, subtypes = self.read(row["index"])
        named = {instance: int(self.lookup[subtype]) for instance, subtype in subtypes.items()}
        where = f"{self.source} region {row.get('region', row['name'])}"
        return Sample(str(row["name"]), image, instances, named, self.taxonomy, self.mpp, where)

    @property
    def rows(self) -> list[Row]:
        """The table as records; unknown values are None, arrays are lists."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        return [{str(k): v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in rows]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A kind of export."""

    files: Mapping[str, str]  # kind of file -> path in the export, of {name} and {folder}
    writers: Mapping[str, Callable[[Path, Sample], None]]  # kind of file -> what writes it, in one step
    folders: Mapping[str | None, str] = field(default_factory=lambda: dict.fromkeys((*PARTS, None), ""))
    """Part of the split -> {folder}."""
    write_tables: Callable[[Path, Contents], None]  # called when all images are there
    shards: Callable[[Contents], Mapping[str, list[Row]]] | None = None  # file -> its rows, where one holds many images
    write_shard: Callable[[Path, Contents, list[Row], Advance], None] | None = None
    check: Callable[[Path, Contents], None] = lambda _out, _contents: None  # InputError where it cannot be laid out so
    of_others: tuple[str, ...] = ()  # how paths begin that other programs write to
    ignore_is_highest: bool = False  # whether the highest label, instead of 255, is ignored
    names_patients: bool = True  # otherwise by their pseudonyms

    def files_of(self, row: Row) -> dict[str, str]:
        """Return the files of an image."""
        folder = self.folders[row["part"]]
        return {kind: path.format(name=row["name"], folder=folder) for kind, path in self.files.items()}

    def images(self, contents: Contents) -> set[str]:
        """Return the files of all images."""
        if self.shards is not None:
            return set(self.shards(contents))
        return {path for row in contents.rows for path in self.files_of(row).values()}

    def table(self, contents: Contents) -> pd.DataFrame:
        """Return a row per image as it goes into a CSV table: its files, all that is known of it, mpp."""
        rows = []
        for row in contents.rows:
            plain = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
            rows.append(self.files_of(row) | plain | {"mpp": contents.mpp})
        return pd.DataFrame(rows).drop(columns=FOR_FILES)

    def write_images(self, out: Path, contents: Contents, advance: Advance) -> None:
        """Write the files of all images that are not there yet."""
        if self.shards is not None and self.write_shard is not None:
            for name, rows in self.shards(contents).items():
                if (out / name).exists():
                    advance(len(rows))
                else:
                    self.write_shard(out / name, contents, rows, advance)
            return
        for row in contents.rows:
            missing = {kind: out / path for kind, path in self.files_of(row).items() if not (out / path).exists()}
            if missing:
                sample = contents.sample(row)
                for kind, path in missing.items():
                    self.writers[kind](path, sample)
            advance(1)


def file_names(names: Sequence[str]) -> list[str]:
    """Return a file name without suffix for each name: safe on every system, unique even where case is ignored."""
    safe = [re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".-")[:MAX_NAME] or "_" for name in names]
    counts = pd.Series([name.lower() for name in safe]).value_counts()
    return [
        short if short == name and counts[short.lower()] == 1 else f"{short}-{fingerprint(name)[:8]}"
        for short, name in zip(safe, names, strict=True)
    ]


def contents_of(source: Place) -> Contents:
    """Open a cohort, or a synthetic set as a training part; InputError where there is none."""
    if isinstance(source, Path) and ((source / HEADER_FILE).exists() or (source / "shards").exists()):
        return _of_set(PatchSet.open(source))
    return _of_cohort(Cohort.open(source))


def _of_cohort(cohort: Cohort) -> Contents:
    known = ["region", "slide", "patient", "score", "mpp_level0", "x_level0_px", "y_level0_px", "height_px", "width_px"]
    table = cohort.regions[known].assign(
        name=file_names(cohort.regions["region"].tolist()),
        index=range(len(cohort)),
        part=cohort.regions["split"],
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
    size, part = patches.header.size_px, patches.header.part
    names = [f"{index:06d}" for index in table["index"]]
    return Contents(
        source=patches.folder,
        taxonomy=patches.header.taxonomy,
        mpp=patches.header.mpp,
        fingerprint=fingerprint(known | ({"rejected": review["rejected"]} if review else {})),
        table=table.assign(name=names, height_px=size, width_px=size, region=names, part=part, score=None),
        instances=instances.assign(name=[f"{index:06d}" for index in instances["index"]]),
        read=lambda index: ((patch := patches[index]).image, patch.instances, patch.subtypes),
        patients_seen=patches.header.patients_seen,
        review=review,
    )


def choose_parts(contents: Contents, parts: Sequence[str]) -> Contents:
    """Keep parts of the split; InputError where there is nothing in one."""
    found = [known for known in PARTS if (contents.table["part"] == known).any()]
    for part in sorted(set(parts) - set(found)):
        raise InputError(
            f"{contents.source}: nothing in split {part!r}; it has {', '.join(found) or 'no split'}; "
            "leave out --split to export everything"
        )
    table = contents.table[contents.table["part"].isin(parts)]
    return replace(contents, table=table, instances=contents.instances[contents.instances["name"].isin(table["name"])])


def whole_class(contents: Contents) -> Contents:
    """Give all subtypes label 1, with the name of the tissue class."""
    known = contents.taxonomy
    whole = Subtype(id=1, name=known.tissue_class, colour=colours(1)[0])
    taxonomy = Taxonomy(name=f"{known.name[:70]}:tumour", tissue_class=known.tissue_class, subtypes=(whole,))
    lookup = contents.lookup.copy()
    lookup[(lookup != BACKGROUND) & (lookup != IGNORE)] = 1
    instances = contents.instances.assign(subtype=lookup[contents.instances["subtype"].to_numpy()])
    return replace(contents, taxonomy=taxonomy, instances=instances, lookup=lookup)
