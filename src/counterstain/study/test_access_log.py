"""The record of how often test and validation results were shown, for the report to quote.

``looks.jsonl`` has a line for every time a command showed results. Changing a study after viewing its test results
means selecting on the test set; the record cannot prevent that, but makes it visible.
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
LEVELS = 3  # of folders between a study's folder and its contents


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One time that results were shown: when (ISO 8601, UTC), by which command, and of which splits."""

    time: str
    command: str
    splits: tuple[str, ...]


def run_of(folder: Path) -> Path | None:
    """Return the study folder that a folder is or lies in; None for a folder outside of any study."""
    resolved = folder.resolve()
    for place in (resolved, *resolved.parents[:LEVELS]):
        try:
            if stage_of(place) == "study":
                return place
        except (CounterstainError, OSError, AttributeError):  # a run.json of another program
            continue
    return None


def record_look(folder: Path, command: str, splits: Sequence[str]) -> bool:
    """Append a look to the record in ``folder``, in one write, so that those of several processes do not mix.

    Returns whether it was recorded: results are shown also if the folder is not writable.
    """
    look = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": command, "splits": list(splits)}
    try:
        with (folder / LOOKS_FILE).open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"  # the last write was interrupted
            file.write((("\n" if torn else "") + json.dumps(look) + "\n").encode())
    except OSError:
        return False
    return True


def read_looks(folder: Path) -> tuple[Look, ...]:
    """Return the looks on record in a folder, oldest first; damaged lines are skipped."""
    try:
        lines = (folder / LOOKS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    found = (_look(line) for line in lines)
    return tuple(sorted((look for look in found if look), key=lambda look: look.time))


def times_looked_at(looks: Sequence[Look], split: str) -> Counter[str]:
    """Return how often each command showed the results of a split."""
    return Counter(look.command for look in looks if split in look.splits)


def _look(line: str) -> Look | None:
    try:
        content: Any = json.loads(line)
        splits = tuple(map(str, content["splits"]))
        return Look(time=str(content["time"]), command=str(content["command"]), splits=splits)
    except (ValueError, KeyError, TypeError):
        return None
