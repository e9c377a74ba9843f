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

from counterstain.errors import InputError, StorageError
from counterstain.storage import read_json

CHUNK_PX = 512
SHARD_BYTES = 64 * 2**20  # packs up to this size are one file each
CODECS = {"bytes", "zstd", "crc32c", "sharding_indexed"}
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


def bands_of(pixels: np.ndarray | PixelWindow) -> Iterator[np.ndarray]:
    """Yield an image or a map from top to bottom, as many rows at once as a chunk has."""
    height, width = pixels.shape[:2]
    for top in range(0, height, CHUNK_PX):
        rows = min(CHUNK_PX, height - top)
        yield pixels[top : top + rows] if isinstance(pixels, np.ndarray) else pixels.read(top, 0, rows, width)


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
    """Write the pixels of regions of one size.

    Packs too large for one file are written in bands, so that an image that is read piece by piece is never in memory
    as a whole.
    """
    n, (height, width) = len(regions), regions[0].instances.shape
    root = zarr.open_group(store, mode="w", zarr_format=3)
    root.attrs["ome"] = _multiscales(name, "czyx", mpp) | {"omero": _OMERO}
    root.attrs["counterstain"] = {"regions": [region.region for region in regions]}
    image = _create_array(root, "0", (3, n, height, width), "uint8", "czyx")
    labels = root.create_group("labels")
    labels.attrs["ome"] = {"version": "0.5", "labels": ["instances"]}
    group = labels.create_group("instances")
    group.attrs["ome"] = _multiscales("instances", "zyx", mpp) | {"image-label": {"source": {"image": "../../"}}}
    group.attrs["counterstain"] = {"taxonomy": taxonomy}
    instances = _create_array(group, "0", (n, height, width), "int32", "zyx")
    if image.shards:  # one file: written in one piece
        image[:] = np.stack([np.moveaxis(np.concatenate([*bands_of(r.image)]), -1, 0) for r in regions], axis=1)
    if instances.shards:
        instances[:] = np.stack([np.concatenate([*bands_of(r.instances)]) for r in regions])
    for index, region in enumerate(regions):
        for number, band in enumerate(() if image.shards else bands_of(region.image)):
            image[:, index, number * CHUNK_PX : (number + 1) * CHUNK_PX] = np.moveaxis(band, -1, 0)
        for number, band in enumerate(() if instances.shards else bands_of(region.instances)):
            instances[index, number * CHUNK_PX : (number + 1) * CHUNK_PX] = band


def read_pack(
    store: Path, region: str, index: int, count: int, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Read a region, number ``index`` of ``count``: image, (H, W, 3) uint8, and instances, (H, W) int32.

    Raises StorageError where a file is missing, damaged, of another region, or nothing that :func:`write_pack` writes.
    """
    with _damage_named(store):
        named = read_json(store / "zarr.json")["attributes"]["counterstain"]["regions"]
        if len(named) != count or named[index] != region:
            raise ValueError(f"region {index} of {count} is not {region!r}")
    chunk = (CHUNK_PX, CHUNK_PX)
    channels = read_array(store / "0", (3, count, *shape), "uint8", (3, 1, *chunk), index)
    instances = read_array(store / "labels" / "instances" / "0", (count, *shape), "int32", (1, *chunk), index)
    return np.ascontiguousarray(np.moveaxis(channels, 0, -1)), instances


def read_array(
    folder: Path, shape: tuple[int, ...], dtype: str, largest_chunk: tuple[int, ...], index: int | None = None
) -> np.ndarray:
    """Read a Zarr array, or what has an index on its third axis from the end; all else is checked before it is decoded.

    Raises StorageError where it is missing, damaged, or not what counterstain writes: another codec could run code, and
    chunks that are missing would be read as zeros.
    """
    with _damage_named(folder):
        described = read_json(folder / "zarr.json")
        keys = {"name": "default", "configuration": {"separator": "/"}}
        known = {"zarr_format": 3, "node_type": "array", "shape": [*shape], "data_type": dtype, "fill_value": 0}
        for key, expected in (known | {"chunk_key_encoding": keys}).items():
            if described[key] != expected:
                raise ValueError(f"{key} is {str(described[key])[:80]}, expected {expected}")
        if strange := sorted({*_codecs(described["codecs"])} - CODECS):
            raise ValueError(f"codec {strange[0][:80]!r}, expected {', '.join(sorted(CODECS))}")
        array: Any = zarr.open_array(folder, mode="r", zarr_format=3)
        file_shape = array.shards or array.chunks
        if any(found > most for found, most in zip(array.chunks, largest_chunk, strict=True)):
            raise ValueError(f"chunks of {array.chunks}, expected {largest_chunk} at most")
        if array.shards and np.prod(array.shards) * array.dtype.itemsize > 8 * SHARD_BYTES:
            raise ValueError(f"shards of {array.shards}, expected {SHARD_BYTES:,} bytes")
        files = [range(-(-length // size)) for length, size in zip(shape, file_shape, strict=True)]
        if index is not None:
            files[-3] = range(index // file_shape[-3], index // file_shape[-3] + 1)
        for place in itertools.product(*files):
            chunk = (folder / "c").joinpath(*map(str, place))
            if not chunk.is_file() or not chunk.stat().st_size:
                raise ValueError(f"chunk {place} is missing")
        return np.asarray(array[...] if index is None else array[..., index, :, :])


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what zarr, pyarrow, their codecs and hostile content raise into a StorageError of one line."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise StorageError(f"{path} is missing or damaged ({reason})") from error


def _codecs(codecs: Any) -> Iterator[str]:
    for codec in codecs:
        yield str(codec["name"])
        settings = codec.get("configuration") or {}
        for inner in ("codecs", "index_codecs"):
            yield from _codecs(settings.get(inner, ()))


_OMERO = {
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


def _multiscales(name: str, axes: str, mpp: float) -> dict[str, Any]:
    scale = [mpp if axis in "yx" else 1.0 for axis in axes]
    dataset = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
    multiscale = {"name": name, "axes": [_AXES[axis] for axis in axes], "datasets": [dataset]}
    return {"version": "0.5", "multiscales": [multiscale]}


def _create_array(group: zarr.Group, path: str, shape: tuple[int, ...], dtype: str, axes: str) -> Any:
    sizes = dict(zip(axes, shape, strict=True))
    chunk = tuple({"c": n, "z": 1}.get(axis, min(n, CHUNK_PX)) for axis, n in sizes.items())
    whole = tuple(-(-length // size) * size for length, size in zip(shape, chunk, strict=True))
    shards = whole if np.prod(shape) * np.dtype(dtype).itemsize <= SHARD_BYTES else None
    layout: Any = {"chunks": chunk, "shards": shards, "dimension_names": tuple(axes)}
    layout |= {"compressors": ZstdCodec(checksum=True)}
    # empty chunks are written, so that a chunk that is missing later is known to be lost
    return group.create_array(path, shape=shape, dtype=dtype, config={"write_empty_chunks": True}, **layout)


def read_tables(
    folder: Path, hashes: Mapping[str, Collection[str]], *, subtypes: Collection[int], parts: Collection[str]
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


def read_table(file: Path, columns: Mapping[str, str], hashes: Collection[str] = ()) -> pd.DataFrame:
    """Read columns of a Parquet table: name -> ``text``, ``integer``, ``number``, ``flag``, ``texts`` or ``numbers``.

    Those that end in ``?`` may hold nothing; those that end in ``*`` may be missing. The file must have one of the
    ``hashes`` (SHA-256), where there are any. Raises StorageError where a column is missing, twice there, of another
    type, or the file is damaged.
    """
    with _damage_named(file):
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
        if stored.metadata.num_rows > len(content):
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
