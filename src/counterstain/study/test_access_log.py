"""Who looked at which part's figures, and how often: a record that a report can quote.

``looks.jsonl`` has a line for every time a command showed figures. Whoever changes a study after a look at the test
part chooses by the test part; the record cannot forbid that, but it says what happened.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from counterstain.errors import CounterstainError
from counterstain.storage import stage_of

LOOKS_FILE = "looks.jsonl"
LEVELS = 3  # of folders between a run and what lies in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One time that figures were shown."""

    time: str
    """ISO 8601, UTC, to the second."""
    command: str
    """What showed them, for example ``report``."""
    splits: tuple[str, ...]
    """Parts whose figures were shown."""


def run_of(folder: Path) -> Path | None:
    """Return the run of a study that a folder is or lies in; None for a folder outside of any."""
    resolved = folder.resolve()
    for place in (resolved, *resolved.parents[:LEVELS]):
        try:
            if stage_of(place) == "study":
                return place
        except (CounterstainError, OSError, AttributeError):  # a run.json of somebody else's
            continue
    return None


def record_look(folder: Path, command: str, splits: Sequence[str]) -> bool:
    """Append a look to the record in ``folder``, in one write, so that those of several processes do not mix.

    Returns
    -------
    bool
        Whether it is on record. A folder that cannot be written to is no reason to show nothing.
    """
    look = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": command, "splits": list(splits)}
    try:
        descriptor = os.open(folder / LOOKS_FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # the last write was cut off
            os.write(descriptor, (("\n" if torn else "") + json.dumps(look) + "\n").encode())
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


def read_looks(folder: Path) -> tuple[Look, ...]:
    """Return the looks on record in a folder, oldest first; lines that are damaged are passed over."""
    try:
        lines = (folder / LOOKS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    found = (_look(line) for line in lines)
    return tuple(sorted((look for look in found if look), key=lambda look: look.time))


def times_looked_at(looks: Sequence[Look], split: str) -> Counter[str]:
    """Return how often each command showed a part."""
    return Counter(look.command for look in looks if split in look.splits)


def _look(line: str) -> Look | None:
    try:
        content: Any = json.loads(line)
        splits = tuple(map(str, content["splits"]))
        return Look(time=str(content["time"]), command=str(content["command"]), splits=splits)
    except (ValueError, KeyError, TypeError):
        return None
