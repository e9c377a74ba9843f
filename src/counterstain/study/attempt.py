"""One attempt at a cell, the same in every executor: alone, noted in the journal, with the threads it was given."""

from __future__ import annotations

import fcntl
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from counterstain.errors import CounterstainError, StorageError
from counterstain.storage import disk_errors_named
from counterstain.study import journal
from counterstain.study.plan import Cell
from counterstain.study.stages import is_done, run_cell

LOCK_FILE = ".cells.lock"


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a cell ended."""

    cell: Cell
    error: Exception | None = None
    """Why it failed; None where it is done."""
    lost: bool = False
    """Its process or machine is gone; another attempt may succeed."""
    seconds: float | None = None
    """What it took; None where it was done by another."""


class CellCrashError(RuntimeError):
    """A defect in another process; its message is the traceback there."""


def attempt(cell: Cell, root: Path, threads: int | None = None) -> Outcome:
    """Make a cell, unless it is done by now; errors come back in the outcome."""
    about = {"cell": cell.folder, "name": cell.name, "stage": cell.stage}
    try:
        with _alone(cell, root), _with_threads(threads), disk_errors_named(root / cell.folder):
            if is_done(cell, root):
                return Outcome(cell)  # the process of a driver that was killed had finished it
            journal.record(root.parent, "start", **about)
            done = run_cell(cell, root)
            journal.record(root.parent, "finish", seconds=done.seconds, bytes=done.size_bytes, **about)
    except Exception as error:  # noqa: BLE001 - the driver decides what to do about it
        _note_failure(root, about, error)
        return Outcome(cell, error)
    return Outcome(cell, seconds=done.seconds)


def attempt_elsewhere(cell: Cell, root: Path, threads: int | None) -> Outcome:
    """Make a cell in a process that is not the driver's: what comes back can be sent."""
    outcome = attempt(cell, root, threads)
    if outcome.error is None or isinstance(outcome.error, CounterstainError):
        return outcome
    return Outcome(cell, CellCrashError(f"{cell.name}\n{''.join(traceback.format_exception(outcome.error))}"))


def _note_failure(root: Path, about: dict[str, str], error: Exception) -> None:
    try:
        journal.record(root.parent, "fail", why=str(error) or type(error).__name__, **about)
    except StorageError:
        return  # the disk is full: the error itself is what the user must see


@contextmanager
def _alone(cell: Cell, root: Path) -> Iterator[None]:
    """Keep others from this cell: a process may outlive its killed driver by a moment, a cut-off machine by longer.

    One byte of one file is locked for each cell; the operating system drops the lock with the process.
    """
    byte = int(cell.folder.rpartition("-")[2], 16) >> 2
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK_FILE).open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, byte)
        yield


@contextmanager
def _with_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
