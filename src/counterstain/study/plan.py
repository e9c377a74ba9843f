"""A study as a list of cells: what each makes, from what, and a name that follows from all that determines it.

A cell's folder is its stage and a hash of its settings and of its inputs' folders. Changing one number therefore
changes the names of the cells that depend on it, and of no others; finished cells are found again by their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from counterstain.config import merge
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import SHARD_PATCHES
from counterstain.data.sampling import check_patch_size
from counterstain.data.split import training_patients
from counterstain.generators.methods import METHODS, Method, Training
from counterstain.recipe import Recipe
from counterstain.seeding import derive
from counterstain.segmentation.mixing import synthetic_count
from counterstain.storage import fingerprint
from counterstain.study.arms import Arm
from counterstain.study.config import JUDGE, StudyConfig, segmenter_changes, trainings

# Raise a stage's number when its code changes what it makes: finished cells of the old code are then made anew.
# Trainings of generators have theirs in their entry of the registry.
STAGE_VERSIONS = {"cohort": 1, "shards": 1, "synthetic": 1, "segmenter": 1, "evaluation": 1}
REFERENCE = "subtype"
PARTS = ("val", "test")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One piece of work of a study."""

    name: str
    """As people read it."""
    stage: str
    settings: dict[str, Any]
    """All that determines the result, besides the inputs."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Role -> folder of another cell."""
    details: dict[str, Any] = field(default_factory=dict)
    """What does not change the result: where a cohort lies, how long a set must at least be."""
    after: tuple[str, ...] = ()
    """Folders of cells that must be done before and do not change the result."""
    arm: str = ""
    """Name of the arm that it belongs to."""
    repeat: int = -1
    set_name: str = ""
    """Name of the synthetic set that it draws."""

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


def plan_study(study: StudyConfig, recipe: Recipe) -> list[Cell]:
    """Return the cells of a study, each after its inputs.

    Raises
    ------
    ConfigError
        A network cannot work on patches of the recipe's size.
    InputError
        The cohort is missing, has no training, validation or test part, or regions smaller than a patch.
    """
    _check_sizes(study, recipe)
    planner = _Planner(study, recipe, _cohort(study, recipe.size_px))
    cells = [planner.cohort]
    arms = study.arms
    sets: dict[str | None, Cell | None] = {None: None}
    for arm in arms:
        if arm.method is not None and arm.set_name not in sets:
            chain = planner.synthetic(arm)
            cells += [cell for cell in chain if cell not in cells]
            sets[arm.set_name] = chain[-1]
    for repeat in range(study.repeats):
        for arm in arms:
            cells += planner.trained_and_scored(arm, repeat, sets[arm.set_name])
    return [_tracked(cell, study, recipe) for cell in cells]


def _check_sizes(study: StudyConfig, recipe: Recipe) -> None:
    """Raise ConfigError where a network of the study cannot work on patches of the recipe's size."""
    recipe.segmenter.check_size(recipe.size_px)
    for method in {arm.method: METHODS[arm.method] for arm in study.arms if arm.method is not None}.values():
        method.check(recipe)


def _tracked(cell: Cell, study: StudyConfig, recipe: Recipe) -> Cell:
    """Return a training with the logger that it is to use, which is no part of its name."""
    training = getattr(getattr(recipe, cell.stage, None), "training", None)
    if training is None:
        return cell
    logger = training.logger or study.resources.logger
    return replace(cell, details=cell.details | {"logger": logger}) if logger else cell


def cells_folder(run: Path) -> Path:
    """Return where a study keeps its cells."""
    return run / "cells"


def _cohort(study: StudyConfig, size_px: int) -> Cell:
    source = study.cohort
    if source.path is not None:
        cohort = Cohort.open(source.path)
        for part in PARTS:
            cohort.part(part)
        check_patch_size(cohort, cohort.regions.iloc[cohort.part("train")], size_px)
        if source.train_patients is None:
            settings: dict[str, Any] = {"fingerprint": cohort.fingerprint}
            return Cell(name="cohort", stage="cohort", settings=settings, details={"path": str(source.path.resolve())})
        return cohort_with_fewer(cohort, source.train_patients, source.train_patients_seed)
    assert source.phantom is not None
    settings = {"phantom": source.phantom.model_dump(mode="json"), "split": source.split.model_dump(mode="json")}
    if source.train_patients is not None:
        settings |= {"train_patients": source.train_patients, "train_patients_seed": source.train_patients_seed}
    return Cell(name="cohort", stage="cohort", settings=settings)


def cohort_with_fewer(cohort: Cohort, train_patients: int, seed: int) -> Cell:
    """Return the cell of a cohort that trains on fewer patients.

    Raises
    ------
    InputError
        The training part has fewer patients than that.
    """
    training_patients(cohort, train_patients)
    chosen = {"train_patients": train_patients, "train_patients_seed": seed}
    return Cell(
        name=f"cohort of {train_patients} training patients",
        stage="cohort",
        settings={"whole": cohort.fingerprint} | chosen,
        details={"whole_path": str(cohort.folder.resolve())},
    )


@dataclass(frozen=True)
class _Planner:
    study: StudyConfig
    recipe: Recipe
    cohort: Cell

    @cached_property
    def _segmenter_configs(self) -> dict[str, dict[str, Any]]:
        plain, variants = self.recipe.segmenter.model_dump(mode="json"), self.study.variants
        return {arm.name: merge(plain, segmenter_changes(arm, variants)) for arm in self.study.arms}

    def synthetic(self, arm: Arm) -> list[Cell]:
        """Return the cells that the synthetic set of an arm's method needs, the set itself last."""
        assert arm.method is not None
        assert arm.set_name is not None
        method = METHODS[arm.method]
        chain = self._generator(method)
        settings: dict[str, Any] = {"method": method.name, "config": self.recipe.synthesis.model_dump(mode="json")}
        settings |= self.recipe.drawing(method)
        inputs = {"generator": chain[-1].folder} if chain else {}
        if "filtered" in arm.variants:
            judge = self._training(JUDGE, "judge", {})
            chain.append(judge)
            inputs["judge"] = judge.folder
            settings["filter"] = self.study.variants.filtered.model_dump(mode="json")
        amount = max(other.amount for other in self.study.arms if other.set_name == arm.set_name)
        count = synthetic_count(amount, self.recipe.segmenter.mixing)
        cell = self._cell(f"synthetic {arm.set_name}", "synthetic", "synthetic", settings, **inputs)
        return [*chain, replace(cell, details={"count": count}, set_name=arm.set_name)]

    def trained_and_scored(self, arm: Arm, repeat: int, synthetic: Cell | None) -> list[Cell]:
        """Return the cells of one training of an arm: the segmenter and its evaluation."""
        inputs = {"cohort": self.cohort.folder} | ({"synthetic": synthetic.folder} if synthetic else {})
        segmenter = Cell(
            name=f"segmenter {arm.name} #{repeat}",
            stage="segmenter",
            settings={
                "config": self._segmenter_configs[arm.name],
                "size_px": self.recipe.size_px,
                # The same for all arms: equal initialisation and order of the data.
                "seed": derive(self.study.seed, "repeat", repeat),
                "amount": arm.amount,
            }
            | ({"share": 1.0} if arm.only else {}),
            inputs=inputs,
            arm=arm.name,
            repeat=repeat,
        )
        scored = Cell(
            name=f"evaluation {arm.name} #{repeat}",
            stage="evaluation",
            settings={"parts": list(PARTS)},
            inputs={"cohort": self.cohort.folder, "segmenter": segmenter.folder},
            arm=arm.name,
            repeat=repeat,
        )
        return [segmenter, scored]

    def _generator(self, method: Method) -> list[Cell]:
        made: dict[str, Cell] = {}
        for training in method.trainings:
            made[training.stage] = self._training(training, "generators", made)
        return list(made.values())

    def _training(self, training: Training, seeded_by: str, made: Mapping[str, Cell]) -> Cell:
        # How images are drawn is a matter of the synthetic set, not of the network.
        config = self.recipe.settings_of(training).model_dump(mode="json")
        drawing = {name: config.pop(name) for name in training.drawing}
        needs = {stage: made[stage].folder for stage in training.needs}
        cell = self._cell(training.title, training.stage, seeded_by, {"config": config}, **needs)
        return replace(cell, details={"drawing": drawing}) if drawing else cell

    def _cell(self, name: str, stage: str, seeded_by: str, settings: dict[str, Any], **inputs: str) -> Cell:
        common = {"size_px": self.recipe.size_px, "seed": derive(self.study.seed, seeded_by)}
        return Cell(name=name, stage=stage, settings=common | settings, inputs={"cohort": self.cohort.folder} | inputs)


# A synthetic set drawn by several cells, each its own shards; the set's cell then finds them all there.
#
# How a set is cut changes neither its name nor its content: every patch follows from the set's seed and its number.


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
