"""Journals: files of JSON lines that are only ever appended to, by any number of processes at once.

A line is on the disk before the writer goes on. One that a kill or a full disk cut off is skipped by readers, and
marked as cut off by the next writer; nothing is ever removed. Any other line that cannot be read is an error.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from counterstain.errors import InputError, StorageError
from counterstain.storage import disk_errors_named, fsync

MAX_NAME = 80  # characters of the name of a person
CUT_OFF = "\x18"  # "cancel": ends a line that a kill cut off

Record = dict[str, Any]


def records_of(path: Path) -> list[Record]:
    """Return what stands in a journal, oldest first; nothing where there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    return _parsed(content, path)


@contextmanager
def held(path: Path) -> Iterator[tuple[list[Record], Callable[[Mapping[str, Any]], None]]]:
    """Keep other writers away; yield what stands in a journal, and a function that appends a record.

    Raises StorageError where its folder is gone: what is kept elsewhere would be lost.
    """
    if not path.parent.is_dir():
        raise StorageError(f"{path.parent}: is not there any more; nothing was kept")
    with disk_errors_named(path), path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        tail = content.rpartition(b"\n")[2].decode(errors="replace")
        torn, end = bool(tail), "\n" if _record(tail) else CUT_OFF + "\n"

        def append(record: Mapping[str, Any]) -> None:
            nonlocal torn, end
            line = json.dumps(record, ensure_ascii=False, allow_nan=False)
            file.write((end * torn + line + "\n").encode())
            torn, end = True, CUT_OFF + "\n"  # until it is on the disk
            file.flush()
            fsync(path)
            torn = False

        yield _parsed(content, path), append
        if not content:
            fsync(path.parent)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record to a journal."""
    with held(path) as (_, write):
        write(record)


def now() -> str:
    """Return the time as records hold it: ISO 8601, UTC, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def person(name: str, what: str) -> str:
    """Return the name of a reviewer or reader (``what``), as journals hold it; raises InputError where it is none."""
    cleaned = " ".join(str(name).split())
    if not cleaned or len(cleaned) > MAX_NAME or not cleaned.isprintable():
        raise InputError(f"{what} {name!r}: expected a name or number of 1 to {MAX_NAME} printable characters")
    return cleaned


def _parsed(content: bytes, path: Path) -> list[Record]:
    *lines, tail = content.decode(errors="replace").split("\n")
    found = [(number, _record(line)) for number, line in enumerate(lines, 1) if not line.endswith(CUT_OFF)]
    for number, record in found:
        if record is None:
            raise StorageError(f"{path} line {number}: damaged; restore the file from a copy, or delete this line")
    return [record for record in (*(record for _, record in found), _record(tail)) if record is not None]


def _record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
