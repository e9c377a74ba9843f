"""Bytes, JSON, names and coordinates of annotation files, checked so that no file stalls the machine or fills it."""

from __future__ import annotations

import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from counterstain.errors import InputError

MAX_COORDINATE_PX = 10_000_000  # the largest slides have about 500,000 pixels a side
COORDINATE = f"a coordinate in level-0 pixels, at most {MAX_COORDINATE_PX:,} either way"
MAX_NAME_LENGTH = 200
MAX_BYTES = 256 * 2**20  # of a file, unpacked
MAX_JSON_MEMORY = 800 * 2**20
MAX_DEPTH = 50
GZIP_MAGIC = b"\x1f\x8b"

T = TypeVar("T")


def shown(value: Any) -> str:
    """Return a value for an error message: one short line."""
    return reprlib.repr(value)


def expect(value: Any, kind: type[T], where: str, what: str) -> T:
    """Return a list or an object out of JSON; anything else is an InputError that names its place."""
    if not isinstance(value, kind):
        raise InputError(f"{where}: expected {what}, found {shown(value)}; export it again")
    return value


def identifier(value: Any, where: str) -> str:
    """Return an id out of JSON, which may be a number; anything else is an InputError that names its place."""
    if not isinstance(value, str | int):
        raise InputError(f"{where} id: expected text or a number, found {shown(value)}; export it again")
    return name(str(value), f"{where} id")


def usable(value: Any) -> bool:
    """Whether a value is a number in the range of coordinates, which NaN and infinities are not."""
    return type(value) in {int, float} and -MAX_COORDINATE_PX <= value <= MAX_COORDINATE_PX


def number(text: str | None, place: Callable[[], str], what: str) -> float:
    """Read a coordinate that is written as text, beyond no slide; ``place`` is called for messages only."""
    if text is None:
        raise InputError(f"{place()} {what}: the coordinate is missing; export it again")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -MAX_COORDINATE_PX <= value <= MAX_COORDINATE_PX:  # nor is NaN
        raise InputError(f"{place()} {what}: expected {COORDINATE}, found {shown(text)}; correct it or export it again")
    return value


def name(value: Any, where: str) -> str:
    """Return a name on one line, white space and unprintable characters made single spaces."""
    if not isinstance(value, str) or len(value) > MAX_NAME_LENGTH:
        raise InputError(f"{where}: expected a name of at most {MAX_NAME_LENGTH} characters, found {shown(value)}")
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def file_name(value: Any, where: str) -> str | None:
    """Return the last part of a path, which leads to no other folder, or None where it names no file."""
    last = re.split(r"[/\\]", name(value, where))[-1].strip()
    return None if last in {"", ".", ".."} else last


def read_bytes(path: Path) -> bytes:
    """Read a file, decompressed if it is gzip; an InputError names what is missing, empty, too large or damaged."""
    try:
        with path.open("rb") as file:
            packed = file.peek(2).startswith(GZIP_MAGIC)
            data = gzip.GzipFile(fileobj=file).read(MAX_BYTES + 1) if packed else file.read(MAX_BYTES + 1)
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


def parse_json(path: Path, data: bytes) -> Any:
    """Parse JSON strictly (UTF-8, no NaN, no infinity); an InputError names line and column where they are known."""
    if _json_memory(data) > MAX_JSON_MEMORY:
        raise InputError(
            f"{path}: would take more than {MAX_JSON_MEMORY // 2**20} MB of memory; export the annotations alone "
            "(without detections and measurements), or one file a slide"
        )
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} byte {error.start:,}: not UTF-8; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {error.lineno}: not JSON or cut short ({error.msg} at column {error.colno}); export it again"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deep for annotations; export it again") from error
    except ValueError as error:  # NaN, or an integer of thousands of digits
        raise InputError(f"{path}: not usable JSON ({error}); correct it or export it again") from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _json_memory(data: bytes) -> int:
    """Estimate from above, in bytes, what text and objects take while JSON is parsed."""
    wide = any(bytes([lead]) in data for lead in range(0xF0, 0xF5))
    width = 1 if data.isascii() else 4 if wide else 2  # Python keeps a text at the width of its widest character
    objects = 88 * data.count(b"[") + 240 * data.count(b"{") + 40 * data.count(b",") + 40 * data.count(b'"')
    return width * len(data) + objects
