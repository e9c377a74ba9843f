"""The record of a study's cells: what happened to each, and which files a finished one has.

``RUN/journal/<host>.jsonl`` has a line of JSON per event, readable while the study runs: ``study`` (a run began),
``start``, ``finish``, ``fail`` (of a cell) and ``lost`` (its process or machine is gone). Each machine has its own
file: on network drives, lines that two machines append to one file can overwrite each other.
A finished cell has ``cell.json``: what it was made from and took, and the size and hash of each of its files.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from counterstain.storage import RUN_FILE, disk_errors_named, read_json, sha256_of
from counterstain.study.plan import Cell
from counterstain.training_config import LOG_FOLDER

DONE_FILE = "cell.json"
UNNOTED = {DONE_FILE, RUN_FILE}
Kind = Literal["study", "start", "finish", "fail", "lost"]


@dataclass(frozen=True)
class CellRow:
    """A cell as the plan's file holds it."""

    folder: str
    name: str
    stage: str
    arm: str
    needs: tuple[str, ...]
    count: int
    """Patches that a synthetic set must have at least."""


def about(cell: Cell) -> dict[str, str]:
    """Return what every event of a cell says of it."""
    return {"cell": cell.folder, "name": cell.name, "stage": cell.stage}


def record(run: Path, kind: Kind, **content: Any) -> None:
    """Append one event in a single write, so that lines of several processes do not mix."""
    host = socket.gethostname()
    file = run / "journal" / f"{host}.jsonl"
    event = {"event": kind, "time": round(time.time(), 3), "host": host, "pid": os.getpid()} | content
    with disk_errors_named(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab", buffering=0) as opened:
            opened.write((json.dumps(event, ensure_ascii=False) + "\n").encode())


def read(run: Path) -> list[dict[str, Any]]:
    """Return all events in the order of their time; a line that a power cut left half-written is passed over."""
    events = []
    for file in sorted((run / "journal").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and {"event", "time", "host", "pid"} <= event.keys():
                events.append(event)
    return sorted(events, key=lambda event: float(event["time"]))


@dataclass(frozen=True, kw_only=True)
class Journal:
    """What the events say is true now."""

    last: dict[str, dict[str, Any]]
    """Folder of a cell -> the last event about it."""
    seconds: dict[str, float]
    """Stage -> mean time of its finished cells."""
    size_bytes: dict[str, float]
    """Stage -> mean size of its finished cells."""
    study: dict[str, Any] | None
    """The last event that began a run."""


def fold(events: list[dict[str, Any]]) -> Journal:
    """Return what events, oldest first, say."""
    finished = defaultdict[str, list[dict[str, Any]]](list)
    for event in events:
        if event["event"] == "finish":
            finished[event["stage"]].append(event)
    return Journal(
        last={event["cell"]: event for event in events if "cell" in event},
        seconds={stage: fmean(event["seconds"] for event in found) for stage, found in finished.items()},
        size_bytes={stage: fmean(event["bytes"] for event in found) for stage, found in finished.items()},
        study=next((event for event in reversed(events) if event["event"] == "study"), None),
    )


def is_done(cell: Cell | CellRow, root: Path) -> bool:
    """Whether a cell's result is there; a synthetic set must also be long enough."""
    note = root / cell.folder / DONE_FILE
    return note.exists() and (not cell.count or int(read_json(note).get("count", 0)) >= cell.count)


def notes_of(folder: Path) -> dict[str, list[Any]]:
    """Return name -> [size in bytes, SHA-256] of a cell's files; partial ones and logs are left out."""
    notes: dict[str, list[Any]] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        unnoted = name in UNNOTED or ".partial-" in name or name.startswith(f"{LOG_FOLDER}/")
        if file.is_file() and not unnoted:
            notes[name] = [file.stat().st_size, sha256_of(file)]
    return notes


def damage(folder: Path, *, hashes: bool) -> str | None:
    """Return which file of a finished cell is missing or changed, by its size and, if asked, its hash; None if none."""
    try:
        notes = read_json(folder / DONE_FILE).get("files", {})
    except (OSError, ValueError, AttributeError):
        return DONE_FILE
    for name, (size, sha256) in notes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or (hashes and sha256_of(file) != sha256):
            return str(name)
    return None
