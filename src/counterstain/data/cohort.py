"""The cohort on disk: regions of slides with their instances, patients and split.

COHORT/ holds
    cohort.json         taxonomy, mpp, where it came from, hashes of the tables; written last: a folder with it is whole
    regions.parquet     a row per region: region, slide, patient, score, split, height_px, width_px, mpp_level0,
                        x_level0_px, y_level0_px, pack, index
    instances.parquet   a row per instance: region, instance, subtype, area_px, bounding box y0 x0 y1 x1
    packs/NAME.ome.zarr the pixels, see :mod:`counterstain.data.region_store`

Shapes: H, W = rows and columns of a region in pixels.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field, field_validator

from counterstain.config import Config, build
from counterstain.data.patches import Patch, Source, instance_boxes
from counterstain.data.region_store import COLUMNS, Pixels, Region, bands_of, read_tables, write_pack
from counterstain.errors import InputError, StorageError
from counterstain.remote import Place, RemoteFolder, on_disk, place_of
from counterstain.storage import (
    claim,
    committing,
    fingerprint,
    name_on_disk,
    read_json,
    read_sealed,
    replacing,
    sha256_of,
    write_json,
    write_parquet,
    write_sealed,
)
from counterstain.taxonomy import IGNORE, Merge, Taxonomy

FORMAT = 1
PARTS = ("train", "val", "test")
UNSPLIT = "no split"  # in tables, for patients that are in none
PACKS_AT = "packs.json"  # of a cohort whose packs lie at a URL
CACHE_BYTES = 512 * 2**20  # of decoded chunks that a process keeps


class _Header(Config):
    """What cohort.json says."""

    format: int
    taxonomy: Taxonomy
    mpp: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    source: dict[str, Any]
    tables: dict[str, tuple[str, ...]] = Field(
        default_factory=dict
    )  # SHA-256 of each, and of the next; none in old ones

    @field_validator("source")
    @classmethod
    def _patients(cls, source: dict[str, Any]) -> dict[str, Any]:
        seen = source.get("patients_seen", [])
        if not isinstance(seen, list) or not all(isinstance(patient, str) for patient in seen):
            raise ValueError("patients_seen: expected a list of names")
        return source


class CohortWriter:
    """Write a cohort pack by pack; each pack is whole or absent, finished ones are kept when the command runs again.

    ``source`` says where the regions come from: with the taxonomy and the mpp (micrometres per pixel), the identity of
    the cohort. Raises MismatchError where the folder holds something else.

    Examples
    --------
    >>> instances = np.zeros((64, 64), np.int32)
    >>> instances[8:20, 30:50] = 1
    >>> image = np.full((64, 64, 3), 230, np.uint8)
    >>> region = Region(region="r1", slide="s1", patient="p1", image=image, instances=instances, subtypes={1: 4})
    >>> writer = CohortWriter("new-cohort", Taxonomy.named("her2"), mpp=0.5, source={"kind": "drawn"})
    >>> if not writer.has("s1"):
    ...     writer.add("s1", [region])
    >>> len(writer.finish())
    1
    """

    def __init__(self, folder: str | Path, taxonomy: Taxonomy, mpp: float, source: dict[str, Any]) -> None:
        self.folder, self.taxonomy, self.mpp = on_disk(folder), taxonomy, mpp
        known = {"taxonomy": taxonomy.model_dump(mode="json"), "mpp": mpp, "source": source}
        self._settings = {"format": FORMAT} | known
        claim(self.folder, "cohort", self._settings)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_settings": {}}  # another process adds regions; the source may be large

    @property
    def finished(self) -> bool:
        """Whether the cohort is complete already."""
        return (self.folder / "cohort.json").exists()

    def has(self, name: str, part: int = 0) -> bool:
        """Whether the packs of this name (a slide, a shard), or a part of it, are written already."""
        return self._tables(name, part).exists()

    def add(self, name: str, regions: Sequence[Region], part: int = 0) -> None:
        """Write regions that belong together, one pack for each size among them."""
        by_size: dict[tuple[int, ...], list[Region]] = {}
        for region in regions:
            by_size.setdefault(region.instances.shape, []).append(region)
        rows: dict[str, list[dict[str, Any]]] = {table: [] for table in COLUMNS}
        for (height, width), members in by_size.items():
            pack = self._tables(name, part).stem + ("" if len(by_size) == 1 else f"@{height}x{width}")
            with committing(self.folder / "packs" / f"{pack}.ome.zarr") as store:
                write_pack(store, pack, members, mpp=self.mpp, taxonomy=self.taxonomy.name)
            for index, r in enumerate(members):
                place = (height, width, r.mpp_level0, *r.origin_xy_level0_px, pack, index)
                known = (r.region, r.slide, r.patient, r.score, r.split, *place)
                rows["regions"].append(dict(zip(COLUMNS["regions"], known, strict=True)))
                for instance, area, box in instance_boxes(bands_of(r.instances)):
                    values = (r.region, instance, r.subtypes[instance], area, *box)
                    rows["instances"].append(dict(zip(COLUMNS["instances"], values, strict=True)))
        write_json(self._tables(name, part), rows)

    def finish(self, count: int | None = None) -> Cohort:
        """Write the tables of the whole cohort and open it; StorageError where it has not ``count`` regions."""
        if not self.finished:
            parts = [read_json(file) for file in sorted((self.folder / "parts").glob("[!.]*.json"))]
            regions = Counter(row["region"] for part in parts for row in part["regions"])
            if not regions:
                raise InputError(f"{self.folder}: the cohort is empty; no region was given")
            if twice := [name for name, times in regions.items() if times > 1]:
                raise InputError(f"{self.folder}: two regions are called {twice[0]!r}; rename one and import again")
            for table, columns in COLUMNS.items():
                rows = pd.DataFrame([row for part in parts for row in part[table]], columns=list(columns))
                rows = rows.astype({name: "int64" for name, kind in columns.items() if kind == "integer"})
                keys = [name for name in ("region", "instance") if name in rows]
                write_parquet(self.folder / f"{table}.parquet", rows.sort_values(keys, ignore_index=True))
            tables = {table: [sha256_of(self.folder / f"{table}.parquet")] for table in COLUMNS}
            self._check_count(len(regions), count)
            write_sealed(self.folder / "cohort.json", self._settings | {"tables": tables})
            shutil.rmtree(self.folder / "parts")
        cohort = Cohort.open(self.folder)
        self._check_count(len(cohort), count)
        return cohort

    def _check_count(self, found: int, count: int | None) -> None:
        if count not in {None, found}:
            raise StorageError(
                f"{self.folder}: holds {found} regions of {count}; delete the folder and give the same command again"
            )

    def _tables(self, name: str, part: int) -> Path:
        return self.folder / "parts" / f"{name_on_disk(name)}{f'@{part}' if part else ''}.json"


class Cohort:
    """A cohort, read window by window; the chunks that were used last are kept in memory.

    ``mpp`` is in micrometres per pixel, ``source`` says where the regions come from; ``regions`` and ``instances`` are
    tables with a row each, as described at the top of this file.

    Examples
    --------
    >>> cohort = Cohort.open("cohort")
    >>> cohort
    Cohort(cohort: her2, 0.5 um/px)
    split  patients  slides  regions  HER2 0  HER2 1+  HER2 2+  HER2 3+  LCIS/DCIS
    train         3       3        6      10       14       13        7         10
      val         1       1        2       2        6        6        3          1
     test         1       1        2       4        4        5        3          2
    >>> image, instances = cohort.read(0)
    >>> image.shape, instances.shape, cohort.subtypes(0)[1]
    ((96, 96, 3), (96, 96), 5)
    """

    def __init__(self, folder: Place, settings: dict[str, Any], *, cache_bytes: int = CACHE_BYTES) -> None:
        header = build(_Header, settings, str(folder / "cohort.json"))
        self.folder, self.taxonomy, self.mpp, self.source = folder, header.taxonomy, header.mpp, header.source
        subtypes = [*range(1, self.taxonomy.num_labels), IGNORE]
        self.regions, self.instances = read_tables(folder, header.tables, subtypes=subtypes, parts=PARTS)
        self._settings, self._cache_bytes = settings, cache_bytes
        self._pixels = Pixels(packs_of(folder), self.regions, self.instances, cache_bytes)

    @classmethod
    def open(cls, folder: str | Place, *, cache_bytes: int = CACHE_BYTES) -> Cohort:
        """Open a cohort in a folder or at a URL; decoded chunks that are kept may take ``cache_bytes`` of memory.

        Raises InputError where there is no cohort, its import was interrupted or another version wrote it,
        StorageError where a table is damaged, and FetchError where a URL cannot be read.
        """
        folder = place_of(folder)
        if isinstance(folder, Path) and not folder.is_dir():
            what = "a file; a cohort is a folder" if folder.is_file() else "no such cohort"
            raise InputError(f"{folder}: {what}; make one with 'counterstain import' or 'counterstain phantom'")
        if not (folder / "cohort.json").exists():
            if isinstance(folder, RemoteFolder):
                raise InputError(f"{folder}: no cohort at this URL (cohort.json is missing)")
            state = "not a cohort" if any(folder.iterdir()) else "empty, not a cohort"
            if (folder / "run.json").exists() and (folder / "packs").exists():
                state = "its import was interrupted; give the same import command again"
            elif (folder / "model.json").exists():
                state = "a checkpoint, not a cohort"
            raise InputError(f"{folder}: {state} (cohort.json is missing)")
        settings = read_sealed(folder / "cohort.json")
        if settings.get("format") != FORMAT:
            raise InputError(
                f"{folder}: cohort format {settings.get('format')!s:.80}, this version reads {FORMAT}; import it again"
            )
        try:
            return cls(folder, settings, cache_bytes=cache_bytes)
        except StorageError as error:
            raise StorageError(f"{error}; import the cohort again") from error

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what the cohort was made from, its tables and its split."""
        contents = ((self.folder / f"{name}.parquet").read_bytes() for name in ("regions", "instances"))
        tables = [hashlib.sha256(content).hexdigest() for content in contents]
        return fingerprint([{key: value for key, value in self._settings.items() if key != "tables"}, tables])

    def __len__(self) -> int:
        return len(self.regions)

    def __repr__(self) -> str:
        counts = subtypes_table(self).pivot_table("instances", "split", "subtype", sort=False)
        table = splits_table(self).drop(columns="area_mm2").merge(counts.astype(int), on="split")
        return f"Cohort({self.folder}: {self.taxonomy.name}, {self.mpp:g} um/px)\n{table.to_string(index=False)}"

    def is_at(self, mpp: float) -> bool:
        """Whether what was made at ``mpp`` micrometres per pixel may be used with this cohort: 5 % are allowed."""
        return abs(mpp - self.mpp) <= 0.05 * self.mpp

    def patients(self, split: str) -> list[str]:
        """Return the patients of ``train``, ``val`` or ``test``, sorted; raises InputError for any other split.

        Of a redrawn cohort ``train`` also has those that its generator saw: their tissue is in its images.
        """
        _check_split(split, self.folder)
        behind = self.source.get("patients_seen", ()) if split == "train" else ()
        return sorted({*self.regions.loc[self.regions["split"] == split, "patient"], *behind})

    def positions(self, split: str) -> np.ndarray:
        """Return the positions of a split's regions in :attr:`regions`; raises InputError where there is none."""
        _check_split(split, self.folder)
        positions = np.flatnonzero((self.regions["split"] == split).to_numpy())
        if not len(positions):
            raise InputError(
                f"{self.folder}: no region in split {split!r}; run 'counterstain split {self.folder}' first"
            )
        return positions

    def read(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a region's image, (H, W, 3) uint8, and instances, (H, W) int32.

        Raises InputError where there is no region of this position, and StorageError where a file of the pack is
        missing or damaged.
        """
        height, width = self._shape(position)
        image, instances, _ = self._pixels.window(position, 0, 0, height, width)
        return image, instances

    def instance_map(self, position: int, y_px: int, x_px: int, height_px: int, width_px: int) -> np.ndarray:
        """Return the instances in a rectangle that lies inside a region, (height_px, width_px) int32."""
        return self._pixels.instances(position, y_px, x_px, height_px, width_px)

    def subtypes(self, position: int) -> dict[int, int]:
        """Return the subtype of every instance of a region."""
        return self._subtypes_by_region.get(self._names[position][0], {})

    def patch(self, position: int, y_px: int, x_px: int, size_px: int) -> Patch:
        """Cut a square out of a region.

        Raises InputError where it does not lie inside the region.
        """
        height, width = self._shape(position)
        if size_px < 1 or not (0 <= y_px <= height - size_px and 0 <= x_px <= width - size_px):
            raise InputError(
                f"{self.folder}: no patch of {size_px} x {size_px} px at y={y_px}, x={x_px} in region "
                f"{self._names[position][0]}, which is {height} x {width} px"
            )
        return self.cut(position, y_px, x_px, size_px, size_px)

    def cut(self, position: int, y_px: int, x_px: int, height_px: int, width_px: int) -> Patch:
        """Cut a rectangle that lies inside a region, as :meth:`patch` does."""
        (region, slide, patient), table = self._names[position], self.subtypes(position)
        image, instances, shown = self._pixels.window(position, y_px, x_px, height_px, width_px)
        return Patch(
            image=image,
            instances=instances,
            subtypes={i: table[i] for i in shown},
            source=Source(region=region, slide=slide, patient=patient, y_px=y_px, x_px=x_px),
            taxonomy=self.taxonomy,
        )

    def composition(self) -> pd.DataFrame:
        """Return a row per slide and subtype: split, slide, patient, score, subtype (name), instances, area_px."""
        keys = ["split", "slide", "patient", "score"]
        joined = self.instances.merge(self.regions[["region", *keys]], on="region")
        joined["subtype"] = joined["subtype"].map(self.taxonomy.name_of)
        grouped = joined.groupby([*keys, "subtype"], dropna=False, as_index=False)
        return grouped.agg(instances=("instance", "size"), area_px=("area_px", "sum"))

    def write_split(self, split_by_patient: dict[str, str]) -> Cohort:
        """Store which part each patient belongs to and open the cohort anew."""
        return self._with("regions", self.regions.assign(split=self.regions["patient"].map(split_by_patient)))

    def merged(self, merge: Merge) -> Cohort:
        """Return this cohort with subtypes put together, see :meth:`Taxonomy.merged`; nothing on disk changes."""
        view, lookup = copy.copy(self), self.taxonomy.merge_lookup(merge).astype("int64")
        view.taxonomy = self.taxonomy.merged(merge)
        view._settings = self._settings | {"taxonomy": view.taxonomy.model_dump(mode="json")}  # noqa: SLF001 - of its own kind
        view.instances = self.instances.assign(subtype=lookup[self.instances["subtype"].to_numpy()])
        vars(view).pop("_subtypes_by_region", None)
        return view

    def write_merged(self, merge: Merge) -> Cohort:
        """Put subtypes together for good, and open the cohort anew."""
        view = self.merged(merge)
        return view._with("instances", view.instances)  # noqa: SLF001 - of its own kind

    def _with(self, name: str, table: pd.DataFrame) -> Cohort:
        """Replace a table on disk, and open the cohort anew."""
        folder = on_disk(self.folder)
        with replacing(folder / f"{name}.parquet") as partial:
            table.to_parquet(partial, index=False)
            tables = {known: [sha256_of(folder / f"{known}.parquet")] for known in COLUMNS}
            tables[name].append(sha256_of(partial))  # either is there, whenever this is interrupted
            write_sealed(folder / "cohort.json", self._settings | {"tables": tables})
        return Cohort.open(self.folder, cache_bytes=self._cache_bytes)

    def _shape(self, position: int) -> tuple[int, int]:
        if position not in range(len(self)):
            raise InputError(f"{self.folder}: no region {position!r}; they are numbered from 0 to {len(self) - 1}")
        return self._pixels.shapes[position]

    @cached_property
    def _names(self) -> list[tuple[str, str, str]]:
        return list(self.regions[["region", "slide", "patient"]].astype(str).itertuples(index=False, name=None))

    @cached_property
    def _subtypes_by_region(self) -> dict[str, dict[int, int]]:
        tables: dict[str, dict[int, int]] = {}
        columns = (self.instances[name].tolist() for name in ("region", "instance", "subtype"))
        for region, instance, subtype in zip(*columns, strict=True):
            tables.setdefault(region, {})[instance] = subtype
        return tables


def packs_of(folder: Place) -> Place:
    """Return where the packs of a cohort lie: in its folder, or at a URL that it names."""
    elsewhere = folder / PACKS_AT
    return (
        place_of(str(read_json(elsewhere)["url"]))
        if isinstance(folder, Path) and elsewhere.exists()
        else folder / "packs"
    )


def _check_split(split: str, folder: Place) -> None:
    if split not in PARTS:
        raise InputError(f"{folder}: split {split!r}: expected train, val or test")


def splits_table(cohort: Cohort) -> pd.DataFrame:
    """Return a row per split in use: split, patients, slides, regions, area_mm2."""
    regions = cohort.regions.assign(
        split=cohort.regions["split"].astype(object).fillna(UNSPLIT),
        area_mm2=cohort.regions["height_px"] * cohort.regions["width_px"] * (cohort.mpp / 1000) ** 2,
    )
    how = {"patients": ("patient", "nunique"), "slides": ("slide", "nunique"), "regions": ("region", "size")}
    table = regions.groupby("split").agg(**how, area_mm2=("area_mm2", "sum"))
    return table.reindex([split for split in (*PARTS, UNSPLIT) if split in table.index]).reset_index()


def subtypes_table(cohort: Cohort) -> pd.DataFrame:
    """Return a row per split in use and subtype, present or not.

    Columns split, subtype, slides, instances, instance_share, area_mm2, area_share; shares are of the split, 0 to 1.
    """
    counts = cohort.composition()
    counts["split"] = counts["split"].astype(object).fillna(UNSPLIT)
    grouped = counts.groupby(["split", "subtype"]).agg(
        slides=("slide", "nunique"), instances=("instances", "sum"), area_px=("area_px", "sum")
    )
    splits, names = splits_table(cohort)["split"], cohort.taxonomy.names  # pixels to be ignored are no subtype
    every = pd.MultiIndex.from_product([splits, names], names=["split", "subtype"])
    table = grouped.reindex(every, fill_value=0).reset_index()
    for column, share in (("instances", "instance_share"), ("area_px", "area_share")):
        total = table.groupby("split")[column].transform("sum")
        table[share] = table[column] / total.where(total > 0, 1)
    table["area_mm2"] = table["area_px"] * (cohort.mpp / 1000) ** 2
    return table[["split", "subtype", "slides", "instances", "instance_share", "area_mm2", "area_share"]]
