"""A progress bar with the time left, for everything that people wait for; times and counts as they are written."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

LINE_EVERY_SECONDS = 30.0
PERCENT = "\N{NO-BREAK SPACE}%"
TIMES = "\N{MULTIPLICATION SIGN}"

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""What :func:`bar` and :func:`silent` are: opened with a label and a total, it yields what is told of steps done."""


@contextmanager
def silent(label: str, total: int) -> Iterator[Callable[[int], None]]:  # noqa: ARG001
    """Yield a function that takes the number of steps just done, and show nothing."""
    yield lambda _steps: None


class BarTimes:
    """The times of progress bars that are not shown: those of what is prepared, then that of the steps."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._bars: list[list[float]] = []  # when each opened, and when it advanced

    def open(self) -> None:
        """Note that a bar opened."""
        self._bars.append([time.perf_counter()])

    def advance(self, _steps: int) -> None:
        """Note that the last bar advanced."""
        self._bars[-1].append(time.perf_counter())

    def seconds(self, steps: int, *, prepared: float = 1.0) -> tuple[float, float]:
        """Return what the whole takes once, and what each of its steps takes; the first one is not representative.

        ``prepared`` is how many times as much is prepared where it is done in full.
        """
        total = time.perf_counter() - self._start
        if not self._bars:
            return 0.0, total / steps
        *before, bar = self._bars
        each = (bar[-1] - bar[1]) / (len(bar) - 2)
        preparing = sum(times[-1] - times[0] for times in before)
        return max(0.0, total - steps * each) + (prepared - 1) * preparing, each


_times: ContextVar[BarTimes | None] = ContextVar("times", default=None)


@contextmanager
def overheard() -> Iterator[BarTimes]:
    """Inside it, bars show nothing, and their times are taken."""
    token = _times.set(times := BarTimes())
    try:
        yield times
    finally:
        _times.reset(token)


_heard: ContextVar[Callable[[int, int], None] | None] = ContextVar("heard", default=None)


@contextmanager
def steps_heard(hear: Callable[[int, int], None]) -> Iterator[None]:
    """Inside it, bars show nothing; ``hear(done, total)`` is told of their steps, and of every step of a drawing."""
    token = _heard.set(hear)
    try:
        yield
    finally:
        _heard.reset(token)


def step_done(done: int, total: int) -> None:
    """Tell whoever listens that a step of a drawing is done."""
    if (hear := _heard.get()) is not None:
        hear(done, total)


@contextmanager
def bar(label: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function that is called with the number of steps just done.

    On a terminal this is a live bar on standard error; in a log file, a line every half minute.
    """
    times = _times.get()
    if times is not None:
        times.open()
        yield times.advance
    elif (hear := _heard.get()) is not None:
        yield _counting(hear, total, done)
    elif sys.stderr.isatty():
        with _live_bar(label, total, done) as advance:
            yield advance
    else:
        yield _LineBar(label, total, done).advance


def _counting(hear: Callable[[int, int], None], total: int, done: int) -> Callable[[int], None]:
    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        hear(done, total)

    return advance


@contextmanager
def _live_bar(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, completed=done)
        yield lambda steps: progress.advance(task, steps)


class _LineBar:
    def __init__(self, label: str, total: int, done: int) -> None:
        self._label, self._total, self._done, self._first = label, total, done, done
        self._start = self._last = time.monotonic()

    def advance(self, steps: int) -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._last < LINE_EVERY_SECONDS:
            return
        self._last = now
        rate = max(self._done - self._first, 1) / (now - self._start)
        left = (self._total - self._done) / rate
        sys.stderr.write(f"{self._label}: {self._done}/{self._total}, {duration(left)} left\n")
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """Write a duration as people say it (``45 s``, ``3 min 5 s``, ``1 h 5 min``)."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def counted(number: int, thing: str, things: str = "") -> str:
    """Write a number with its noun (``1 repeat``, ``5 repeats``)."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def size(size_bytes: float) -> str:
    """Write a number of bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"
