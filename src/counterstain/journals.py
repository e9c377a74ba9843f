"""Journals: files of JSON lines that are only ever appended to, by any number of processes at once.

A line is on the disk before the writer goes on. One that a kill or a full disk cut off is skipped by readers, and ended
by the next writer; nothing is ever removed.
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

Record = dict[str, Any]


def records_of(path: Path) -> list[Record]:
    """Return what stands in a journal, oldest first; nothing where there is none. Damaged lines are skipped."""
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error


@contextmanager
def held(path: Path) -> Iterator[tuple[list[Record], Callable[[Mapping[str, Any]], None]]]:
    """Keep other writers away; yield what stands in a journal, and a function that appends a record."""
    with disk_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            torn = bool(content) and not content.endswith(b"\n")

            def append(record: Mapping[str, Any]) -> None:
                nonlocal torn
                line = json.dumps(record, ensure_ascii=False, allow_nan=False)
                file.write(("\n" * torn + line + "\n").encode())
                torn = True  # until it is on the disk
                file.flush()
                fsync(path)
                torn = False

            yield _parsed(content), append
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


def _parsed(content: bytes) -> list[Record]:
    records = []
    for line in content.decode(errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
