"""What happened to the cells of a study: append-only lines of JSON that any process can read while it runs.

``RUN/journal/<host>.jsonl`` has a line per event: ``study`` (a run began), ``start``, ``finish``, ``fail`` (of a cell)
and ``lost`` (its process or machine is gone). Each machine writes a file of its own: on network drives, lines that
two machines append to one file can overwrite each other.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from counterstain.storage import disk_errors_named

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
