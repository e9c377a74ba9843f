"""A cell: one piece of work of a study, and a name that follows from all that determines it.

A cell's folder is its stage and a hash of its settings and of its inputs' folders. Changing one number therefore
changes the names of the cells that depend on it, and of no others; finished cells are found again by their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from counterstain.data.cohort import Cohort
from counterstain.data.split import training_patients
from counterstain.storage import fingerprint
from counterstain.study.config import trainings
from counterstain.taxonomy import Merge

CELLS = "cells"  # folder of all cells in that of a study
EXTERNAL = "external"  # folder of its tests on other cohorts, and the split of their results
# Raise a stage's number when its code changes what it makes: finished cells of the old code are then made anew.
# Trainings of generators have theirs in their entry of the registry.
STAGE_VERSIONS = {
    **dict.fromkeys(("cohort", "shards", "synthetic", "segmenter", "evaluation"), 1),
    **dict.fromkeys(("hardness", "amount"), 1),
}
REFERENCE = "subtype"
FOLD = ", fold "  # in the name of a cell, before the number of its fold
PARTS = ("val", "test")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One piece of work of a study."""

    name: str  # as people read it
    stage: str
    settings: dict[str, Any]  # all that determines the result, besides the inputs
    inputs: dict[str, str] = field(default_factory=dict)  # role -> folder of another cell
    # What does not change the result: where a cohort lies, how long a set must at least be.
    details: dict[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()  # folders of cells that must be done before and do not change the result
    arm: str = ""  # name of the arm that is trained or evaluated
    repeat: int = -1
    set_name: str = ""  # name of the synthetic set that is drawn
    fold: int = 0  # of a cross-validation, from 1; 0 where it belongs to all of them, or there are none
    fit: int = 0  # of cross-fitting, from 1: what is made without a part of the training patients, to make a choice

    @property
    def needs(self) -> tuple[str, ...]:
        """Folders of all cells that must be done before."""
        return (*self.inputs.values(), *self.after)

    @property
    def count(self) -> int:
        """Patches that a synthetic set must have at least."""
        return int(self.details.get("count", 0))

    @cached_property
    def folder(self) -> str:
        """Name of the cell's folder."""
        version = STAGE_VERSIONS.get(self.stage) or trainings()[self.stage].version
        identity = [self.stage, version, self.settings, self.inputs]
        return f"{self.stage}-{fingerprint(identity)[:16]}"


def cohort_cell(cohort: Cohort) -> Cell:
    """Return the cell of a cohort that is used as it is, where it lies."""
    settings, details = {"fingerprint": cohort.fingerprint}, {"path": str(cohort.folder.resolve())}
    return Cell(name="cohort", stage="cohort", settings=settings, details=details)


def cohort_with_fewer(cohort: Cohort, train_patients: int, seed: int) -> Cell:
    """Return the cell of a cohort that trains on fewer patients.

    Raises InputError where the training part has fewer patients than that.
    """
    training_patients(cohort, train_patients)
    settings = {"whole": cohort.fingerprint, "train_patients": train_patients, "train_patients_seed": seed}
    details = {"whole_path": str(cohort.folder.resolve())}
    return Cell(
        name=f"cohort of {train_patients} training patients", stage="cohort", settings=settings, details=details
    )


def merged_cohort(cohort: Cell, merge: Merge | None) -> Cell:
    """Return the cell of a cohort with its subtypes put together; without a merge its own."""
    if merge is None:
        return cohort
    where = cohort.details.get("path") or cohort.details.get("whole_path")
    details = {"whole_path": where} if where else {}
    settings, inputs = {"merge": merge}, {"whole": cohort.folder}
    name = f"{cohort.name}, merged"
    return Cell(name=name, stage="cohort", settings=settings, inputs=inputs, details=details, fold=cohort.fold)


def trained_and_scored(
    name: str, settings: dict[str, Any], inputs: dict[str, str], parts: Sequence[str] = PARTS, **whose: Any
) -> list[Cell]:
    """Return the cells of a segmenter and of its evaluation on parts of its cohort, with its arm, repeat and fold."""
    segmenter = Cell(name=f"segmenter {name}", stage="segmenter", settings=settings, inputs=inputs, **whose)
    scored = {"cohort": inputs["cohort"], "segmenter": segmenter.folder}
    wanted = {"parts": list(parts)}
    return [segmenter, Cell(name=f"evaluation {name}", stage="evaluation", settings=wanted, inputs=scored, **whose)]
