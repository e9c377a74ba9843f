"""Bytes, JSON, names and coordinates of annotation files, checked so that no file stalls the machine or fills it."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import reprlib
import struct
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from counterstain.errors import InputError

MAX_COORDINATE_PX = 10_000_000  # the largest slides have about 500,000 pixels a side
COORDINATE = f"a coordinate in level-0 pixels, at most {MAX_COORDINATE_PX:,} either way"
MAX_NAME_LENGTH = 200
MAX_BYTES = 256 * 2**20  # of a file, unpacked
MAX_JSON_MEMORY = 800 * 2**20
MAX_DEPTH = 50
MAX_SHOWN = 80  # characters of a value in a message
GZIP_MAGIC, ZIP_MAGIC = b"\x1f\x8b", b"PK\x03\x04"
ZIP_END, ZIP64_END = b"PK\x05\x06", b"PK\x06\x07"  # the record that ends a zip, the one before it in a large one
MAX_ZIP_DIRECTORY = 2**20  # bytes

T = TypeVar("T")


class OddObjectError(InputError):
    """An object of a file cannot be read, the others can; see :meth:`.outlines.Collector.odd`."""


class RepeatedKey(dict[str, Any]):
    """An object out of JSON in which a key stands twice, so that nobody knows which value is meant."""

    key = ""


def shown(value: Any) -> str:
    """Return a value for an error message: one short line."""
    text = reprlib.repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def expect(value: Any, kind: type[T], where: str, what: str) -> T:
    """Return a list or an object out of JSON; anything else is an OddObjectError that names its place."""
    if isinstance(value, RepeatedKey):
        raise OddObjectError(f"{where}: {shown(value.key)} stands twice in one object; export it again")
    if not isinstance(value, kind):
        raise OddObjectError(f"{where}: expected {what}, found {shown(value)}; export it again")
    return value


def identifier(value: Any, otherwise: int) -> str:
    """Return an id on one line, long remarks shortened; ``otherwise`` where it is neither text nor a number."""
    known = isinstance(value, str | int) and not isinstance(value, bool)
    return (one_line(str(value)[:MAX_NAME_LENGTH]) if known else "") or str(otherwise)


def usable(value: Any) -> bool:
    """Whether a value is a number in the range of coordinates, which NaN and infinities are not."""
    return type(value) in {int, float} and -MAX_COORDINATE_PX <= value <= MAX_COORDINATE_PX


def number(text: str | None, place: Callable[[], str], what: str) -> float:
    """Read a coordinate that is written as text, beyond no slide; ``place`` is called for messages only."""
    if text is None:
        raise OddObjectError(f"{place()} {what}: the coordinate is missing; export it again")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -MAX_COORDINATE_PX <= value <= MAX_COORDINATE_PX:  # nor is NaN
        raise OddObjectError(
            f"{place()} {what}: expected {COORDINATE}, found {shown(text)}; correct it or export it again"
        )
    return value


def name(value: Any, where: str) -> str:
    """Return a name on one line, white space and unprintable characters made single spaces."""
    if not isinstance(value, str) or len(value) > MAX_NAME_LENGTH:
        raise OddObjectError(f"{where}: expected a name of at most {MAX_NAME_LENGTH} characters, found {shown(value)}")
    return one_line(value)


def one_line(text: str) -> str:
    """Return text on one line in Unicode's composed form, white space and unprintable characters made single spaces."""
    composed = unicodedata.normalize("NFC", text)
    return " ".join("".join(c if c.isprintable() else " " for c in composed).split())


def file_name(value: Any, where: str) -> str | None:
    """Return the last part of a path, which leads to no other folder, or None where it names no file."""
    last = re.split(r"[/\\]", name(value, where))[-1].strip()
    return None if last in {"", ".", ".."} else last


def read_bytes(path: Path) -> bytes:
    """Read a file, unpacked if it is gzip or a zip of one file; an InputError names what is missing or damaged."""
    try:
        with path.open("rb") as file:
            data = _unpacked(path, file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder; expected an annotation file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged gzip ({error}); export it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > MAX_BYTES:
        raise InputError(
            f"{path}: larger than {MAX_BYTES // 2**20} MB; export the annotations alone (without detections and "
            "measurements), or one file a slide"
        )
    if not data.strip():
        raise InputError(f"{path}: the file is empty; export it again")
    return data


def _unpacked(path: Path, file: io.BufferedReader) -> bytes:
    """Read at most one byte more than MAX_BYTES."""
    start = file.peek(4)
    if start.startswith(GZIP_MAGIC):
        return gzip.GzipFile(fileobj=file).read(MAX_BYTES + 1)
    if not start.startswith(ZIP_MAGIC):
        return file.read(MAX_BYTES + 1)
    try:
        return _unzipped(file)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, ValueError) as error:
        # RuntimeErrors are passwords and unknown compressions
        raise InputError(
            f"{path}: a zip that cannot be read ({error}); unpack it, or export again without zip"
        ) from error


def _unzipped(file: IO[bytes]) -> bytes:
    """Return the one file in a zip; its directory is not read if it would fill the memory."""
    file.seek(max(0, file.seek(0, 2) - 2**16))
    before, mark, record = file.read().rpartition(ZIP_END)
    if mark and (struct.unpack_from("<8xI", record)[0] > MAX_ZIP_DIRECTORY or before[-20:].startswith(ZIP64_END)):
        raise zipfile.BadZipFile("it holds thousands of files")
    with zipfile.ZipFile(file) as archive:
        parts = ((info, info.filename.split("/")) for info in archive.infolist() if not info.is_dir())
        members = [info for info, names in parts if names[0] != "__MACOSX" and not names[-1].startswith(".")]
        if len(members) != 1:
            raise zipfile.BadZipFile(f"it holds {len(members)} files, not one")
        with archive.open(members[0]) as member:
            return member.read(MAX_BYTES + 1)


def parse_json(path: Path, data: bytes, first_line: int = 1) -> Any:
    """Parse JSON (UTF-8); an InputError names line, counted from ``first_line``, and column where they are known.

    NaN and infinities are numbers as Python reads them, since old versions of QuPath write them into measurements;
    :func:`usable` refuses them as coordinates. An object with a key twice is a :class:`RepeatedKey`.
    """
    if json_memory(data) > MAX_JSON_MEMORY:
        raise InputError(
            f"{path}: would take more than {MAX_JSON_MEMORY // 2**20} MB of memory; export the annotations alone "
            "(without detections and measurements), or one file a slide"
        )
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} byte {error.start:,}: not UTF-8; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        line = error.lineno + first_line - 1
        raise InputError(
            f"{path} line {line}: not JSON or cut short ({error.msg} at column {error.colno}); export it again"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deep for annotations; export it again") from error
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{path}: not usable JSON ({error}); correct it or export it again") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) == len(pairs):
        return content
    repeated = RepeatedKey(content)
    repeated.key = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return repeated


def json_memory(data: bytes) -> int:
    """Estimate from above, in bytes, what text and objects take while JSON is parsed."""
    wide = any(bytes([lead]) in data for lead in range(0xF0, 0xF5))
    width = 1 if data.isascii() else 4 if wide else 2  # Python keeps a text at the width of its widest character
    objects = 88 * data.count(b"[") + 240 * data.count(b"{") + 40 * data.count(b",") + 40 * data.count(b'"')
    return width * len(data) + objects + 64 * data.count(b":")
