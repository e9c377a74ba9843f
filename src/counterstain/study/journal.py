"""What is on record about the cells of a study: events, the files of finished cells, how long the rest will take.

Events are append-only lines of JSON that any process can read while the study runs:
``RUN/journal/<host>.jsonl`` has a line per event: ``study`` (a run began), ``start``, ``finish``, ``fail`` (of a cell)
and ``lost`` (its process or machine is gone). Each machine writes a file of its own: on network drives, lines that
two machines append to one file can overwrite each other.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from counterstain.progress import duration
from counterstain.storage import RUN_FILE, disk_errors_named, read_json, sha256_of
from counterstain.tracking import LOG_FOLDER

DONE_FILE = "cell.json"
UNNOTED = {DONE_FILE, RUN_FILE}
Kind = Literal["study", "start", "finish", "fail", "lost"]


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


class Planned(Protocol):
    """What an estimate needs to know of a cell."""

    @property
    def folder(self) -> str:
        """Name of its folder."""

    @property
    def stage(self) -> str:
        """What kind of work it is."""

    @property
    def needs(self) -> Sequence[str]:
        """Folders of the cells before it."""


class TimeLeft:
    """A running estimate while cells finish."""

    def __init__(self, known: Mapping[str, float], left: Mapping[str, int], slots: int) -> None:
        self._seconds = {stage: [mean] for stage, mean in known.items()}
        self._left, self._slots = Counter(left), slots

    def finish(self, stage: str, seconds: float | None) -> None:
        """Count a cell as done."""
        self._left[stage] -= 1
        if seconds is not None:
            self._seconds.setdefault(stage, []).append(seconds)

    def __str__(self) -> str:
        """Return ', about m:ss left', or nothing while a stage is still unknown."""
        left = {stage: count for stage, count in self._left.items() if count}
        if not left or any(stage not in self._seconds for stage in left):
            return ""
        total = sum(count * sum(self._seconds[stage]) / len(self._seconds[stage]) for stage, count in left.items())
        return f", about {duration(total / self._slots)} left"


def seconds_left(todo: Sequence[Planned], known: Mapping[str, float], slots: int) -> float:
    """Return a lower bound of the time of cells, each after its needs: all slots busy, or the longest chain."""
    total = sum(known.get(cell.stage, 0.0) for cell in todo)
    return max(total / slots, longest_chain(todo, known))


def longest_chain(cells: Sequence[Planned], known: Mapping[str, float]) -> float:
    """Return the time that no number of processes undercuts: cells that wait for each other."""
    ends: dict[str, float] = {}
    for cell in cells:
        start = max((ends.get(need, 0.0) for need in cell.needs), default=0.0)
        ends[cell.folder] = start + known.get(cell.stage, 0.0)
    return max(ends.values(), default=0.0)
