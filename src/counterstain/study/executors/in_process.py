"""Cells one after another in the calling process."""

from __future__ import annotations

from pathlib import Path

from counterstain.study.attempt import Outcome, attempt
from counterstain.study.plan import Cell


class InProcessExecutor:
    """The simplest executor."""

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
