"""Keep an executor busy with cells whose inputs are ready; a failed cell stops only those that depend on it."""

from __future__ import annotations

import heapq
import shutil
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

from counterstain.errors import CounterstainError, DivergenceError
from counterstain.progress import duration
from counterstain.study import journal
from counterstain.study.executors import Executor, Outcome
from counterstain.study.plan import Cell

INPUT_FAILED = "an input of it failed"


def run_cells(
    cells: Sequence[Cell], done: Collection[str], root: Path, executor: Executor, *, retries: int
) -> dict[str, str]:
    """Run the cells that are not done; return why cells failed, by name, in the plan's order.

    Raises
    ------
    CounterstainError
        A cell met something that the user must put right; no other cell starts then.
    """
    scheduler = _Scheduler(cells, done, root, executor, retries)
    say(f"{len(cells)} cells, {len(cells) - len(scheduler.todo)} done already; executor: {executor.name}")
    journal.record(root.parent, "study", executor=executor.name, slots=executor.slots)
    scheduler.run()
    for cell in cells:  # each after its inputs
        if cell.folder in scheduler.todo and any(need in scheduler.failures for need in cell.needs):
            scheduler.failures[cell.folder] = INPUT_FAILED
    return {cell.name: scheduler.failures[cell.folder] for cell in cells if cell.folder in scheduler.failures}


class _Scheduler:
    def __init__(
        self, cells: Sequence[Cell], done: Collection[str], root: Path, executor: Executor, retries: int
    ) -> None:
        self._cells, self._root, self._executor, self._retries = cells, root, executor, retries
        self.todo = {cell.folder: number for number, cell in enumerate(cells) if cell.folder not in done}
        self.failures: dict[str, str] = {}
        self._graph = TopologicalSorter(
            {
                folder: [need for need in cells[number].needs if need in self.todo]
                for folder, number in self.todo.items()
            }
        )
        self._graph.prepare()
        self._ready: list[int] = []  # a heap: cells start in the plan's order
        self._lost = Counter[str]()
        self._started = 0
        self._left = Counter[str](cell.stage for cell in cells if cell.folder not in done)
        known = journal.fold(journal.read(root.parent)).seconds
        self._seconds, self._finished = dict(known), Counter[str](known.keys())

    def run(self) -> None:
        running = 0
        self._find_ready()
        while self._ready or running:
            while self._ready and running < self._executor.queue:
                self._start(self._cells[heapq.heappop(self._ready)])
                running += 1
            for outcome in self._executor.wait():
                running -= 1
                self._end(outcome)

    def _find_ready(self) -> None:
        for folder in self._graph.get_ready():
            heapq.heappush(self._ready, self.todo[folder])

    def _start(self, cell: Cell) -> None:
        self._started += 1
        say(f"[{min(self._started, len(self.todo))}/{len(self.todo)}] {cell.name}{self._time_left()}")
        self._executor.start(cell)

    def _end(self, outcome: Outcome) -> None:
        cell, error = outcome.cell, outcome.error
        if outcome.lost:
            self._start_again(cell)
        elif error is None:
            self._finish(cell, outcome.seconds)
        elif isinstance(error, DivergenceError):
            # The next run starts it from the beginning, not from a state that has diverged already.
            shutil.rmtree(self._root / cell.folder, ignore_errors=True)
            self._fail(cell, str(error))
        elif isinstance(error, CounterstainError):
            raise type(error)(f"{cell.name}: {error}") from error
        else:
            raise error

    def _finish(self, cell: Cell, seconds: float | None) -> None:
        self._left[cell.stage] -= 1
        if seconds is not None:
            self._finished[cell.stage] += 1
            self._seconds[cell.stage] = self._seconds.get(cell.stage, 0.0) + seconds
        self._graph.done(cell.folder)
        self._find_ready()

    def _start_again(self, cell: Cell) -> None:
        self._lost[cell.folder] += 1
        lost = self._lost[cell.folder]
        journal.record(self._root.parent, "lost", attempt=lost, **journal.about(cell))
        if lost > self._retries:
            self._fail(cell, f"its process was lost {lost} times; perhaps memory ran out")
            return
        say(f"{cell.name}: its process was lost; starting it again ({lost} of {self._retries})")
        heapq.heappush(self._ready, self.todo[cell.folder])
        self._started -= 1

    def _fail(self, cell: Cell, why: str) -> None:
        say(f"{cell.name}: failed ({why}); the rest goes on")
        self.failures[cell.folder] = why

    def _time_left(self) -> str:
        """Return ', about m:ss left', or nothing while no cell of a stage has finished."""
        left = +self._left
        if any(not self._finished[stage] for stage in left):
            return ""
        seconds = sum(count * self._seconds[stage] / self._finished[stage] for stage, count in left.items())
        return f", about {duration(seconds / self._executor.slots)} left"


def say(line: str) -> None:
    """Write a line with the time to standard error."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()
