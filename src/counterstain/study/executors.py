"""Where cells run: in this process, in processes beside it, or on a Ray cluster; the results are the same.

An attempt at a cell is the same everywhere: alone, noted in the journal, with the threads that it was given.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Protocol

import torch

from counterstain.errors import CounterstainError, StorageError
from counterstain.processes import (
    CORES,
    SECONDS_TO_SAVE,
    SPAWN,
    ExecutorConfig,
    children_inherit,
    cores,
    end_with_the_driver,
    open_ray,
)
from counterstain.storage import disk_errors_named
from counterstain.study.cells import Cell
from counterstain.study.config import Resources
from counterstain.study.stages import run_cell
from counterstain.study.status import is_done, record

LOCK_FILE = ".cells.lock"


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a cell ended."""

    cell: Cell
    error: Exception | None = None  # why it failed; None where it is done
    lost: bool = False  # its process or machine is gone; another attempt may succeed
    seconds: float | None = None  # what it took; None where it was done by another


class CellCrashError(RuntimeError):
    """A defect in another process; its message is the traceback there."""


def attempt(cell: Cell, root: Path, threads: int | None = None) -> Outcome:
    """Make a cell, unless it is done by now; errors come back in the outcome."""
    try:
        with _alone(cell, root), with_threads(threads), disk_errors_named(root / cell.folder):
            if is_done(cell, root):
                return Outcome(cell)  # the process of a driver that was killed had finished it
            record(root.parent, "start", cell)
            seconds, size_bytes = run_cell(cell, root)
            record(root.parent, "finish", cell, seconds=seconds, bytes=size_bytes)
    except Exception as error:  # noqa: BLE001 - the driver decides what to do about it
        with contextlib.suppress(StorageError):  # the disk is full: the error itself is what the user must see
            record(root.parent, "fail", cell, why=str(error) or type(error).__name__)
        return Outcome(cell, error)
    return Outcome(cell, seconds=seconds)


def attempt_elsewhere(cell: Cell, root: Path, threads: int, cpus: int | None = None) -> Outcome:
    """Make a cell in a process that is not the driver's: what comes back can be sent.

    ``threads`` compute; ``cpus`` are all the cores that it may use, also for the workers of a training.
    """
    if cpus is not None:
        os.environ[CORES] = str(cpus)
    outcome = attempt(cell, root, threads)
    if outcome.error is not None and not isinstance(outcome.error, CounterstainError):
        crash = CellCrashError(f"{cell.name}\n{''.join(traceback.format_exception(outcome.error))}")
        return Outcome(cell, crash)
    return outcome


@contextmanager
def _alone(cell: Cell, root: Path) -> Iterator[None]:
    """Lock a cell, as one byte of one file: a process may outlive its killed driver, a cut-off machine by longer."""
    byte = int(cell.folder.rpartition("-")[2], 16) >> 2
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK_FILE).open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, byte)
        yield


@contextmanager
def with_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads; None changes nothing."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Executor(Protocol):
    """Runs cells whose inputs are there."""

    name: str  # as the journal and the user read it
    slots: int  # cells that it can run at once, to estimate the time left
    queue: int  # cells that it takes before one must end

    def start(self, cell: Cell) -> None:
        """Take a cell; never called for more than ``queue`` cells at once."""

    def wait(self) -> list[Outcome]:
        """Return the outcomes of cells that ended since the last call, at least one."""

    def stop(self) -> None:
        """End at once whatever runs; cells survive being killed."""


class InProcessExecutor:
    """Runs cells one after another in the calling process."""

    name, slots, queue = "local", 1, 1

    def __init__(self, root: Path, threads: int | None) -> None:
        self._root, self._threads = root, threads
        self._taken: list[Cell] = []

    def start(self, cell: Cell) -> None:
        """Take a cell; it runs when its outcome is waited for."""
        self._taken.append(cell)

    def wait(self) -> list[Outcome]:
        """Run the cell that was taken."""
        return [attempt(self._taken.pop(), self._root, self._threads)]

    def stop(self) -> None:
        """Nothing runs outside the calling process."""


SECONDS_TO_END = 2.0


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    cell: Cell | None = None


class ProcessExecutor:
    """A fixed number of processes that take cells one by one; one that dies costs only its cell's attempt."""

    def __init__(self, root: Path, processes: int, threads: int) -> None:
        self.name = f"local, {processes} processes x {threads} {'thread' if threads == 1 else 'threads'}"
        self.slots = self.queue = processes
        self._root, self._threads = root.resolve(), threads
        self._workers: list[_Worker | None] = [None] * processes

    def start(self, cell: Cell) -> None:
        """Give a cell to a process that has none; processes start when they are needed."""
        for number, worker in enumerate(self._workers):
            if worker is None:
                worker = self._workers[number] = self._started(number)  # noqa: PLW2901
            if worker.cell is None:
                worker.cell = cell
                with contextlib.suppress(BrokenPipeError):  # it died just now: wait() will say so
                    worker.pipe.send(cell)
                return
        raise AssertionError("more cells than processes")

    def wait(self) -> list[Outcome]:
        """Return what ended; a process that died has lost its cell."""
        busy = {worker.pipe: worker for worker in self._workers if worker and worker.cell}
        return [self._outcome(busy[pipe]) for pipe in wait(list(busy)) if isinstance(pipe, Connection)]

    def stop(self) -> None:
        """End all processes; those that train save their state after the step that is under way."""
        living = [worker.process for worker in self._workers if worker]
        for process in living:
            process.terminate()
        deadline = time.monotonic() + SECONDS_TO_SAVE
        for process in living:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join(SECONDS_TO_END)
        self._workers = [None] * self.slots

    def _outcome(self, worker: _Worker) -> Outcome:
        cell, worker.cell = worker.cell, None
        assert cell is not None
        try:
            outcome = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.kill()
            worker.process.join(SECONDS_TO_END)
            self._workers[self._workers.index(worker)] = None
            return Outcome(cell, lost=True)
        assert isinstance(outcome, Outcome)
        return outcome

    def _started(self, number: int) -> _Worker:
        ours, theirs = SPAWN.Pipe()
        log = self._root.parent / "logs" / f"process-{number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        devices = torch.cuda.device_count()
        device = number % devices if devices > 1 else None
        process = SPAWN.Process(target=_work, args=(theirs, self._root, self._threads, log, device))
        with children_inherit(self._threads, max(1, cores() // self.slots)):
            process.start()
        theirs.close()
        return _Worker(process, ours)


def _work(pipe: Connection, root: Path, threads: int, log: Path, device: int | None) -> None:
    with log.open("a", buffering=1, encoding="utf-8") as file:
        sys.stdout = sys.stderr = file
        threading.Thread(target=end_with_the_driver, daemon=True).start()
        if device is not None:
            torch.cuda.set_device(device)
        while True:
            try:
                cell = pipe.recv()
            except EOFError:
                return
            try:
                outcome = attempt_elsewhere(cell, root, threads)
            except KeyboardInterrupt:  # the training's state is saved
                return
            pipe.send(outcome)


class RayExecutor:
    """One Ray task for each attempt at a cell: on this machine, on Slurm, on Kubernetes.

    Ray finds a node with the processors that it asks for; the nodes share the study's folder.
    """

    def __init__(self, root: Path, resources: Resources, address: str | None = None) -> None:
        self._root, self._resources = root.resolve(), resources
        self._threads = resources.threads or 1
        self._running: dict[Any, Cell] = {}
        self._ray = open_ray(address, self._threads)
        processors = int(self._ray.cluster_resources().get("CPU", 1))
        self.name = f"ray, {processors} processors, {address or 'this machine'}"
        self.slots = max(1, processors // self._threads)
        self.queue = 4 * self.slots + 16
        # Lost attempts are counted by the scheduler, the same for all executors.
        self._task = self._ray.remote(max_retries=0, max_calls=0)(attempt_elsewhere)

    def start(self, cell: Cell) -> None:
        """Hand a cell to the cluster."""
        cpus, gpus = self._resources.of(cell.stage)
        task = self._task.options(num_cpus=cpus, num_gpus=gpus, name=cell.name)
        self._running[task.remote(cell, self._root, self._threads, max(1, int(cpus)))] = cell

    def wait(self) -> list[Outcome]:
        """Return what ended; a node or process that is gone has lost its cell."""
        ended, _ = self._ray.wait(list(self._running), num_returns=1)
        return [self._outcome(reference) for reference in ended]

    def stop(self) -> None:
        """Leave the cluster; it ends this study's tasks."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()

    def _outcome(self, reference: Any) -> Outcome:
        cell = self._running.pop(reference)
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:
            raise  # a defect outside the cell's own work
        except self._ray.exceptions.RayError:
            return Outcome(cell, lost=True)
        assert isinstance(outcome, Outcome)
        return outcome


def open_executor(config: ExecutorConfig, resources: Resources, root: Path) -> Executor:
    """Start what runs cells; ``root`` is the folder of all cells."""
    if config.kind == "ray":
        return RayExecutor(root, resources, config.address)
    if config.processes is not None:
        return ProcessExecutor(root, config.processes, resources.threads or 1)
    return InProcessExecutor(root, resources.threads)
