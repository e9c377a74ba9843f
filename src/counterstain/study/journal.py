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
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
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
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(event, ensure_ascii=False) + "\n").encode())
        finally:
            os.close(descriptor)


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


@dataclass
class Journal:
    """The events, folded to what is true now."""

    last: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Folder of a cell -> the last event about it."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> mean time of its finished cells."""
    size_bytes: dict[str, float] = field(default_factory=dict)
    """Stage -> mean size of its finished cells."""
    study: dict[str, Any] | None = None
    """The last event that began a run."""


def fold(events: list[dict[str, Any]]) -> Journal:
    """Fold events, oldest first."""
    journal = Journal()
    finished: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event["event"] == "study":
            journal.study = event
        elif "cell" in event:
            journal.last[event["cell"]] = event
            if event["event"] == "finish":
                finished.setdefault(event["stage"], []).append((event["seconds"], event["bytes"]))
    for stage, figures in finished.items():
        journal.seconds[stage] = sum(seconds for seconds, _ in figures) / len(figures)
        journal.size_bytes[stage] = sum(size for _, size in figures) / len(figures)
    return journal


def is_done(cell: Cell | CellRow, root: Path) -> bool:
    """Whether a cell's result is there; a synthetic set must also be long enough."""
    note = root / cell.folder / DONE_FILE
    return note.exists() and (not cell.count or int(read_json(note).get("count", 0)) >= cell.count)


def notes_of(folder: Path) -> dict[str, list[Any]]:
    """Return name -> [size in bytes, SHA-256] of a cell's files; partial ones and logs are left out."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {
        name: [file.stat().st_size, sha256_of(file)]
        for name, file in files.items()
        if name not in UNNOTED and ".partial-" not in name and not name.startswith(f"{LOG_FOLDER}/")
    }


def damage(folder: Path, *, hashes: bool) -> str | None:
    """Say which file of a finished cell is missing or changed; None where all is well.

    Parameters
    ----------
    folder : Path
    hashes : bool
        Read the files through; without, only their sizes are looked at.
    """
    try:
        notes = read_json(folder / DONE_FILE).get("files", {})
    except (OSError, ValueError, AttributeError):
        return DONE_FILE
    return next((name for name, note in notes.items() if not _as_noted(folder / name, note, hashes=hashes)), None)


def _as_noted(file: Path, note: Iterable[Any], *, hashes: bool) -> bool:
    size, sha256 = note
    if not file.is_file() or file.stat().st_size != size:
        return False
    return not hashes or sha256_of(file) == sha256
