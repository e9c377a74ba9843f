"""The state of every cell of a study, kept in files: any process can write and read it at any time.

``plan.json`` lists the cells, each after all that it needs. ``journal/<host>.jsonl`` has a line of JSON per event:
``study`` (a run began), ``start``, ``finish``, ``fail`` (of a cell) and ``lost`` (its process or machine is gone). Each
machine has its own file: on network drives, lines that two machines append to one file can overwrite each other. A
finished cell has ``cell.json``: what it was made from and took, and the size and hash of each of its files.
Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

from rich import box
from rich.table import Table
from rich.tree import Tree

from counterstain.data.review import REVIEW_FILE
from counterstain.errors import CounterstainError, InputError, StorageError
from counterstain.progress import duration, size
from counterstain.storage import LOG_FOLDER, RUN_FILE, disk_errors_named, read_json, read_sealed, sha256_of, write_text
from counterstain.study.cells import CELLS, EXTERNAL, FOLD, Cell
from counterstain.study.config import stages

PLAN_FILE = "plan.json"
OVERHEAD = " (and up to a minute for starting, and for results and report)"
BRIEF_SECONDS = 600
DONE_FILE = "cell.json"
FILES_FILE = "files.json"  # the note of a folder of results
UNNOTED = {DONE_FILE, RUN_FILE, FILES_FILE, REVIEW_FILE}
SMALL_BYTES = 2**20
Kind = Literal["study", "start", "finish", "fail", "lost"]
State = Literal["done", "running", "failed", "left"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class CellRow:
    """A cell as the plan's file holds it."""

    folder: str
    name: str
    stage: str
    arm: str
    needs: tuple[str, ...]
    count: int  # patches that a synthetic set must have at least
    repeat: int = -1
    fold: int = 0


Row = Cell | CellRow


@dataclass(frozen=True)
class Expected:
    """What a cell should take."""

    seconds: float
    bytes: float


def record(run: Path, kind: Kind, cell: Cell | None = None, **content: Any) -> None:
    """Append one event in a single write, so that lines of several processes do not mix."""
    host = socket.gethostname()
    file = run / "journal" / f"{host}.jsonl"
    event = {"event": kind, "time": round(time.time(), 3), "host": host, "pid": os.getpid()} | content
    if cell is not None:
        event |= {"cell": cell.folder, "name": cell.name, "stage": cell.stage}
    with disk_errors_named(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab", buffering=0) as opened:
            opened.write((json.dumps(event, ensure_ascii=False) + "\n").encode())


def events_of(run: Path) -> list[dict[str, Any]]:
    """Return all events in the order of their time; a line that a power cut left half-written is passed over."""
    events = []
    for file in sorted(file for file in (run / "journal").glob("*.jsonl") if file.is_file()):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and all(
                isinstance(event.get(key), kind) for key, kind in _keys_of(event).items()
            ):
                events.append(event)
    return sorted(events, key=lambda event: float(event["time"]))


def _keys_of(event: dict[str, Any]) -> dict[str, Any]:
    """Return what an event must hold, and of which type."""
    keys: dict[str, Any] = {"event": str, "time": int | float, "host": str, "pid": int}
    if event.get("event") == "study":
        return keys | {"slots": int}
    keys |= dict.fromkeys(("cell", "name", "stage"), str)
    return keys | dict.fromkeys(("seconds", "bytes"), int | float) if event.get("event") == "finish" else keys


@dataclass(frozen=True, kw_only=True)
class Journal:
    """What the events say is true now."""

    last: dict[str, dict[str, Any]]  # folder of a cell -> the last event about it
    seconds: dict[str, float]  # stage -> mean time of its finished cells
    size_bytes: dict[str, float]  # stage -> mean size of its finished cells
    study: dict[str, Any] | None  # the last event that began a run


def summarised(events: list[dict[str, Any]]) -> Journal:
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


def is_done(cell: Row, root: Path) -> bool:
    """Whether a cell's result is there; a synthetic set must also be long enough."""
    note = root / cell.folder / DONE_FILE
    if not cell.count or not note.exists():
        return note.exists()
    try:
        return int(read_sealed(note).get("count", 0)) >= cell.count
    except StorageError:  # :func:`damage` says so, and the cell is made again
        return True


def notes_of(folder: Path) -> dict[str, list[Any]]:
    """Return name -> [size in bytes, SHA-256] of a cell's files; partial ones and logs are left out."""
    notes: dict[str, list[Any]] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        unnoted = name in UNNOTED or ".partial-" in name or name.startswith(f"{LOG_FOLDER}/")
        if file.is_file() and not unnoted:
            notes[name] = [file.stat().st_size, sha256_of(file)]
    return notes


def damage(folder: Path, *, hashes: bool, note: str = DONE_FILE) -> str | None:
    """Return which file that a note lists is missing or changed; None if none.

    By its size and, if asked or if it is small, its hash.
    """
    try:
        listed = read_sealed(folder / note).get("files", {})
        notes = {str(name): (int(size_bytes), sha256) for name, (size_bytes, sha256) in listed.items()}
    except (CounterstainError, ValueError, TypeError, AttributeError):
        return note
    for name, (size_bytes, sha256) in notes.items():
        file, read = folder / name, hashes or size_bytes <= SMALL_BYTES
        if not file.is_file() or file.stat().st_size != size_bytes or (read and sha256_of(file) != sha256):
            return str(name)
    return None


@dataclass(frozen=True)
class StudyState:
    """The state of every cell, and the journal."""

    rows: Sequence[Row]
    states: dict[str, State]  # folder -> state
    journal: Journal
    now: float
    expected: Mapping[str, Expected] = field(default_factory=dict)
    """Folder -> what the cell should take, by timings of few steps; empty where nothing was timed."""

    def of(self, *states: State) -> list[Row]:
        """Return the cells in one of some states."""
        return [row for row in self.rows if self.states[row.folder] in states]

    def elapsed(self, row: Row) -> float:
        """Return for how long a cell has been running, in seconds."""
        return self.now - float(self.journal.last[row.folder]["time"])

    def takes(self, row: Row) -> Expected | None:
        """Return what a cell should take: its timing, corrected by how far those of its stage's finished cells are off.

        Without a timing, it is the mean of those cells; None where there is neither.
        """
        own, found = self.expected.get(row.folder), self.journal
        if own is None:
            known = row.stage in found.seconds
            return Expected(found.seconds[row.stage], found.size_bytes[row.stage]) if known else None
        return replace(own, seconds=own.seconds * self._off[row.stage]) if row.stage in self._off else own

    @cached_property
    def _off(self) -> dict[str, float]:
        """Stage -> how many times as long as expected its finished cells took."""
        took, expected = defaultdict[str, float](float), defaultdict[str, float](float)
        for row in self.of("done"):
            event, own = self.journal.last.get(row.folder, {}), self.expected.get(row.folder)
            if event.get("event") == "finish" and own is not None:
                took[row.stage] += event["seconds"]
                expected[row.stage] += own.seconds
        return {stage: took[stage] / seconds for stage, seconds in expected.items() if seconds}

    @cached_property
    def open(self) -> list[tuple[Row, Expected | None]]:
        """The cells that run or are left, with what each should take."""
        return [(row, self.takes(row)) for row in self.of("left", "running")]

    def unknown_stages(self) -> list[str]:
        """Return the stages with open cells of which nothing tells the time."""
        return sorted({row.stage for row, taken in self.open if taken is None})

    def seconds_left(self, slots: int) -> float:
        """Return a lower bound of the time that the rest takes: all slots are busy, or cells wait for each other."""
        total, spent, ends = 0.0, 0.0, {"": 0.0}
        for row, taken in self.open:  # each after its needs
            seconds = taken.seconds if taken else 0.0
            total += seconds
            spent += min(self.elapsed(row), seconds) if self.states[row.folder] == "running" else 0.0
            ends[row.folder] = seconds + max((ends.get(need, 0.0) for need in row.needs), default=0.0)
        return max(0.0, max(total / slots, *ends.values()) - spent / slots)


def write_plan(run: Path, cells: Sequence[Cell]) -> None:
    """Write the plan's file, a line a cell."""
    lines = [json.dumps([getattr(cell, f.name) for f in fields(CellRow)], ensure_ascii=False) for cell in cells]
    write_text(run / PLAN_FILE, "[\n" + ",\n".join(lines) + "\n]\n")


def read_plan(run: Path) -> list[CellRow]:
    """Read the plan of a study that was started; raises InputError where there is none."""
    if not (run / PLAN_FILE).exists():
        raise InputError(f"{run}: no study was started here ({PLAN_FILE} is missing); give the folder of 'study run'")
    try:
        rows = [CellRow(*row) for row in read_json(run / PLAN_FILE)]
    except TypeError:
        rows = []
    if not rows or not all(map(_is_sound, rows)):
        raise StorageError(
            f"{run / PLAN_FILE}: damaged; give the command that wrote it, 'study run' or 'study test', again"
        )
    return rows


def tests_of(run: Path) -> list[Path]:
    """Return the folders of a study's tests on other cohorts, also of damaged ones."""
    return sorted(place for place in (run / EXTERNAL).glob("[!.]*") if place.is_dir() and any(place.iterdir()))


def _is_sound(row: CellRow) -> bool:
    numbers, texts = (row.count, row.repeat, row.fold), [row.folder, row.name, row.stage, row.arm]
    kinds = {*map(type, numbers)} == {int} and isinstance(row.needs, list)
    return kinds and {*map(type, [*texts, *row.needs])} == {str}


def state_of(run: Path, rows: Sequence[Row], expected: Mapping[str, Expected] | None = None) -> StudyState:
    """Look at a study's files; ``expected`` is what cells should take, by their folder."""
    journal, root = summarised(events_of(run)), run / CELLS
    done = {row.folder for row in rows if is_done(row, root)}
    # Of a set that was whole before it was to be drawn in shards, no shard is drawn.
    needless = {folder for row in rows if row.stage == "synthetic" and row.folder in done for folder in row.needs}
    done |= needless & {row.folder for row in rows if row.stage == "shards"}
    states = {row.folder: "done" if row.folder in done else _state(journal.last.get(row.folder)) for row in rows}
    return StudyState(rows, states, journal, time.time(), expected or {})


def _state(last: dict[str, Any] | None) -> State:
    """Return the state of a cell that is not done, by the last event about it."""
    if last is not None and last["event"] == "fail":
        return "failed"
    return "running" if last is not None and last["event"] == "start" and _lives(last) else "left"


def _lives(event: dict[str, Any]) -> bool:
    """Whether the process of an event runs; on other machines it counts as alive until the journal says otherwise."""
    if event["host"] == socket.gethostname():
        try:
            os.kill(int(event["pid"]), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return True


def plan_tree(state: StudyState, title: str) -> Tree:
    """Draw which cells follow from which; those that differ by repeat, fold or shard alone are one line."""
    groups: dict[tuple[str, str], list[Row]] = {}
    group_of: dict[str, tuple[str, str]] = {}
    for row in state.rows:
        group_of[row.folder] = key = (row.stage, row.name.partition(FOLD)[0].partition(" #")[0].rpartition(" of ")[2])
        groups.setdefault(key, []).append(row)
    tree = Tree(title)
    branches: dict[tuple[str, str], Tree] = {}
    path: dict[tuple[str, str], set[tuple[str, str]]] = {}  # each group and those that it is drawn under
    for key, rows in groups.items():
        parents = [group_of[need] for row in rows[:1] for need in row.needs if group_of[need] in branches]
        # Under the last of its inputs: an evaluation under its segmenter, a set under its generator.
        last = max(parents, key=list(branches).index) if parents else None
        path[key] = {key} | (path[last] if last else set())
        others = [each[1] for each in dict.fromkeys(parents) if each not in path[key] and each[0] != "cohort"]
        also = f" (also of {', '.join(others)})" if others else ""
        branches[key] = (branches[last] if last else tree).add(_group_line(key, rows, state) + also)
    return tree


def cell_table(state: StudyState) -> Table:
    """Return a row per cell: name, state, folder."""
    table = Table("cell", "state", "folder", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in state.rows:
        table.add_row(row.name, state.states[row.folder], row.folder)
    return table


def stage_table(state: StudyState) -> Table:
    """Return a row per stage: how many cells are in which state, and what those that are left take together."""
    counts = Counter((row.stage, state.states[row.folder]) for row in state.rows)
    known = defaultdict[str, list[Expected]](list)
    for row, taken in state.open:
        if taken is not None:
            known[row.stage].append(taken)
    table = Table("stage", *STATES, "a cell takes", "time left", "disk left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in stages():
        if any(counts[stage, each] for each in STATES):
            cells = [str(counts[stage, each]) for each in STATES]
            found, mean = known[stage], state.journal.seconds.get(stage)
            seconds, size_bytes = (sum(getattr(taken, name) for taken in found) for name in ("seconds", "bytes"))
            left = (duration(seconds / len(found)), duration(seconds), size(size_bytes)) if found else ()
            table.add_row(stage, *cells, *(left or ("" if mean is None else duration(mean),)))
    return table


def what_it_takes(state: StudyState, run: Path, slots: int, more_bytes: float = 0.0) -> str:
    """Say what is done and left, and what the rest will take of time and disk (``more_bytes``: beside the cells)."""
    counts = Counter(state.states.values())
    open_cells = len(state.rows) - counts["done"]
    line = f"{len(state.rows)} cells, {counts['done']} done, {open_cells} left"
    if not open_cells:
        return line
    existing = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    free, needed = shutil.disk_usage(existing).free, sum(taken.bytes for _, taken in state.open if taken)
    disk = (
        f"about {size(needed + more_bytes)} of disk ({size(free)} are free)"
        if needed
        else f"{size(free)} of disk are free"
    )
    return f"{line}\n{time_left(state, slots)}, {disk}"


def time_left(state: StudyState, slots: int) -> str:
    """Say how long the rest takes, and for which stages that is not known yet."""
    counts = Counter(state.states.values())
    if not counts["left"] and not counts["running"]:
        return "nothing is left to run"
    unknown, work = state.unknown_stages(), state.seconds_left(1)
    if unknown and not {row.stage for row, taken in state.open if taken is not None} - {*unknown, "cohort"}:
        return f"time not known: no cell of {', '.join(unknown)} has finished"
    at_once = f", at least {duration(state.seconds_left(slots))} with {slots} cells at once" if slots > 1 else ""
    text = f"about {duration(work)} of work{at_once}"
    text += OVERHEAD if work < BRIEF_SECONDS else ""
    return f"{text}, without {', '.join(unknown)}: their time is not known yet" if unknown else text


def running_and_failed(state: StudyState, most: int) -> list[str]:
    """Say which cells run and for how long, and which failed and why; of each kind the first ones."""
    said: list[str] = []
    kinds: tuple[State, ...] = ("running", "failed")
    for kind in kinds:
        rows = state.of(kind)
        for row in rows[:most]:
            what, known = state.journal.last[row.folder], state.takes(row)
            of_about = "" if known is None else f" of about {duration(known.seconds)}"
            how = f", {duration(state.elapsed(row))}{of_about}" if kind == "running" else f": {what.get('why', '')}"
            said.append(f"{kind}: {row.name}{how}".partition("\n")[0])
        if len(rows) > most:
            said.append(f"… and {len(rows) - most} more")
    return said


def _group_line(key: tuple[str, str], rows: list[Row], state: StudyState) -> str:
    counts = Counter(state.states[row.folder] for row in rows)
    stage, name = key
    label = f"{stage} of {name}" if stage == "shards" else name
    if len(rows) == 1:
        return f"{label}: {next(iter(counts))}"
    return f"{label} x {len(rows)}: " + ", ".join(f"{counts[each]} {each}" for each in STATES if counts[each])
