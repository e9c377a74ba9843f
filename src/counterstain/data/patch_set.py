"""Synthetic patches on disk, shard by shard, each with where it came from.

SET/ holds
    set.json            the header; written when all shards are there
    shards/00000, …     64 patches each, written in one step:
        images.zarr         (n, H, W, 3) uint8
        instances.zarr      (n, H, W) int32
        patches.parquet     a row per patch: index, seed, attempts, and the source: region, slide, patient, y_px, x_px,
                            flipped, quarter_turns; with styles style_slides and style_weights; with a filter kept; of
                            a set drawn by hand steps, as JSON
        instances.parquet   a row per instance: index, instance, subtype_before, subtype, area_px
        moved.parquet       with new layouts, a row per moved instance: index, instance, and where it was cut out
        judged.parquet      with a filter, a row per instance of every drawing: index, drawing, subtype, agreed, kept
        hashes.json         SHA-256 of the other files
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, overload

import numpy as np
import pandas as pd
import zarr
from pydantic import Field

from counterstain.config import Config, build
from counterstain.data.chunked_array import ChunkedArray, Recent
from counterstain.data.patches import Patch, Source, shows
from counterstain.data.region_store import read_table
from counterstain.errors import CounterstainError, InputError, StorageError
from counterstain.storage import committing, read_json, read_sealed, sha256_of, write_json, write_sealed
from counterstain.taxonomy import IGNORE, Taxonomy

SHARD_PATCHES = 64
BY_HAND = "hand"  # method of a set to which patches were added one by one
ARRAYS = {"image": "images.zarr", "instances": "instances.zarr"}
TYPES = {"flag": "bool", "integer": "int64", "text": "str"}
HEADER_FILE, HASHES_FILE = "set.json", "hashes.json"
COLUMNS = {
    "patches": {
        **dict.fromkeys(("index", "seed", "attempts", "y_px", "x_px", "quarter_turns"), "integer"),
        **dict.fromkeys(("region", "slide", "patient"), "text"),
        "flipped": "flag", "style_slides": "texts*", "style_weights": "numbers*", "kept": "flag*", "steps": "text*",
    },
    "instances": dict.fromkeys(("index", "instance", "subtype_before", "subtype", "area_px"), "integer"),
    "moved": {
        **dict.fromkeys(("index", "instance", "y_px", "x_px", "quarter_turns"), "integer"),
        **dict.fromkeys(("region", "slide", "patient"), "text"),
        "flipped": "flag",
    },
    "judged": {**dict.fromkeys(("index", "drawing", "subtype"), "integer"), "agreed": "flag", "kept": "flag"},
}  # fmt: skip


class PatchSetHeader(Config):
    """What is known about a synthetic set: enough to make it again."""

    method: str  # how the images were drawn, for example spade
    taxonomy: Taxonomy
    size_px: Annotated[int, Field(ge=1, le=8192)]
    mpp: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    count: Annotated[int, Field(ge=1)]  # number of patches
    seed: int
    cohort: str  # fingerprint of the cohort whose masks were relabelled
    generator: str  # SHA-256 of the generator's weights; empty where a method needs none
    patients_seen: tuple[str, ...]  # patients that the generator or the masks come from
    settings: dict[str, Any]  # of sampling, relabelling and drawing
    version: str
    # Of the split that the masks are from. What is drawn for val or test is for reading tests, never for training.
    part: Annotated[Literal["train", "val", "test"], Field(exclude_if=lambda part: part == "train")] = "train"

    @property
    def has_layouts(self) -> bool:
        """Whether instances were moved into its patches from other slides."""
        return bool(self.settings.get("synthesis", {}).get("layouts"))


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedInstance:
    """A filter's verdict on one instance in one drawing of a patch."""

    drawing: int  # 0 = the first image drawn for the patch, 1 = the next
    subtype: int  # the subtype that was asked for
    agreed: bool  # it looks like that subtype
    kept: bool  # the image passed the filter


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticPatch:
    """A generated image for a relabelled mask."""

    index: int  # number in its set
    patch: Patch  # generated image, instances, new subtypes, and the source of the mask
    subtypes_before: dict[int, int]
    seed: int  # seed of the image
    attempts: int = 1  # how many images were drawn until one passed the filter
    style: tuple[tuple[str, float], ...] = ()
    """Slides whose style it is drawn in, with their weights; empty without a style."""
    moved: Mapping[int, Source] = field(default_factory=dict)
    """Where instances were cut out that were moved into the patch."""
    judged: tuple[JudgedInstance, ...] = ()  # every instance of every drawing that a filter judged, in that order
    kept: bool = True  # whether the image passed the filter, or none judged it
    steps: str = ""  # JSON: how it was drawn by hand, see :class:`counterstain.synthesis.by_hand.Step`


class PatchSetWriter:
    """Write a set shard by shard; finished shards are kept when the same set is written again."""

    def __init__(self, folder: str | Path, header: PatchSetHeader) -> None:
        self.folder, self.header = Path(folder), header

    @property
    def num_shards(self) -> int:
        """Shards of the whole set."""
        return -(-self.header.count // SHARD_PATCHES)

    def missing_shards(self) -> list[int]:
        """Return the numbers of the shards that are not on disk or whose files are damaged."""
        return [shard for shard in range(self.num_shards) if not _is_whole(_folder_of(self.folder, shard))]

    def indices(self, shard: int) -> range:
        """Return the numbers of a shard's patches; the last shard is full as well, so that a set can grow."""
        return range(shard * SHARD_PATCHES, (shard + 1) * SHARD_PATCHES)

    def write(self, shard: int, patches: Sequence[SyntheticPatch]) -> None:
        """Write one shard in one step."""
        if [p.index for p in patches] != list(self.indices(shard)):
            raise ValueError(f"shard {shard} holds the patches {self.indices(shard)}")
        with committing(_folder_of(self.folder, shard)) as folder:
            for name in ("image", "instances"):
                array = np.stack([getattr(p.patch, name) for p in patches])
                zarr.create_array(folder / ARRAYS[name], data=array, chunks=array.shape, zarr_format=3)
            table = pd.DataFrame([_patch_row(p) for p in patches])
            if "filter" in self.header.settings:
                table["kept"] = [p.kept for p in patches]
                judged = [(p.index, *asdict(verdict).values()) for p in patches for verdict in p.judged]
                _typed(judged, "judged").to_parquet(folder / "judged.parquet")
            if self.header.has_layouts:
                moved = [_moved_row(p.index, *item) for p in patches for item in p.moved.items()]
                _typed(moved, "moved").to_parquet(folder / "moved.parquet")
            table.to_parquet(folder / "patches.parquet")
            rows = [row for p in patches for row in _instance_rows(p)]
            _typed(rows, "instances").to_parquet(folder / "instances.parquet")
            write_json(folder / HASHES_FILE, _hashes(folder))

    def finish(self) -> PatchSet:
        """Write the header, of the longer set where one is there already, and open the set."""
        longer = False
        with suppress(CounterstainError):  # there is none, or it is damaged
            longer = len(PatchSet.open(self.folder)) > self.header.count
        if not longer:
            write_sealed(self.folder / HEADER_FILE, self.header.model_dump(mode="json"))
        return PatchSet.open(self.folder)


class PatchSet(Sequence[Patch]):
    """A synthetic set, read shard by shard; recently used shards are kept in memory.

    Examples
    --------
    >>> patches = PatchSet.open("synthetic")
    >>> patches
    PatchSet(synthetic: 64 patches of 48 px by oracle, her2, 0.5 um/px)
    >>> patches[-1].source.region, len(patches[:3])
    ('p1-1', 3)
    >>> patches.balance().columns.tolist()
    ['subtype', 'instances', 'area_px', 'instances_before', 'area_px_before']
    """

    def __init__(self, folder: Path, header: PatchSetHeader, *, cache_bytes: int = 2 * 2**30) -> None:
        self.folder, self.header = folder, header
        self._shard = lru_cache(max(1, cache_bytes // (SHARD_PATCHES * header.size_px**2 * 7)))(self._read)

    @classmethod
    def open(cls, folder: str | Path) -> PatchSet:
        """Open a set; raises InputError where there is none, or one that is not finished."""
        folder = Path(folder)
        if not (folder / HEADER_FILE).exists():
            state = "is not finished; give the same command again" if (folder / "shards").exists() else "no such set"
            raise InputError(f"{folder}: {state} ({HEADER_FILE} is missing)")
        return cls(folder, build(PatchSetHeader, read_sealed(folder / HEADER_FILE), folder / HEADER_FILE))

    def __len__(self) -> int:
        return self.header.count

    def __repr__(self) -> str:
        h = self.header
        what = f"{h.count} patches of {h.size_px} px by {h.method}, {h.taxonomy.name}, {h.mpp:g} um/px"
        return f"PatchSet({self.folder}: {what})"

    def __reduce__(self) -> tuple[Any, ...]:
        return PatchSet, (self.folder, self.header)  # without what is in memory

    @overload
    def __getitem__(self, index: int) -> Patch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Patch]: ...
    def __getitem__(self, index: int | slice) -> Patch | list[Patch]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        shard, position = divmod(range(len(self))[index], SHARD_PATCHES)
        return self._shard(shard)[position]

    def drawn_by_hand(self, index: int) -> SyntheticPatch:
        """Return a patch of a set drawn by hand as it was written."""
        row = self.patches.iloc[index]
        own = self.instances[self.instances["index"] == index]
        before = dict(zip(own["instance"].tolist(), own["subtype_before"].tolist(), strict=True))
        seed, steps = int(row["seed"]), str(row["steps"])
        return SyntheticPatch(index=index, patch=self[index], subtypes_before=before, seed=seed, steps=steps)

    @cached_property
    def patches(self) -> pd.DataFrame:
        """A row per patch: index, seed, attempts and its source."""
        return self._table("patches")

    @cached_property
    def instances(self) -> pd.DataFrame:
        """A row per instance: index, instance, subtype_before, subtype, area_px."""
        return self._table("instances")

    @cached_property
    def judged(self) -> pd.DataFrame:
        """A row per drawn instance that a filter judged: index, drawing, subtype, agreed, kept; empty without one."""
        return self._table("judged") if "filter" in self.header.settings else _typed([], "judged")

    @cached_property
    def moved(self) -> pd.DataFrame:
        """A row per instance that was moved into a patch: index, instance and its source; empty without any."""
        return self._table("moved") if self.header.has_layouts else _typed([], "moved")

    @property
    def patients(self) -> set[str]:
        """All patients whose tissue gave masks, nuclei or surroundings."""
        return {*self.patches["patient"], *self.moved["patient"]}

    def origins(self, numbers: Iterable[int]) -> dict[int, list[Source]]:
        """Return, by number, where patches were cut out, each followed by where its moved instances were."""
        rows = pd.concat([self.patches, self.moved])
        wanted = rows[rows["index"].isin(list(numbers))].groupby("index")
        return {int(str(index)): [_source(row) for row in table.to_dict("records")] for index, table in wanted}

    def balance(self) -> pd.DataFrame:
        """Return a row per subtype: subtype (name), instances, area_px, instances_before, area_px_before."""
        taxonomy = self.header.taxonomy
        table = pd.DataFrame({"subtype": taxonomy.names}, index=[subtype.id for subtype in taxonomy.subtypes])
        for column, suffix in (("subtype", ""), ("subtype_before", "_before")):
            areas = self.instances.groupby(column)["area_px"]
            for name, values in (("instances", areas.size()), ("area_px", areas.sum())):
                table[name + suffix] = values.reindex(table.index, fill_value=0)
        return table.reset_index(drop=True)

    def _table(self, name: str) -> pd.DataFrame:
        shards = range(-(-len(self) // SHARD_PATCHES))
        table = pd.concat([self._table_of(shard, name) for shard in shards], ignore_index=True)
        return table[table["index"] < len(self)]

    def _table_of(self, shard: int, name: str) -> pd.DataFrame:
        folder = _folder_of(self.folder, shard)
        try:
            hashes = read_json(folder / HASHES_FILE)
            table = read_table(folder / f"{name}.parquet", COLUMNS[name], [hashes[f"{name}.parquet"]])
        except (CounterstainError, LookupError, TypeError) as error:
            raise _damaged(folder) from error
        numbers, taxonomy = range(shard * SHARD_PATCHES, (shard + 1) * SHARD_PATCHES), self.header.taxonomy
        subtypes = [*range(1, taxonomy.num_labels), IGNORE]
        fit = table["index"].isin(numbers).all() and all(
            table[column].isin(subtypes).all() for column in ("subtype", "subtype_before") if column in table
        )
        if not fit or (name == "patches" and table["index"].tolist() != list(numbers)):
            raise _damaged(folder)
        return table

    def _read(self, shard: int) -> list[Patch]:
        folder, size = _folder_of(self.folder, shard), self.header.size_px
        if not _is_whole(folder):
            raise _damaged(folder)
        shape = (SHARD_PATCHES, size, size)
        try:
            images = _array(folder / ARRAYS["image"], (*shape, 3), "uint8")
            instances = _array(folder / ARRAYS["instances"], shape, "int32")
        except StorageError as error:
            raise _damaged(folder) from error
        shown = dict(iter(self._table_of(shard, "instances").groupby("index")))
        rows = self._table_of(shard, "patches").to_dict("records")
        patches = []
        for image, ids, row in zip(images, instances, rows, strict=True):
            table = shown.get(row["index"], _typed([], "instances"))
            if not shows(ids, table[["instance", "area_px"]].to_numpy()):
                raise _damaged(folder)
            patches.append(
                Patch(
                    image=image,
                    instances=ids,
                    subtypes=dict(zip(table["instance"].tolist(), table["subtype"].tolist(), strict=True)),
                    source=_source(row),
                    taxonomy=self.header.taxonomy,
                )
            )
        return patches


def rename(folder: Path, header: PatchSetHeader, new: Callable[[str, str], str]) -> None:
    """Give a set another header, and what names regions, slides and patients in its tables new names, in place.

    ``new`` is told region, slide or patient, and the name.
    """
    for shard in sorted((folder / "shards").iterdir()):
        for file in filter(Path.is_file, (shard / "patches.parquet", shard / "moved.parquet")):
            table = pd.read_parquet(file)
            for column in ("region", "slide", "patient"):
                table[column] = [new(column, name) for name in table[column]]
            if "style_slides" in table:
                table["style_slides"] = [[new("slide", name) for name in names] for names in table["style_slides"]]
            if "steps" in table:
                table["steps"] = [_renamed_steps(steps, new) for steps in table["steps"]]
            table.to_parquet(file)
        write_json(shard / HASHES_FILE, _hashes(shard))
    write_sealed(folder / HEADER_FILE, header.model_dump(mode="json"))


def _renamed_steps(steps: str, new: Callable[[str, str], str]) -> str:
    said = json.loads(steps)
    return json.dumps([step | ({"style": new("slide", step["style"])} if step.get("style") else {}) for step in said])


def _array(folder: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return ChunkedArray(folder, shape, dtype, shape, Recent(0)).read(*(slice(0, length) for length in shape))


def _patch_row(patch: SyntheticPatch) -> dict[str, Any]:
    row = {"index": patch.index, "seed": patch.seed, "attempts": patch.attempts} | asdict(patch.patch.source)
    style = {"style_slides": [s for s, _ in patch.style], "style_weights": [w for _, w in patch.style]}
    return row | (style if patch.style else {}) | ({"steps": patch.steps} if patch.steps else {})


def _instance_rows(patch: SyntheticPatch) -> Iterator[tuple[int, int, int, int, int]]:
    for instance, area in patch.patch.areas_px.items():
        before, after = patch.subtypes_before[instance], patch.patch.subtypes[instance]
        yield patch.index, instance, before, after, area


def _source(row: Mapping[Any, Any]) -> Source:
    return Source(**{name: row[name] for name in Source.__dataclass_fields__})


def _moved_row(index: int, instance: int, source: Source) -> tuple[Any, ...]:
    row = {"index": index, "instance": instance} | asdict(source)
    return tuple(row[column] for column in COLUMNS["moved"])


def _typed(rows: Sequence[tuple[Any, ...]], name: str) -> pd.DataFrame:
    types = {column: TYPES[kind] for column, kind in COLUMNS[name].items()}
    return pd.DataFrame(rows, columns=list(types)).astype(types)


def _folder_of(folder: Path, shard: int) -> Path:
    return folder / "shards" / f"{shard:05d}"


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files if file.name != HASHES_FILE}


def _is_whole(folder: Path) -> bool:
    with suppress(CounterstainError):
        return bool(_hashes(folder) == read_json(folder / HASHES_FILE))
    return False


def _damaged(folder: Path) -> StorageError:
    return StorageError(f"{folder}: missing or damaged; give the command that made the set again")
