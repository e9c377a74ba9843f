"""Regions of slides, and the files of a cohort that hold them: packs of pixels, and tables.

A pack is an OME-Zarr image with labels; it holds n regions of one size, H x W pixels, along the axis z of c, z, y, x.
What is read may come from a stranger or a failing disk: arrays are opened only where they are laid out and encoded as
they are written here, every chunk has a checksum, and every value of a table is checked.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zarr
from zarr.codecs import ZstdCodec

from counterstain.data.chunked_array import ChunkedArray, Recent, damage_named
from counterstain.data.patches import BAND_PX, shown_of
from counterstain.errors import InputError, StorageError
from counterstain.remote import Place
from counterstain.storage import read_json

CHUNK_PX, LARGEST_CHUNK_PX = 256, 512  # that we write, and that earlier versions wrote
READ_PX = 2048  # rows of an image that are in memory twice, as channels too
SHARD_BYTES = 64 * 2**20  # pixels in one file, where one row of chunks is not more
ZSTD_LEVEL = 1  # as small as level 3 on tissue, in half the time or less (docs/log.md)
UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")  # for terminals and for files
LONGEST_TEXT = 10_000  # characters
LARGEST_PX, LARGEST_ORIGIN_PX = 2**31, 2**40
PACK_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@~-]*")
BOX = ("y0", "x0", "y1", "x1")
COLUMNS = {
    "regions": {
        "region": "text", "slide": "text", "patient": "text", "score": "text?", "split": "text?",
        "height_px": "integer", "width_px": "integer", "mpp_level0": "number?", "x_level0_px": "integer",
        "y_level0_px": "integer", "pack": "text", "index": "integer",
    },
    "instances": {"region": "text", **dict.fromkeys(("instance", "subtype", "area_px", *BOX), "integer")},
}  # fmt: skip
WrongCells = tuple[str, Any, str]  # column, which cells are wrong, what was expected


class PixelWindow(Protocol):
    """An image of ``shape`` H, W, 3, or a map of H, W, that is read piece by piece, such as a region of a slide."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    def read(self, y_px: int, x_px: int, height_px: int, width_px: int) -> np.ndarray:
        """Return a piece of the image, (height_px, width_px, 3) uint8, or of the map, (height_px, width_px) int32."""


def bands_of(pixels: np.ndarray | PixelWindow, top: int = 0, bottom: int | None = None) -> Iterator[np.ndarray]:
    """Yield the rows of an image or a map from ``top`` to ``bottom``, 512 at once."""
    height, width = pixels.shape[:2]
    end = height if bottom is None else min(bottom, height)
    for y in range(top, end, BAND_PX):
        rows = min(BAND_PX, end - y)
        yield pixels[y : y + rows] if isinstance(pixels, np.ndarray) else pixels.read(y, 0, rows, width)


@dataclass(frozen=True, kw_only=True, repr=False)
class Region:
    """A rectangle of a slide with its instances, as it enters a cohort.

    Examples
    --------
    >>> instances = np.zeros((64, 96), np.int32)
    >>> instances[8:20, 30:50] = 1
    >>> image = np.full((64, 96, 3), 230, np.uint8)
    >>> Region(region="r1", slide="s1", patient="p1", image=image, instances=instances, subtypes={1: 4})
    Region(r1 of slide s1, patient p1: 64 x 96 px, 1 instance)
    """

    region: str  # name, unique in the cohort
    slide: str
    patient: str
    image: np.ndarray | PixelWindow  # (H, W, 3) uint8
    instances: np.ndarray | PixelWindow  # (H, W) int32, 0 = background, ids unique in the region
    subtypes: dict[int, int]  # subtype of every instance
    score: str | None = None  # score of the slide; splits are stratified by it
    split: str | None = None  # train, val, test or None
    mpp_level0: float | None = None
    origin_xy_level0_px: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for what in ("region", "slide", "patient", "score"):
            name = getattr(self, what)
            if name is not None and (not name or UNFIT.search(name)):
                raise InputError(f"{what} {name!r}: a name is text without control characters; rename it")

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        shown = f"{height} x {width} px, {len(self.subtypes)} instance{'' if len(self.subtypes) == 1 else 's'}"
        return f"Region({self.region} of slide {self.slide}, patient {self.patient}: {shown})"


def write_pack(store: Path, name: str, regions: Sequence[Region], *, mpp: float, taxonomy: str) -> None:
    """Write the pixels of regions of one size, file by file: an image that is read piece by piece is never whole."""
    n, (height, width) = len(regions), regions[0].instances.shape
    root = zarr.open_group(store, mode="w", zarr_format=3)
    root.attrs["ome"] = multiscales(name, "czyx", mpp) | {"omero": OMERO}
    root.attrs["counterstain"] = {"regions": [region.region for region in regions]}
    image = _create_array(root, "0", (3, n, height, width), "uint8", "czyx")
    labels = root.create_group("labels")
    labels.attrs["ome"] = {"version": "0.5", "labels": ["instances"]}
    group = labels.create_group("instances")
    group.attrs["ome"] = multiscales("instances", "zyx", mpp) | {"image-label": {"source": {"image": "../../"}}}
    group.attrs["counterstain"] = {"taxonomy": taxonomy}
    instances = _create_array(group, "0", (n, height, width), "int32", "zyx")
    for array, kind in ((image, "image"), (instances, "instances")):
        members, rows = array.shards[-3:-1]
        for first, top in itertools.product(range(0, n, members), range(0, height, rows)):
            held, end = regions[first : first + members], min(top + rows, height)
            block = np.empty((*array.shape[:-3], len(held), end - top, width), array.dtype)
            pixels = np.moveaxis(block, 0, -1) if kind == "image" else block
            for index, region in enumerate(held):
                for number, band in enumerate(bands_of(getattr(region, kind), top, end)):
                    pixels[index, number * BAND_PX : (number + 1) * BAND_PX] = band
            array[..., first : first + len(held), top:end, :] = block
    pack = _Pack(store, n, (height, width), Recent(SHARD_BYTES))
    checks = {"image": pack.image.checks().hex(), "instances": pack.instances.checks().hex()}
    root.attrs["counterstain"] = {"regions": pack.regions, "checks": checks}


class _Pack:
    """The arrays of a pack, whose description is checked when it is opened."""

    def __init__(self, store: Place, count: int, shape: tuple[int, int], recent: Recent) -> None:
        with damage_named(store):
            known = read_json(store / "zarr.json")["attributes"]["counterstain"]
            self.regions, checks = known["regions"], known.get("checks", {})  # earlier versions wrote none
            image, instances = (bytes.fromhex(checks[kind]) if checks else None for kind in ("image", "instances"))
            if len(self.regions) != count:
                raise ValueError(f"{len(self.regions)} regions, expected {count}")
        most = (1, LARGEST_CHUNK_PX, LARGEST_CHUNK_PX)
        self.nbytes = 5000 + 200 * count + len(image or b"") + len(instances or b"")
        self.image = ChunkedArray(store / "0", (3, count, *shape), "uint8", (3, *most), recent, checks=image)
        folder = store / "labels" / "instances" / "0"
        self.instances = ChunkedArray(folder, (count, *shape), "int32", most, recent, checks=instances)


class Pixels:
    """The pixels of a cohort's regions, read window by window; the chunks that were used last are kept.

    The methods take the position of a region and a rectangle inside it. They raise StorageError where a file is
    missing, damaged, of another region, or nothing that :func:`write_pack` writes.
    """

    def __init__(self, packs: Place, regions: pd.DataFrame, instances: pd.DataFrame, cache_bytes: int) -> None:
        self._packs, self._recent = packs, Recent(cache_bytes)
        self.shapes = list(zip(regions["height_px"].tolist(), regions["width_px"].tolist(), strict=True))
        self._places = list(zip(*(regions[c].tolist() for c in ("region", "pack", "index")), strict=True))
        self._counts = regions["pack"].value_counts().to_dict()
        self._table = instances[["instance", "area_px", *BOX]].to_numpy(np.int64)
        self._rows = instances.groupby("region", sort=False).indices

    def window(
        self, position: int, y_px: int, x_px: int, height_px: int, width_px: int
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Return an image, (height_px, width_px, 3) uint8, its instances, (height_px, width_px) int32, and their ids.

        Raises StorageError also where these are not the instances of the region's table.
        """
        with self._opened(position) as (pack, index, store):
            rows, columns = slice(y_px, y_px + height_px), slice(x_px, x_px + width_px)
            image = np.empty((height_px, width_px, 3), np.uint8)
            for top in range(0, height_px, READ_PX):
                bottom = min(top + READ_PX, height_px)
                band = slice(y_px + top, y_px + bottom)
                channels = pack.image.read(slice(0, 3), slice(index, index + 1), band, columns)[:, 0]
                for channel in range(3):  # numpy moves an axis four times as slowly
                    image[top:bottom, :, channel] = channels[channel]
            instances = pack.instances.read(slice(index, index + 1), rows, columns)[0]
            name = self._places[position][0]
            shown = shown_of(instances, self._table[self._rows.get(name, [])], y_px, x_px)
            if shown is None:
                raise StorageError(f"{store}: {name} does not show the instances of its table")
            return image, instances, shown

    def instances(self, position: int, y_px: int, x_px: int, height_px: int, width_px: int) -> np.ndarray:
        """Return the instances of a window alone, (height_px, width_px) int32."""
        with self._opened(position) as (pack, index, _):
            window = slice(index, index + 1), slice(y_px, y_px + height_px), slice(x_px, x_px + width_px)
            return pack.instances.read(*window).reshape(height_px, width_px)

    @contextmanager
    def _opened(self, position: int) -> Iterator[tuple[_Pack, int, Place]]:
        """Give the pack of a region, its number there and the folder; say of what is damaged in it how to mend it."""
        region, name, index = self._places[position]
        store, shape = self._packs / f"{name}.ome.zarr", self.shapes[position]
        try:
            pack = self._recent.get(name, lambda: _Pack(store, self._counts[name], shape, self._recent))
            with damage_named(store):
                if pack.regions[index] != region:
                    raise ValueError(f"region {index} of {len(pack.regions)} is not {region!r}")
            yield pack, index, store
        except StorageError as error:
            raise StorageError(f"{error}; import the cohort again") from error


OMERO = {
    "channels": [
        {"label": label, "color": colour, "active": True, "window": {"start": 0, "end": 255, "min": 0, "max": 255}}
        for label, colour in (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))
    ]
}


_AXES = {
    "c": {"name": "c", "type": "channel"},
    "z": {"name": "z", "type": "space"},
    "y": {"name": "y", "type": "space", "unit": "micrometer"},
    "x": {"name": "x", "type": "space", "unit": "micrometer"},
}


def multiscales(name: str, axes: str, mpp: float, levels: int = 1) -> dict[str, Any]:
    """Return the OME-Zarr metadata of an image whose levels are called 0, 1, ..., each half as large as the one before.

    ``mpp`` is micrometres per pixel of level 0.
    """
    datasets = []
    for level in range(levels):
        scale = [mpp * 2**level if axis in "yx" else 1.0 for axis in axes]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    multiscale = {"name": name, "axes": [_AXES[axis] for axis in axes], "datasets": datasets}
    return {"version": "0.5", "multiscales": [multiscale]}


def _create_array(group: zarr.Group, path: str, shape: tuple[int, ...], dtype: str, axes: str) -> Any:
    """Create an array whose files hold whole regions, as many as fit into one, or of a large region a band of rows."""
    *channels, count, height, width = shape
    chunk = (*channels, 1, min(height, CHUNK_PX), min(width, CHUNK_PX))
    down, across = (-(-length // size) for length, size in zip(shape[-2:], chunk[-2:], strict=True))
    row_bytes = int(np.prod(chunk)) * across * np.dtype(dtype).itemsize
    rows = min(down, max(1, SHARD_BYTES // row_bytes))
    members = min(count, max(1, SHARD_BYTES // (row_bytes * down)))
    shards = (*channels, members, rows * chunk[-2], across * chunk[-1])
    layout: Any = {"chunks": chunk, "shards": shards, "dimension_names": tuple(axes)}
    layout |= {"compressors": ZstdCodec(level=ZSTD_LEVEL, checksum=True)}
    # empty chunks are written, so that a chunk that is missing later is known to be lost
    return group.create_array(path, shape=shape, dtype=dtype, config={"write_empty_chunks": True}, **layout)


def read_tables(
    folder: Place, hashes: Mapping[str, Collection[str]], *, subtypes: Collection[int], parts: Collection[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the regions and the instances of a cohort; StorageError where a value cannot be."""
    regions, instances = (
        read_table(folder / f"{name}.parquet", columns, hashes.get(name, ())) for name, columns in COLUMNS.items()
    )
    for name, table, wrong_cells in (
        ("regions", regions, _wrong_in_regions(regions, parts)),
        ("instances", instances, _wrong_in_instances(instances, regions, subtypes)),
    ):
        for column, wrong, expected in wrong_cells:
            if np.any(wrong):
                row = int(np.argmax(wrong))
                value = str(table[column].iloc[row])[:80]
                place = f"{folder / name}.parquet row {row + 1}"
                raise StorageError(f"{place}: {column} is {value!r}, expected {expected}")
    return regions, instances


def _wrong_in_regions(regions: pd.DataFrame, parts: Collection[str]) -> Iterator[WrongCells]:
    if regions.empty:
        raise ValueError("there is no region")
    for name, kind in COLUMNS["regions"].items():
        if kind.startswith("text"):
            yield name, regions[name].fillna("").astype("str").str.contains(UNFIT), "text without control characters"
    yield "region", regions["region"].duplicated(), "a name of its own"
    yield "split", ~regions["split"].isin([*parts, None]), "a part of the split"
    yield "mpp_level0", regions["mpp_level0"].astype("float64").le(0), "micrometres per pixel"
    for axis, edge in (("x", "width_px"), ("y", "height_px")):
        yield edge, ~regions[edge].between(1, LARGEST_PX), "pixels"
        yield f"{axis}_level0_px", regions[f"{axis}_level0_px"].abs() > LARGEST_ORIGIN_PX, "pixels on the slide"
    yield "pack", ~regions["pack"].str.fullmatch(PACK_NAME), "the name of a pack"
    yield "index", regions["index"].lt(0) | regions.duplicated(["pack", "index"]), "a place of its own in the pack"


def _wrong_in_instances(
    instances: pd.DataFrame, regions: pd.DataFrame, subtypes: Collection[int]
) -> Iterator[WrongCells]:
    region = pd.Index(regions["region"]).get_indexer(instances["region"])
    yield "region", region < 0, "a region of regions.parquet"
    yield "instance", ~instances["instance"].between(1, LARGEST_PX - 1), "1, 2, 3, …"
    place = pd.Series(region * LARGEST_PX + instances["instance"].to_numpy())
    yield "instance", place.duplicated(), "a number of its own in the region"
    yield "subtype", ~instances["subtype"].isin(subtypes), "the id of a subtype"
    y0, x0, y1, x1 = (instances[edge].to_numpy() for edge in BOX)
    height, width = (regions[edge].to_numpy()[region] for edge in ("height_px", "width_px"))
    yield "y1", (y0 < 0) | (y0 >= y1) | (y1 > height), "the end of a box in the region"
    yield "x1", (x0 < 0) | (x0 >= x1) | (x1 > width), "the end of a box in the region"
    yield "area_px", ~instances["area_px"].between(1, (y1 - y0) * (x1 - x0)), "no more pixels than the box has"


def read_table(file: Place, columns: Mapping[str, str], hashes: Collection[str] = ()) -> pd.DataFrame:
    """Read columns of a Parquet table: name -> ``text``, ``integer``, ``number``, ``flag``, ``texts`` or ``numbers``.

    Those that end in ``?`` may hold nothing; those that end in ``*`` may be missing. The file must have one of the
    ``hashes`` (SHA-256), where there are any. Raises StorageError where a column is missing, twice there, of another
    type, or the file is damaged.
    """
    with damage_named(file):
        content = file.read_bytes()
        if hashes and hashlib.sha256(content).hexdigest() not in hashes:
            raise ValueError("its content is not what was written")
        schema = pq.read_schema(pa.BufferReader(content))
        names = schema.names
        for name, kind in columns.items():
            if names.count(name) > 1 or (name not in names and not kind.endswith("*")):
                raise ValueError(f"column {name!r} is {'there twice' if name in names else 'missing'}")
        kinds = {name: columns[name].rstrip("*") for name in names if name in columns}
        is_text, _ = TYPES["text"]
        texts = [name for name in kinds if any(accepts(schema.field(name).type) for accepts in is_text)]
        stored = pq.ParquetFile(pa.BufferReader(content), read_dictionary=texts)  # a text of many rows is held once
        if stored.metadata.num_rows > 4 * len(content):  # repeated tissue has more than one in a byte
            raise ValueError(f"{stored.metadata.num_rows:,} rows in {len(content):,} bytes")
        table = stored.read(columns=list(kinds)).select(list(kinds))
        table = pa.table({name: _typed(table[name], kind, name) for name, kind in kinds.items()})
        read: pd.DataFrame = table.to_pandas()
    return read


def _typed(column: Any, kind: str, name: str) -> Any:
    """Return a column of a table as the type of its kind; raises ValueError where it holds something else."""
    held = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if column.null_count and not kind.endswith("?"):
        raise ValueError(f"column {name!r} has empty cells")
    if pa.types.is_null(held):
        return column if kind.endswith("?") else column.cast(TYPES[kind][1])
    accepted, target = TYPES[kind.rstrip("?")]
    if not any(accepts(held) for accepts in accepted):
        raise ValueError(f"column {name!r} is of {held}, expected {kind.rstrip('?')}")
    if pa.types.is_dictionary(column.type):
        longest = max((len(text or "") for chunk in column.chunks for text in chunk.dictionary.to_pylist()), default=0)
        if longest > LONGEST_TEXT:
            raise ValueError(f"column {name!r} has a text of {longest:,} characters")
    column = column.cast(target)
    if kind == "number" and not pc.all(pc.is_finite(column)).as_py():
        raise ValueError(f"column {name!r} holds what is no finite number")
    return column


def _is_list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda held: pa.types.is_list(held) and accepts(held.value_type)


TYPES: dict[str, tuple[tuple[Callable[[Any], bool], ...], Any]] = {
    "text": ((pa.types.is_string, pa.types.is_large_string), pa.string()),
    "integer": ((pa.types.is_integer,), pa.int64()),
    "number": ((pa.types.is_integer, pa.types.is_floating), pa.float64()),
    "flag": ((pa.types.is_boolean,), pa.bool_()),
    "texts": ((_is_list_of(pa.types.is_string),), pa.list_(pa.string())),
    "numbers": ((_is_list_of(pa.types.is_floating),), pa.list_(pa.float64())),
}
