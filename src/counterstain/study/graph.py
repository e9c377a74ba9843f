"""Which cells can start: a cell is ready once all that it needs is there."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence

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
