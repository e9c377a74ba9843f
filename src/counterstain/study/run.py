"""Run a study: the cells that are not done yet, each when its inputs are ready, then the results.

A failed cell stops only those that depend on it.
"""

from __future__ import annotations

import fcntl
import heapq
import shutil
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import torch

from counterstain.config import to_yaml
from counterstain.data.review import REVIEW_FILE
from counterstain.devices import started_processes
from counterstain.errors import ConfigError, CounterstainError, DivergenceError, InputError, MismatchError
from counterstain.processes import ExecutorConfig
from counterstain.progress import duration
from counterstain.segmentation.model import Segmenter, load_encoder_weights
from counterstain.storage import claim, disk_errors_named, write_text
from counterstain.study.cells import CELLS, Cell
from counterstain.study.config import StudyConfig, lacking
from counterstain.study.executors import Executor, Outcome, open_executor
from counterstain.study.plan import plan_study
from counterstain.study.records import unreviewed
from counterstain.study.results import write_results
from counterstain.study.stages import follow_cohort
from counterstain.study.status import DONE_FILE, damage, events_of, is_done, record, summarised, write_plan

READ_BY_RESULTS = {"cohort", "synthetic", "evaluation"}
INPUT_FAILED = "an input of it failed"


def run_study(
    study: StudyConfig, out: Path, *, source: str | Path = "study", executor: ExecutorConfig | None = None
) -> Path:
    """Run every cell that is not done, write the results and return their folder.

    Running again continues where it was stopped; after a change of the study, what does not depend on the change is
    kept. ``source`` says where the study comes from, for messages; where ``executor`` runs cells changes nothing about
    results.

    Raises MismatchError where the folder belongs to another study, or another process is running this one; ConfigError
    where a package or a file that a cell needs is missing, or the segmenter's network cannot be built.
    """
    if started_processes() > 1:
        raise ConfigError("a study starts the processes of its trainings itself; run it without torchrun")
    recipe = study.resolved_recipe(source)
    root = out / CELLS
    cells = plan_study(study, recipe, root)
    claim(out, "study", {"name": study.name})
    with locked(out):
        write_text(out / "study.yaml", to_yaml(study))
        write_plan(out, cells)
        for line in unreviewed(cells, root):
            say(line)
        done = whole_cells(cells, root)
        for cell in cells:
            if cell.stage == "cohort":
                follow_cohort(cell, root)
        if len(done) == len(cells):
            say(f"{len(cells)} cells, all done already")
            return write_results(study, recipe, cells, out, {})
        lines = lacking(recipe, (cell for cell in cells if cell.folder not in done))
        if lines:
            raise ConfigError("; ".join(lines))
        with torch.random.fork_rng():
            network: Any = Segmenter(recipe.segmenter).network  # what cannot be built or downloaded is reported now
        if any(cell.stage == "segmenter" and cell.folder not in done for cell in cells):
            load_encoder_weights(network.encoder, recipe.segmenter)
        opened = open_executor(executor or ExecutorConfig(), study.resources, root)
        try:
            failures = run_cells(cells, done, root, opened, retries=study.resources.retries)
        finally:
            opened.stop()
        if cells[0].name in failures:
            raise InputError(f"{out}: without its cohort the study cannot go on ({failures[cells[0].name]})")
        return write_results(study, recipe, cells, out, failures)


def whole_cells(cells: Sequence[Cell], root: Path) -> set[str]:
    """Return the folders of finished cells; damaged ones are reported and count as not done.

    Sizes are compared for all; files that will be read are read through and their hashes compared.
    """
    done = {cell.folder for cell in cells if is_done(cell, root)}
    done |= {cell.folder for cell in cells if cell.stage == "shards" and cell.settings["set"] in done}
    read: set[str] = set()
    for cell in reversed(cells):  # each before its inputs
        if cell.folder in done and (root / cell.folder).exists():
            file = damage(root / cell.folder, hashes=cell.folder in read or cell.stage in READ_BY_RESULTS)
            if file is not None:
                say(f"{cell.name}: {root / cell.folder / file} is damaged or missing; the cell is made again")
                _forget(cell, root)
                done.remove(cell.folder)
        if cell.folder not in done:
            read.update(cell.needs)
    return done


def _forget(cell: Cell, root: Path) -> None:
    if cell.stage == "synthetic":  # its shards have hashes of their own: only the damaged ones are drawn again
        (root / cell.folder / DONE_FILE).unlink(missing_ok=True)
    else:
        shutil.rmtree(root / cell.folder)


def run_cells(
    cells: Sequence[Cell], done: Collection[str], root: Path, executor: Executor, *, retries: int
) -> dict[str, str]:
    """Run the cells that are not done; return why cells failed, by name, in the plan's order.

    Raises CounterstainError where a cell met something that the user must put right; no other cell starts then.
    """
    scheduler = _Scheduler(cells, done, root, executor, retries)
    say(f"{len(cells)} cells, {len(cells) - len(scheduler.todo)} done already; executor: {executor.name}")
    record(root.parent, "study", executor=executor.name, slots=executor.slots)
    scheduler.run()
    failures = scheduler.failures
    for cell in cells:  # each after its inputs
        if cell.folder in scheduler.todo and any(need in failures for need in cell.needs):
            failures[cell.folder] = INPUT_FAILED
    return {cell.name: failures[cell.folder] for cell in cells if cell.folder in failures}


class _Scheduler:
    """Keeps an executor busy with cells whose inputs are ready, in the plan's order."""

    def __init__(
        self, cells: Sequence[Cell], done: Collection[str], root: Path, executor: Executor, retries: int
    ) -> None:
        self._cells, self._root, self._executor, self._retries = cells, root, executor, retries
        self.todo = {cell.folder: number for number, cell in enumerate(cells) if cell.folder not in done}
        self.failures: dict[str, str] = {}
        self._graph = TopologicalSorter(
            {folder: [need for need in cells[place].needs if need in self.todo] for folder, place in self.todo.items()}
        )
        self._graph.prepare()
        self._ready: list[int] = []  # a heap of places in the plan
        self._lost = Counter[str]()
        self._started = 0
        self._left = Counter[str](cell.stage for cell in cells if cell.folder not in done)
        known = summarised(events_of(root.parent)).seconds
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
        record(self._root.parent, "lost", cell, attempt=lost)
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
        """Return ', about 3 min 5 s left', or nothing while no cell of a stage has finished."""
        left = +self._left
        if any(not self._finished[stage] for stage in left):
            return ""
        seconds = sum(count * self._seconds[stage] / self._finished[stage] for stage, count in left.items())
        return f", about {duration(seconds / self._executor.slots)} left"


def say(line: str) -> None:
    """Write a line with the time to standard error."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second driver away; the operating system drops the lock with the process, however that ends."""
    with disk_errors_named(out / ".lock"), (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MismatchError(f"{out}: another process is running this study; wait for it or stop it") from error
        yield


@dataclass(frozen=True)
class Leftover:
    """A folder that nothing needs."""

    folder: Path
    size_bytes: int


def leftovers(root: Path, planned: Collection[str]) -> list[Leftover]:
    """Return the folders among the cells that belong to none of the planned ones, the largest first.

    Synthetic sets that somebody has reviewed are not among them.
    """
    if not root.is_dir():
        return []
    found = [folder for folder in root.iterdir() if folder.is_dir() and folder.name not in planned]
    found = [folder for folder in found if not (folder / REVIEW_FILE).exists()]
    sized = [Leftover(folder, sum(f.lstat().st_size for f in folder.rglob("*") if not f.is_dir())) for folder in found]
    return sorted(sized, key=lambda leftover: (-leftover.size_bytes, leftover.folder.name))


def remove(found: Collection[Leftover]) -> None:
    """Delete folders; each is renamed first, so that a half-deleted cell is never taken for a whole one."""
    for leftover in found:
        doomed = leftover.folder.with_name(f".{leftover.folder.name.lstrip('.')}.removed")
        if leftover.folder != doomed:
            leftover.folder.replace(doomed)
        shutil.rmtree(doomed)
