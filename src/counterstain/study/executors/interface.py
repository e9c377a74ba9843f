"""What the scheduler asks of an executor."""

from __future__ import annotations

from typing import Protocol

from counterstain.study.attempt import Outcome
from counterstain.study.plan import Cell


class Executor(Protocol):
    """Runs cells whose inputs are there."""

    name: str
    """As the journal and the user read it."""
    slots: int
    """Cells that it can run at once, to estimate the time left."""
    queue: int
    """Cells that it takes before one must end."""

    def start(self, cell: Cell) -> None:
        """Take a cell; never called for more than ``queue`` cells at once."""

    def wait(self) -> list[Outcome]:
        """Return the outcomes of cells that ended since the last call, at least one."""

    def stop(self) -> None:
        """End at once whatever runs; cells survive being killed."""
