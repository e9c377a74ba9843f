"""The state of a study as people read it: a tree of what follows from what, tables, and lines of text."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from rich.table import Table
from rich.tree import Tree

from counterstain.progress import duration
from counterstain.study.stage_names import STAGES
from counterstain.study.state import CellRow, State, StudyState

STATES: tuple[State, ...] = ("done", "running", "failed", "left")


def plan_tree(state: StudyState, title: str) -> Tree:
    """Draw which cells follow from which; those that differ by their repeat or shard alone are one line."""
    groups: dict[tuple[str, str], list[CellRow]] = {}
    group_of: dict[str, tuple[str, str]] = {}
    for row in state.rows:
        group_of[row.folder] = key = (row.stage, row.name.partition(" #")[0].rpartition(" of ")[2])
        groups.setdefault(key, []).append(row)
    tree = Tree(title)
    branches: dict[tuple[str, str], Tree] = {}
    for key, rows in groups.items():
        parents = [group_of[need] for row in rows[:1] for need in row.needs if group_of[need] in branches]
        # Under the last of its inputs: an evaluation under its segmenter, a set under its generator.
        parent = branches[max(parents, key=list(branches).index)] if parents else tree
        branches[key] = parent.add(_group_line(key, rows, state))
    return tree


def cell_table(state: StudyState) -> Table:
    """Return a row per cell: name, state, folder."""
    table = Table("cell", "state", "folder")
    for row in state.rows:
        table.add_row(row.name, state.states[row.folder], row.folder)
    return table


def stage_table(state: StudyState) -> Table:
    """Return a row per stage: how many cells are in which state, and what one takes."""
    counts = Counter((row.stage, state.states[row.folder]) for row in state.rows)
    table = Table("stage", *STATES, "a cell takes")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in STAGES:
        if any(counts[stage, each] for each in STATES):
            mean = state.journal.seconds.get(stage)
            cells = [str(counts[stage, each]) for each in STATES]
            table.add_row(stage, *cells, "" if mean is None else duration(mean))
    return table


def what_it_takes(state: StudyState, run: Path, slots: int) -> str:
    """Say what is done and left, and what the rest will take of time and disk."""
    counts = Counter(state.states.values())
    open_cells = len(state.rows) - counts["done"]
    line = f"{len(state.rows)} cells, {counts['done']} done, {open_cells} left"
    if not open_cells:
        return line
    existing = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    disk = f"about {size(state.bytes_left())} of disk ({size(free)} are free)"
    return f"{line}\n{time_left(state, slots)}, {disk}"


def time_left(state: StudyState, slots: int) -> str:
    """Say how long the rest takes, and of which stages nothing is known yet."""
    counts = Counter(state.states.values())
    if not counts["left"] and not counts["running"]:
        return "nothing is left to run"
    unknown = state.unknown_stages()
    if unknown and not state.seconds_left(slots):
        return f"how long the rest takes is not known yet: no cell of {', '.join(unknown)} has finished"
    at_once = f" with {slots} cells at once" if slots > 1 else ""
    text = f"at least {duration(state.seconds_left(slots))}{at_once}"
    return f"{text}, not counting stages of which no cell has finished yet ({', '.join(unknown)})" if unknown else text


def running(state: StudyState, most: int) -> list[str]:
    """Say which cells run and for how long."""
    rows = state.of("running")
    known = state.journal.seconds
    lines = [
        f"running: {row.name}, {duration(state.elapsed(row))}"
        + (f" of about {duration(known[row.stage])}" if row.stage in known else "")
        for row in rows[:most]
    ]
    return lines + ([f"… and {len(rows) - most} more"] if len(rows) > most else [])


def failures(state: StudyState, most: int) -> list[str]:
    """Say which cells failed and why."""
    rows = state.of("failed")
    lines = [f"failed: {row.name}: {state.why(row)}" for row in rows[:most]]
    return lines + ([f"… and {len(rows) - most} more"] if len(rows) > most else [])


def size(size_bytes: float) -> str:
    """Write a number of bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def _group_line(key: tuple[str, str], rows: list[CellRow], state: StudyState) -> str:
    counts = Counter(state.states[row.folder] for row in rows)
    stage, name = key
    label = f"{stage} of {name}" if stage == "shards" else name
    if len(rows) == 1:
        return f"{label}: {next(iter(counts))}"
    return f"{label} x {len(rows)}: " + ", ".join(f"{counts[each]} {each}" for each in STATES if counts[each])
