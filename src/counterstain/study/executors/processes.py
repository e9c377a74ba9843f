"""Cells in processes of this machine, each with its threads; a process that dies costs its cell's attempt only."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from counterstain.study.attempt import Outcome, attempt_elsewhere
from counterstain.study.plan import Cell

SPAWN = multiprocessing.get_context("spawn")  # a forked process could use neither CUDA nor OpenMP
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SECONDS_TO_END = 2.0
SECONDS_TO_SAVE = 20.0


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    cell: Cell | None = None


class ProcessExecutor:
    """A fixed number of processes that take cells one by one."""

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
        busy = {worker.pipe: number for number, worker in enumerate(self._workers) if worker and worker.cell}
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

    def _outcome(self, number: int) -> Outcome:
        worker = self._workers[number]
        assert worker is not None
        assert worker.cell is not None
        cell = worker.cell
        try:
            outcome = worker.pipe.recv()
            assert isinstance(outcome, Outcome)
        except (EOFError, OSError):
            worker.process.kill()
            worker.process.join(SECONDS_TO_END)
            self._workers[number] = None
            return Outcome(cell, lost=True)
        worker.cell = None
        return outcome

    def _started(self, number: int) -> _Worker:
        ours, theirs = SPAWN.Pipe()
        log = self._root.parent / "logs" / f"process-{number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        devices = torch.cuda.device_count()
        device = number % devices if devices > 1 else None
        process = SPAWN.Process(target=_work, args=(theirs, self._root, self._threads, log, device))
        with _threads_of_children(self._threads), _interrupts_held_back():
            process.start()
        theirs.close()
        return _Worker(process, ours)


def _work(pipe: Connection, root: Path, threads: int, log: Path, device: int | None) -> None:
    with log.open("a", buffering=1, encoding="utf-8") as file:
        sys.stdout = sys.stderr = file
        threading.Thread(target=_end_with_the_driver, daemon=True).start()
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


def _end_with_the_driver() -> None:
    driver = multiprocessing.parent_process()
    assert driver is not None
    wait([driver.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves its state
    time.sleep(SECONDS_TO_SAVE)
    os._exit(1)


@contextmanager
def _threads_of_children(threads: int) -> Iterator[None]:
    """NumPy reads its number of threads once, when it is imported."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Children inherit the mask: Ctrl-C reaches the driver alone, which then ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
