"""Keep an executor busy with cells whose inputs are ready; a cell that fails takes only its dependants along."""

from __future__ import annotations

import heapq
import shutil
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from counterstain.errors import CounterstainError, DivergenceError
from counterstain.study import journal
from counterstain.study.executors import Executor, Outcome
from counterstain.study.plan import Cell


class Frontier:
    """The cells that are still to do, handed out in the plan's order as their inputs get ready."""

    def __init__(self, cells: Sequence[Cell], done: Collection[str]) -> None:
        self._todo = {cell.folder: number for number, cell in enumerate(cells) if cell.folder not in done}
        self._cells = cells
        self._waits: dict[str, int] = {}
        self._dependants: dict[str, list[str]] = {}
        self._ready: list[int] = []
        for folder, number in self._todo.items():
            missing = [need for need in cells[number].needs if need in self._todo]
            self._waits[folder] = len(missing)
            for need in missing:
                self._dependants.setdefault(need, []).append(folder)
            if not missing:
                heapq.heappush(self._ready, number)

    def __len__(self) -> int:
        return len(self._todo)

    def take(self) -> Cell | None:
        """Return the next cell that can start; None where all that is left waits for others."""
        return self._cells[heapq.heappop(self._ready)] if self._ready else None

    def put_back(self, folder: str) -> None:
        """Take back a cell that is to start again."""
        heapq.heappush(self._ready, self._todo[folder])

    def finish(self, folder: str) -> None:
        """Say that a cell is done."""
        del self._todo[folder]
        for dependant in self._dependants.pop(folder, []):
            if dependant in self._waits:
                self._waits[dependant] -= 1
                if not self._waits[dependant]:
                    heapq.heappush(self._ready, self._todo[dependant])

    def fail(self, folder: str) -> list[Cell]:
        """Say that a cell failed and return those that can never start because of it, in the plan's order."""
        lost = [self._todo.pop(folder)]
        reached = [folder]
        while reached:
            for dependant in self._dependants.pop(reached.pop(), []):
                if dependant in self._todo:
                    lost.append(self._todo.pop(dependant))
                    del self._waits[dependant]
                    reached.append(dependant)
        return [self._cells[number] for number in sorted(lost[1:])]


INPUT_FAILED = "an input of it failed"


def run_cells(
    cells: Sequence[Cell], done: Collection[str], root: Path, executor: Executor, *, retries: int
) -> dict[str, str]:
    """Run the cells that are not done; return why cells failed, by name, in the plan's order.

    Raises
    ------
    CounterstainError
        What a cell met that the user must mend; nothing else starts then.
    """
    known = journal.fold(journal.read(root.parent)).seconds
    left = Counter[str](cell.stage for cell in cells if cell.folder not in done)
    work = _Work(Frontier(cells, done), root, executor, retries, journal.TimeLeft(known, left, executor.slots))
    say(f"{len(cells)} cells, {len(cells) - len(work.frontier)} done already; executor: {executor.name}")
    journal.record(root.parent, "study", executor=executor.name, slots=executor.slots)
    work.run()
    return {cell.name: work.failures[cell.folder] for cell in cells if cell.folder in work.failures}


class _Work:
    def __init__(
        self, frontier: Frontier, root: Path, executor: Executor, retries: int, time_left: journal.TimeLeft
    ) -> None:
        self.frontier, self._root, self._executor, self._retries = frontier, root, executor, retries
        self._time_left = time_left
        self.failures: dict[str, str] = {}
        self._lost: dict[str, int] = {}
        self._running = self._number = 0
        self._total = len(frontier)

    def run(self) -> None:
        while len(self.frontier):
            while self._running < self._executor.queue and (cell := self.frontier.take()) is not None:
                self._start(cell)
            for outcome in self._executor.wait():
                self._running -= 1
                self._end(outcome)

    def _start(self, cell: Cell) -> None:
        self._number += 1
        say(f"[{min(self._number, self._total)}/{self._total}] {cell.name}{self._time_left}")
        self._executor.start(cell)
        self._running += 1

    def _end(self, outcome: Outcome) -> None:
        cell, error = outcome.cell, outcome.error
        if outcome.lost:
            self._again(cell)
        elif error is None:
            self.frontier.finish(cell.folder)
            self._time_left.finish(cell.stage, outcome.seconds)
        elif isinstance(error, DivergenceError):
            # The next run starts it from the beginning, not from a state that has diverged already.
            shutil.rmtree(self._root / cell.folder, ignore_errors=True)
            self._fail(cell, str(error))
        elif isinstance(error, CounterstainError):
            raise type(error)(f"{cell.name}: {error}") from error
        else:
            raise error

    def _again(self, cell: Cell) -> None:
        lost = self._lost[cell.folder] = self._lost.get(cell.folder, 0) + 1
        about = {"cell": cell.folder, "name": cell.name, "stage": cell.stage}
        journal.record(self._root.parent, "lost", attempt=lost, **about)
        if lost > self._retries:
            self._fail(cell, f"its process was lost {lost} times; perhaps memory ran out")
            return
        say(f"{cell.name}: its process was lost; starting it again ({lost} of {self._retries})")
        self.frontier.put_back(cell.folder)
        self._number -= 1

    def _fail(self, cell: Cell, why: str) -> None:
        say(f"{cell.name}: failed ({why}); the rest goes on")
        self.failures[cell.folder] = why
        self.failures |= {other.folder: INPUT_FAILED for other in self.frontier.fail(cell.folder)}


def say(line: str) -> None:
    """Write a line with the time to standard error."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()
