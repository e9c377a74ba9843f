"""Zarr arrays read window by window: only the chunks under a window are decoded, and those used last are kept.

Of an array at a URL, only those chunks are fetched, all of a window at the same time.

What is read may come from a stranger or a failing disk, so an array is read only where it is laid out and encoded as we
write it, and no chunk can take more memory than it was described to have. Zarr's own reader takes several times as long
for a window and decodes whatever a chunk claims to hold (docs/performance.md).
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numcodecs.zstd import decompress  # type: ignore[import-untyped]

from counterstain.errors import StorageError
from counterstain.remote import Place, RemoteFolder
from counterstain.storage import REMAKE, read_json

CODECS = {"bytes", "zstd", "crc32c", "sharding_indexed"}
LOST = 2**64 - 1  # in the index of a shard: there is no such chunk
CHECK_BYTES = 4
MOST_OPEN = 16  # files of an array at once
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class Sized(Protocol):
    """Anything that knows how much memory it takes."""

    @property
    def nbytes(self) -> int: ...  # noqa: D102


class Recent:
    """What was used last, up to a number of bytes; for several threads. Another process begins with nothing."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._bytes, self._lock = most_bytes, 0, Lock()
        self._held: OrderedDict[Hashable, Sized] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self._most_bytes,)

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._held

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what has this key; make it where it is not held."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        made = make()  # by two threads at once, at worst
        with self._lock:
            self._bytes += made.nbytes - (self._held.pop(key).nbytes if key in self._held else 0)
            self._held[key] = made
            while self._bytes > self._most_bytes and len(self._held) > 1:
                self._bytes -= self._held.popitem(last=False)[1].nbytes
        return made


class ChunkedArray:
    """A Zarr array whose description is checked before anything of it is decoded.

    Raises StorageError, as its methods do, where it is missing, damaged, or not what counterstain writes: another codec
    could run code, and chunks that are missing would be read as zeros.

    Parameters
    ----------
    largest_chunk : sequence of int
        Most that a chunk may have along each axis.
    checks : bytes
        What :meth:`checks` returned when the array was written; a chunk of another array is noticed by it.
    """

    def __init__(
        self,
        folder: Place,
        shape: Sequence[int],
        dtype: str,
        largest_chunk: Sequence[int],
        recent: Recent,
        *,
        checks: bytes | None = None,
    ) -> None:
        self.folder, self._key, self._recent, self._checks = folder, str(folder), recent, checks
        with damage_named(folder):
            described = read_json(folder / "zarr.json")
            _check(described, {"zarr_format": 3, "node_type": "array", "shape": [*shape], "fill_value": 0})
            keys = {"name": "default", "configuration": {"separator": "/"}}
            _check(described, {"data_type": dtype, "chunk_key_encoding": keys})
            if strange := sorted({*_names(described["codecs"])} - CODECS):
                raise ValueError(f"codec {strange[0][:80]!r}, expected {', '.join(sorted(CODECS))}")
            grid, codecs = described["chunk_grid"], described["codecs"]
            _check(grid, {"name": "regular"})
            self._per_file = _lengths(grid["configuration"]["chunk_shape"], shape)
            self.chunk = self._per_file
            self._is_sharded = codecs[0]["name"] == "sharding_indexed"
            if self._is_sharded:
                layout = codecs[0]["configuration"]
                self.chunk = _lengths(layout["chunk_shape"], shape)
                _check(layout, {"index_location": "end"})
                if [*_names(layout["index_codecs"])] != ["bytes", "crc32c"]:
                    raise ValueError("its index is encoded in another way")
                codecs = [*codecs[1:], *layout["codecs"]]
            if [*_names(codecs)] != ["bytes", "zstd"] or codecs[0].get("configuration") not in LITTLE[dtype]:
                raise ValueError(f"codecs {', '.join(_names(codecs))[:80]}, expected bytes, zstd")
            if any(found > most for found, most in zip(self.chunk, largest_chunk, strict=True)):
                raise ValueError(f"chunks of {self.chunk}, expected {tuple(largest_chunk)} at most")
            if any(whole % part for whole, part in zip(self._per_file, self.chunk, strict=True)):
                raise ValueError(f"files of {self._per_file}, expected whole chunks of {self.chunk}")
        self._dtype = np.dtype(dtype)
        self._grid = tuple(whole // part for whole, part in zip(self._per_file, self.chunk, strict=True))
        self._chunks = tuple(-(-length // size) for length, size in zip(shape, self.chunk, strict=True))
        self._chunk_bytes = int(np.prod(self.chunk)) * self._dtype.itemsize

    def read(self, *window: slice) -> np.ndarray:
        """Return what lies in a window: a slice with a start and a stop inside the array for each axis."""
        out = np.empty([along.stop - along.start for along in window], self._dtype)
        steps = [
            [(n, *_overlap(along, n, size)) for n in range(along.start // size, -(-along.stop // size))]
            for along, size in zip(window, self.chunk, strict=True)
        ]
        with self._files() as opened:
            if isinstance(self.folder, RemoteFolder):
                self._fetch(itertools.product(*([n for n, *_ in along] for along in steps)), opened)
            for pieces in itertools.product(*steps):
                place, into, cut = zip(*pieces, strict=True)
                out[into] = self._recent.get((self._key, place), partial(self._decoded, place, opened))[cut]
        return out

    def checks(self) -> bytes:
        """Return the checksums of all chunks, four bytes each: of their pixels, not of their encoded bytes."""
        with self._files() as opened:
            places = itertools.product(*map(range, self._chunks))
            return b"".join(self._encoded(place, opened)[-CHECK_BYTES:] for place in places)

    @contextmanager
    def _files(self) -> Iterator[Callable[[tuple[int, ...]], Any]]:
        """Give what opens the file of a place in the grid of files, keeps it open for its next chunk, and closes it."""
        held: dict[tuple[int, ...], Any] = {}

        def opened(place: tuple[int, ...]) -> Any:
            if place not in held:
                if len(held) == MOST_OPEN and isinstance(self.folder, Path):  # those at a URL hold what was fetched
                    held.pop(next(iter(held))).close()
                held[place] = _opened(self.folder, place)
            return held[place]

        try:
            with damage_named(self.folder):
                yield opened
        finally:
            for file in held.values():
                file.close()

    def _decoded(self, place: tuple[int, ...], opened: Callable[[tuple[int, ...]], Any]) -> np.ndarray:
        encoded = self._encoded(place, opened)
        if (found := _content_bytes(encoded)) != self._chunk_bytes:
            raise ValueError(f"chunk {place} has {found:,} bytes, expected {self._chunk_bytes:,}")
        if self._checks is not None:
            start = CHECK_BYTES * int(np.ravel_multi_index(place, self._chunks))
            if encoded[-CHECK_BYTES:] != self._checks[start : start + CHECK_BYTES]:
                raise ValueError(f"chunk {place} is of another pack or was replaced")
        chunk = np.empty(self.chunk, self._dtype)
        decompress(encoded, chunk.reshape(-1).view(np.uint8))  # no more than fits, whatever follows
        chunk.flags.writeable = False
        return chunk

    def _encoded(self, place: tuple[int, ...], opened: Callable[[tuple[int, ...]], Any]) -> bytes:
        file, start, length = self._found(place, opened)
        file.seek(start)
        encoded: bytes = file.read(length)
        return encoded

    def _found(self, place: tuple[int, ...], opened: Callable[[tuple[int, ...]], Any]) -> tuple[Any, int, int]:
        """Return the file that a chunk lies in, and its start and length there in bytes."""
        of_file = tuple(n // per for n, per in zip(place, self._grid, strict=True))
        file = opened(of_file)
        if self._is_sharded:
            index = self._recent.get((self._key, "index", of_file), partial(self._index, file))
            start, length = index[tuple(n % per for n, per in zip(place, self._grid, strict=True))].tolist()
        else:
            start, length = 0, file.seek(0, 2)
        if start == LOST or not length:
            raise ValueError(f"chunk {place} is missing")
        if length > 2 * self._chunk_bytes + 1024:
            raise ValueError(f"chunk {place} takes {length:,} bytes")
        return file, start, length

    def _fetch(self, places: Iterable[tuple[int, ...]], opened: Callable[[tuple[int, ...]], Any]) -> None:
        """Fetch those chunks that are not held, of a file at the same time."""
        ranges: dict[Any, list[tuple[int, int]]] = {}
        for place in places:
            if (self._key, place) not in self._recent:
                file, *piece = self._found(place, opened)
                ranges.setdefault(file, []).append((piece[0], piece[1]))
        for file, wanted in ranges.items():
            file.fetch(wanted)

    def _index(self, opened: Any) -> np.ndarray:
        """Read where the chunks of a shard lie: (…, 2) starts and lengths in bytes."""
        size = opened.seek(0, 2)
        index_bytes = int(np.prod(self._grid)) * 16
        if size < index_bytes + CHECK_BYTES:
            raise ValueError(f"a shard of {size:,} bytes, expected an index of {index_bytes:,} at its end")
        opened.seek(size - index_bytes - CHECK_BYTES)
        read = opened.read(index_bytes + CHECK_BYTES)
        content, check = read[:index_bytes], read[index_bytes:]
        if google_crc32c.value(content) != int.from_bytes(check, "little"):
            raise ValueError("the index of a shard is not what was written")
        index = np.frombuffer(content, "<u8").reshape(*self._grid, 2)
        start, length = index[..., 0], index[..., 1]
        if not np.all((start == LOST) | ((start <= size) & (length <= size) & (start + length <= size))):
            raise ValueError("the index of a shard leads beyond its end")
        return index


LITTLE: dict[str, tuple[Any, ...]] = {"uint8": (None, {}, {"endian": "little"}), "int32": ({"endian": "little"},)}


def _opened(folder: Place, place: tuple[int, ...]) -> Any:
    try:
        return folder.joinpath("c", *map(str, place)).open("rb", buffering=0)
    except FileNotFoundError:
        raise ValueError(f"chunk {place} is missing") from None


def _overlap(along: slice, number: int, size: int) -> tuple[slice, slice]:
    """Return which part of a window a chunk fills along one axis, and which of its parts does so."""
    start, stop = max(along.start, number * size), min(along.stop, (number + 1) * size)
    return slice(start - along.start, stop - along.start), slice(start - number * size, stop - number * size)


def _content_bytes(frame: bytes) -> int:
    """Return how many bytes a Zstandard frame holds, from its header (RFC 8878, 3.1.1.1); 0 where it does not say."""
    if frame[:4] != ZSTD_MAGIC:
        raise ValueError("a chunk is no Zstandard frame")
    descriptor = frame[4]
    is_single, size_flag = descriptor >> 5 & 1, descriptor >> 6
    start = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
    length = (is_single, 2, 4, 8)[size_flag]
    return int.from_bytes(frame[start : start + length], "little") + (256 if length == 2 else 0)


def _check(described: Any, known: dict[str, Any]) -> None:
    for key, expected in known.items():
        if described[key] != expected:
            raise ValueError(f"{key} is {str(described[key])[:80]}, expected {expected}")


def _lengths(found: Any, shape: Sequence[int]) -> tuple[int, ...]:
    if len(found) != len(shape) or not all(type(length) is int and length > 0 for length in found):
        raise ValueError(f"chunks of {str(found)[:80]} for an array of {tuple(shape)}")
    return tuple(found)


def _names(codecs: Any) -> Iterator[str]:
    for codec in codecs:
        yield str(codec["name"])
        settings = codec.get("configuration") or {}
        for inner in ("codecs", "index_codecs"):
            yield from _names(settings.get(inner, ()))


@contextmanager
def damage_named(path: Place) -> Iterator[None]:
    """Turn what files, codecs and hostile content raise into a StorageError of one line."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).removesuffix(f"; {REMAKE}").split())[:200] or type(error).__name__
        raise StorageError(f"{path} is missing or damaged ({reason})") from error
