"""A synthetic set drawn by several cells, each its own shards; the set's cell then finds them all there.

How a set is cut changes neither its name nor its content: every patch follows from the set's seed and its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from counterstain.data.patch_set import SHARD_PATCHES
from counterstain.recipe import Recipe
from counterstain.study.config import StudyConfig
from counterstain.study.plan import Cell, plan_study


def cells_of(study: StudyConfig, recipe: Recipe) -> list[Cell]:
    """Return the cells of a study as they run, each after all that it needs."""
    return in_shards(plan_study(study, recipe), study.resources.synthesis_shards)


def in_shards(cells: Sequence[Cell], shards_per_cell: int | None) -> list[Cell]:
    """Return the cells with cells for the shards of each synthetic set before it; None leaves them as they are."""
    spread: list[Cell] = []
    for cell in cells:
        if cell.stage == "synthetic" and shards_per_cell is not None:
            parts = _parts(cell, shards_per_cell)
            spread += [*parts, replace(cell, after=tuple(part.folder for part in parts))]
        else:
            spread.append(cell)
    return spread


def _parts(cell: Cell, shards_per_cell: int) -> list[Cell]:
    shards = -(-int(cell.details["count"]) // SHARD_PATCHES)
    if shards <= shards_per_cell:
        return []
    parts = []
    for first in range(0, shards, shards_per_cell):
        end = min(first + shards_per_cell, shards)
        settings = cell.settings | {"set": cell.folder, "first": first, "end": end}
        name = f"shards {first}-{end - 1} of {cell.name}"
        parts.append(replace(cell, name=name, stage="shards", settings=settings))
    return parts
