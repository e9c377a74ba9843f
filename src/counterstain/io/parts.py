"""Where an image or a label image lies: in a file of its own, or as a part of a larger file.

A part is written ``FILE[KEY]``: ``images.npy[17]``, ``arrays.npz[masks,17]``, ``train.parquet[image,17]``,
``slide.ome.zarr[labels/nuclei]``, ``sheet.png[1/6]`` (the first of six pictures side by side), ``coco.json[a.png]``.
Arrays are read without pickles, which would run code. Shapes: H, W = rows and columns, C = channels.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from counterstain.errors import InputError
from counterstain.storage import fingerprint, sha256_of

ARRAYS = (".npy", ".npz", ".zarr")
CLASSED = (".mat",)  # label files that number instances and name their classes
MAP = "inst_map"  # what HoVer-Net and CoNSeP call the instance map of a .mat or .npz file
OUTLINES = (".json", ".geojson", ".xml", ".annotations")
WITHOUT_PIXELS = re.compile(
    rf".*({'|'.join(map(re.escape, (*CLASSED, *OUTLINES)))})(\[.+\])?", re.IGNORECASE | re.DOTALL
)
BIOFORMATS2RAW = "bioformats2raw.layout"
PANEL = re.compile(r"([1-9]\d?)/([1-9]\d?)")
MOST_VALUES = 3 * 2**28  # of an array that is read at once
OBJECTS = "holds Python objects (a pickle), which run code when they are read; save arrays with numpy.savez or as TIFF"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a file, by its key."""

    path: Path
    key: str

    @property
    def name(self) -> str:
        """The file's name with the key."""
        return f"{self.path.name}[{self.key}]"

    @property
    def suffix(self) -> str:
        """The file's suffix."""
        return self.path.suffix

    def __str__(self) -> str:
        return f"{self.path}[{self.key}]"


Source = Path | Part


def source_of(folder: Path, text: str) -> Source:
    """Return the file, or the part of a file, that a text names; whether it is there shows when it is read.

    Names of folders and keys may have brackets of their own: the first one after a file counts.
    """
    brackets = [found.start() for found in re.finditer(r"\[", text)] if text.endswith("]") else []
    if not brackets or (folder / text).exists():
        return folder / text
    of_files = (i for i in brackets if (folder / text[:i]).suffix == ".zarr" or (folder / text[:i]).is_file())
    start = next(of_files, brackets[-1])
    return Part(folder / text[:start], text[start + 1 : -1])


def is_pixels(source: Source | str) -> bool:
    """Whether a label file holds a value for each pixel and nothing else; otherwise instances and their classes."""
    if isinstance(source, str):
        return WITHOUT_PIXELS.fullmatch(source) is None
    return source.suffix.lower() not in {*CLASSED, *OUTLINES}


def is_outlines(source: Source) -> bool:
    """Whether a label file holds outlines or points."""
    return source.suffix.lower() in OUTLINES


def hash_of(source: Source) -> str:
    """Return a hash of a file, of all files of a folder, or of a file and the key of a part of it."""
    path = source if isinstance(source, Path) else source.path
    if path.is_dir():
        whole = _hash_of_folder(path)
    else:
        whole = sha256_of(path) if isinstance(source, Path) else _hash_once(path, path.stat().st_mtime_ns)
    return whole if isinstance(source, Path) else fingerprint([whole, source.key])


@lru_cache(maxsize=64)
def _hash_once(path: Path, _: int) -> str:
    return sha256_of(path)


@lru_cache(maxsize=64)
def _hash_of_folder(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return fingerprint([[file.relative_to(path).as_posix(), sha256_of(file)] for file in files])


def stored_file(source: Source) -> Path | io.BytesIO:
    """Return what Pillow opens: the file, or the bytes of an image in a Parquet table."""
    if isinstance(source, Path):
        return source
    return io.BytesIO(_cell(source)) if source.suffix == ".parquet" else source.path


def panel_of(source: Source, width: int) -> slice:
    """Return the columns of a picture ``width`` px wide that a source means: all, or one of n pictures side by side."""
    if isinstance(source, Path) or source.suffix == ".parquet":
        return slice(0, width)
    found = PANEL.fullmatch(source.key)
    number, count = map(int, found.groups()) if found else (1, 0)
    if not 0 < number <= count or width % count:
        raise InputError(f"{source}: expected a picture such as 1/6 of a row, {width} px wide in all")
    return slice((number - 1) * width // count, number * width // count)


def _cell(source: Part) -> bytes:
    column, _, row = source.key.rpartition(",")
    with damage_named(source):
        stat = source.path.stat()
        file, position = _parquet(source.path, stat.st_mtime_ns), int(row)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if position < rows:
                value = _row_group(source.path, stat.st_mtime_ns, group, column)[position].as_py()
                value = value.get("bytes") if isinstance(value, dict) else value
                if isinstance(value, bytes):
                    return value
                raise InputError(
                    f"{source}: holds no image but {type(value).__name__}; expected the bytes of a PNG or TIFF file, "
                    "as in the column of an Image feature"
                )
            position -= rows
    raise InputError(f"{source}: no such row")


@lru_cache(maxsize=4)
def _parquet(path: Path, _: int) -> Any:
    return pq.ParquetFile(path)


@lru_cache(maxsize=2)
def _row_group(path: Path, modified: int, group: int, column: str) -> Any:
    return _parquet(path, modified).read_row_group(group, columns=[column])[column]


def array_of(source: Source) -> np.ndarray | None:
    """Read an array of NumPy or of OME-Zarr with its channels last; None of other files.

    Raises InputError where it is missing, damaged, too large, or holds objects instead of numbers.
    """
    path = source if isinstance(source, Path) else source.path
    if path.suffix not in ARRAYS:
        return None
    key = None if isinstance(source, Path) else source.key
    with damage_named(source), np.errstate(over="ignore"):  # of the sizes that a header claims
        if path.suffix == ".zarr":
            return ome_image(path, key)[0]
        name, _, index = (key or "").rpartition(",")
        if path.suffix == ".npz" and not index.isdecimal():
            name, index = key or "", ""
        arrays: Any = np.load(path, mmap_mode="r") if path.suffix == ".npy" else arrays_in(path)
        stack = arrays if path.suffix == ".npy" else _named(source, arrays, name)
        return _checked(source, stack[int(index)] if index else stack)


def _checked(source: Source, array: Any) -> np.ndarray:
    if array.dtype.kind == "O":
        raise InputError(f"{source}: {OBJECTS}")
    if array.size > MOST_VALUES:
        raise InputError(f"{source}: an array of {array.shape}, more than can be read at once; cut it into regions")
    if array.ndim not in {2, 3} or not array.size:
        raise InputError(f"{source}: an array of {array.shape}; expected (rows, columns) or (rows, columns, channels)")
    return np.asarray(array)


def arrays_in(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a .npz file; those read last are kept."""
    with damage_named(path):
        stat = path.stat()
        return _npz(path, stat.st_mtime_ns)


@lru_cache(maxsize=1)
def _npz(path: Path, _: int) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > 8 * MOST_VALUES:
            raise InputError(f"{path}: larger than can be read at once; save each image into a file of its own")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _named(source: Source, arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    if not name and (len(arrays) == 1 or MAP in arrays):
        return arrays[MAP] if MAP in arrays else next(iter(arrays.values()))
    if name not in arrays:
        raise InputError(f"{source}: holds the arrays {', '.join(sorted(arrays))}; name one, as in FILE.npz[NAME]")
    return arrays[name]


def ome_image(path: Path, key: str | None = None) -> tuple[np.ndarray, dict[str, Any], float | None]:
    """Read the largest level of an OME-Zarr image, or of the image at ``key`` in it, such as labels/nuclei.

    Returns the array, (H, W) or (H, W, C), the metadata and micrometres per pixel where they are said.
    """
    with damage_named(path):
        group, said = _ome_group(path, key)
        scales = said["multiscales"][0]
        axes = [axis["name"] if isinstance(axis, dict) else axis for axis in scales["axes"]]
        level: Any = group[scales["datasets"][0]["path"]]
        if level.size > MOST_VALUES or level.dtype.kind not in "buif":
            raise InputError(f"{path}: {level.shape} of {level.dtype}, which is not read at once; cut it into regions")
        array = np.asarray(level[...])
    for axis in [axis for axis in axes if axis not in {"y", "x", "c"}]:
        if array.shape[axes.index(axis)] != 1:
            raise InputError(f"{path}: {array.shape[axes.index(axis)]} images along {axis}; save one as its own image")
        array = array.take(0, axes.index(axis))
        axes.remove(axis)
    if sorted(axes) not in (["x", "y"], ["c", "x", "y"]):
        raise InputError(f"{path}: axes {', '.join(axes)}; expected y, x and perhaps c")
    array = array.transpose([axes.index(axis) for axis in ("y", "x", "c") if axis in axes])
    return array, said, _mpp(scales)


def _ome_group(path: Path, key: str | None) -> tuple[Any, dict[str, Any]]:
    """Open what lies at ``key``, and return its metadata as well; what bioformats2raw wrote lies in a series, ``0``."""
    import zarr

    root: Any = zarr.open_group(path, mode="r")
    if key is None or key not in root:
        images = [name for name, _ in root.groups() if name.isdecimal()] if BIOFORMATS2RAW in _said(root) else []
        if len(images) > 1:
            raise InputError(
                f"{path}: images {', '.join(sorted(images))}; name one in a table for counterstain import table, as in "
                f"{path.name}[{min(images)}], and its labels as in {path.name}[{min(images)}/labels/NAME]"
            )
        key = "/".join([*images, *([key] if key else [])])
    group = root[key] if key else root
    return group, _said(group)


def _said(group: Any) -> dict[str, Any]:
    said: Any = dict(group.attrs)
    return dict(said.get("ome", said))


def ome_labels(path: Path) -> list[str]:
    """Return the names of the images of labels of an OME-Zarr image."""
    with damage_named(path):
        group, _ = _ome_group(path, None)
        said = _said(group["labels"]) if "labels" in group else {}
        return [str(name) for name in said.get("labels", [])]


def ome_classes(source: Source) -> dict[int, str]:
    """Return the class of each number of an image of labels, where its properties have one; nothing of other files."""
    if isinstance(source, Path) or source.suffix != ".zarr":
        return {}
    properties = ome_image(source.path, source.key)[1].get("image-label", {}).get("properties", [])
    with damage_named(source):
        return {int(row["label-value"]): str(row["class"]) for row in properties if row.get("class")}


def _mpp(scales: dict[str, Any]) -> float | None:
    transforms = [t for t in scales["datasets"][0].get("coordinateTransformations", ()) if t.get("type") == "scale"]
    axes = scales["axes"]
    for transform in transforms:
        sizes = {
            axis["name"]: size
            for axis, size in zip(axes, transform["scale"], strict=False)
            if isinstance(axis, dict) and axis.get("unit") == "micrometer"
        }
        if sizes.get("x") and sizes.get("x") == sizes.get("y"):
            return float(sizes["x"])
    return None


def image_array(source: Source) -> np.ndarray | None:
    """Return an image that is an array as (H, W, 3) uint8; None where it is no array.

    Raises InputError where it is not certain how its numbers are shown.
    """
    array = array_of(source)
    if array is None:
        return None
    what = f"{source}: an array of {array.shape}, {array.dtype}"
    if array.ndim != 3 or array.shape[2] != 3:
        raise InputError(f"{what}, is no RGB image; expected (rows, columns, 3)")
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iuf" or not (array.min() >= 0 and 1 < array.max() <= 255 and whole(array)):
        raise InputError(f"{what}, has values other than the whole numbers 0 to 255; save it as uint8")
    return array.astype(np.uint8)


def whole(array: np.ndarray) -> bool:
    """Whether all numbers are whole and finite."""
    return array.dtype.kind in "bui" or (
        array.dtype.kind == "f" and bool((np.isfinite(array) & (array % 1 == 0)).all())
    )


@contextmanager
def damage_named(source: Source) -> Iterator[None]:
    """Make one InputError of whatever is raised over a file that is missing, damaged or of another kind."""
    path = source if isinstance(source, Path) else source.path
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        said = "no such part, or damaged; check its name, or export it again" if path.exists() else "no such file"
        raise InputError(f"{source}: {said}") from error
    except (IndexError, KeyError) as error:
        raise InputError(f"{source}: no such part, or not laid out as expected ({error}); export it again") from error
    except Exception as error:  # libraries raise whatever they meet in damaged files
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise InputError(f"{source}: {OBJECTS}") from error
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{source}: damaged or not what its name says ({said}); export it again") from error
