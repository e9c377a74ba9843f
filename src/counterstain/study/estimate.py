"""How long the rest of a study takes, from its finished cells of the same stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from counterstain.progress import duration


class Planned(Protocol):
    """What an estimate needs to know of a cell."""

    @property
    def folder(self) -> str:
        """Name of its folder."""

    @property
    def stage(self) -> str:
        """What kind of work it is."""

    @property
    def needs(self) -> Sequence[str]:
        """Folders of the cells before it."""


class TimeLeft:
    """A running estimate while cells finish."""

    def __init__(self, known: Mapping[str, float], left: Mapping[str, int], slots: int) -> None:
        self._seconds = {stage: [mean] for stage, mean in known.items()}
        self._left, self._slots = Counter(left), slots

    def finish(self, stage: str, seconds: float | None) -> None:
        """Count a cell as done."""
        self._left[stage] -= 1
        if seconds is not None:
            self._seconds.setdefault(stage, []).append(seconds)

    def __str__(self) -> str:
        """Return ', about m:ss left', or nothing while a stage is still unknown."""
        left = {stage: count for stage, count in self._left.items() if count}
        if not left or any(stage not in self._seconds for stage in left):
            return ""
        total = sum(count * sum(self._seconds[stage]) / len(self._seconds[stage]) for stage, count in left.items())
        return f", about {duration(total / self._slots)} left"


def seconds_left(todo: Sequence[Planned], known: Mapping[str, float], slots: int) -> float:
    """Return a lower bound of the time of cells, each after its needs: all slots busy, or the longest chain."""
    total = sum(known.get(cell.stage, 0.0) for cell in todo)
    return max(total / slots, longest_chain(todo, known))


def longest_chain(cells: Sequence[Planned], known: Mapping[str, float]) -> float:
    """Return the time that no number of processes undercuts: cells that wait for each other."""
    ends: dict[str, float] = {}
    for cell in cells:
        start = max((ends.get(need, 0.0) for need in cell.needs), default=0.0)
        ends[cell.folder] = start + known.get(cell.stage, 0.0)
    return max(ends.values(), default=0.0)
