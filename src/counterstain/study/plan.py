"""A study as a list of cells: what each makes, and from what."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from counterstain.config import merge
from counterstain.data.cohort import Cohort
from counterstain.data.composition import untrained_subtypes
from counterstain.data.patch_set import SHARD_PATCHES
from counterstain.data.phantom.styles import PhantomConfig
from counterstain.data.review import rejected_in
from counterstain.data.sampling import check_patch_size
from counterstain.data.split import folds_of, split_into_folds
from counterstain.data.stains import check_stains
from counterstain.errors import CounterstainWarning, InputError
from counterstain.generators.methods import METHODS, Training
from counterstain.recipe import Recipe
from counterstain.seeding import derive
from counterstain.segmentation.mixing import synthetic_count
from counterstain.study.arms import Arm
from counterstain.study.cells import (
    FOLD,
    PARTS,
    Cell,
    cohort_cell,
    cohort_with_fewer,
    merged_cohort,
    trained_and_scored,
)
from counterstain.study.config import JUDGE, StudyConfig, segmenter_changes
from counterstain.taxonomy import Taxonomy
from counterstain.training_config import identity_of


def plan_study(study: StudyConfig, recipe: Recipe, root: Path | None = None) -> list[Cell]:
    """Return the cells of a study, each after all that it needs; reviews of its sets are looked for in ``root``.

    Raises ConfigError where a network cannot work on patches of the recipe's size; InputError where the cohort is
    missing, has no training, validation or test part, or regions smaller than a patch.
    """
    arms = study.arms
    recipe.segmenter.check_size(recipe.size_px)
    for name in {arm.method: None for arm in arms if arm.method is not None}:
        METHODS[name].check(recipe)
    whole, folds = _cohorts(study, recipe)
    source, merge = folds or [whole], study.cohort.merge
    planners = [_Planner(study, recipe, merged_cohort(cell, merge), arms, root, unmerged=cell) for cell in source]
    cells = [whole, *folds, *(planner.cohort for planner in planners)]
    for planner in planners:
        cells += planner.fit_cohorts
    for planner in planners:
        cells += planner.drawn
    for repeat in range(study.repeats):
        for planner in planners:
            for arm in arms:
                cells += planner.trained_and_scored(arm, repeat)
    once = {cell.folder: cell for cell in reversed(cells)}  # of equal cells the first
    return [_tracked(cell, study, recipe) for cell in cells if once.pop(cell.folder, None) is not None]


def plan_arm(
    study: StudyConfig, recipe: Recipe, cohort: Cell, arm: Arm, *, repeat: int, parts: Sequence[str]
) -> list[Cell]:
    """Return the cells of one training of an arm on a cohort, after all that it needs; its evaluation is the last."""
    planner = _Planner(study, recipe, cohort, [Arm(), arm], parts=parts)
    critic = planner.trained_and_scored(Arm(), repeat)[:1] if "masked" in arm.variants else []
    return [*planner.fit_cohorts, *planner.drawn, *critic, *planner.trained_and_scored(arm, repeat)]


def _tracked(cell: Cell, study: StudyConfig, recipe: Recipe) -> Cell:
    """Return a training with the logger and the workers that it is to use, which are no part of its name."""
    training = getattr(getattr(recipe, cell.stage, None), "training", None)
    if training is None:
        return cell
    given = {"logger": training.logger or study.resources.logger, "workers": training.workers}
    return replace(cell, details=cell.details | {key: value for key, value in given.items() if value is not None})


def _cohorts(study: StudyConfig, recipe: Recipe) -> tuple[Cell, list[Cell]]:
    """Return the cell of a study's cohort and those of its folds, which differ from it by their split."""
    source, size_px = study.cohort, recipe.size_px
    fewer = source.model_dump(include={"train_patients", "train_patients_seed"}) if source.train_patients else {}
    cohort = None if source.path is None else Cohort.open(source.path)
    if source.merge is not None:
        (Taxonomy.named("her2") if cohort is None else cohort.taxonomy).merged(source.merge)
    if cohort is not None:
        check_stains(cohort, study.stains(recipe))
    if source.folds is not None:
        return _in_folds(study, cohort, fewer, size_px)
    if cohort is None:
        settings = source.model_dump(mode="json", include={"phantom", "split"})
        return Cell(name="cohort", stage="cohort", settings=settings | fewer), []
    for part in PARTS:
        cohort.positions(part)
    check_patch_size(cohort, cohort.regions.iloc[cohort.positions("train")], size_px)
    if source.train_patients is not None:
        return cohort_with_fewer(cohort, source.train_patients, source.train_patients_seed), []
    return cohort_cell(cohort), []


def _in_folds(
    study: StudyConfig, cohort: Cohort | None, fewer: dict[str, Any], size_px: int
) -> tuple[Cell, list[Cell]]:
    source, phantom = study.cohort, study.cohort.phantom or PhantomConfig()
    patients = phantom.slides if cohort is None else int(cohort.regions["patient"].nunique())
    number = source.folds if isinstance(source.folds, int) else patients
    dealt = (number, source.validation, derive(study.seed, "folds"))
    if cohort is None:
        whole = Cell(name="cohort", stage="cohort", settings=source.model_dump(mode="json", include={"phantom"}))
        splits = split_into_folds({str(patient): None for patient in range(patients)}, *dealt)
    else:
        check_patch_size(cohort, cohort.regions, size_px)
        whole, splits = cohort_cell(cohort), folds_of(cohort, *dealt)
        for problem in untrained_subtypes(cohort, splits):
            warnings.warn(problem, CounterstainWarning, stacklevel=2)
    trained_on = min(list(split.values()).count("train") for split in splits)
    if source.train_patients is not None and source.train_patients > trained_on:
        raise InputError(
            f"{study.name}: {source.train_patients} training patients are asked for, a fold has {trained_on}; give "
            f"{trained_on} at most"
        )
    inputs, details = {"whole": whole.folder}, {"whole_path": whole.details["path"]} if whole.details else {}
    cells = []
    for fold in range(1, number + 1):
        settings = dict(zip(("folds", "validation", "seed"), dealt, strict=True)) | fewer | {"fold": fold}
        name = f"cohort{_of_fold(fold)}"
        cells.append(Cell(name=name, stage="cohort", settings=settings, inputs=inputs, details=details, fold=fold))
    return whole, cells


def _of_fold(fold: int, fit: int = 0) -> str:
    return (f"{FOLD}{fold}" if fold else "") + (f", cross-fit {fit}" if fit else "")


@dataclass(frozen=True)
class _Planner:
    study: StudyConfig
    recipe: Recipe
    cohort: Cell
    arms: Sequence[Arm]
    root: Path | None = None  # folder of all cells
    parts: Sequence[str] = PARTS  # that segmenters are evaluated on
    unmerged: Cell | None = None  # the same cohort with its original subtypes: segmenters are evaluated on it

    @cached_property
    def _segmenter_configs(self) -> dict[str, dict[str, Any]]:
        plain, variants = identity_of(self.recipe.segmenter), self.study.variants
        return {arm.name: merge(plain, segmenter_changes(arm, variants)) for arm in self.arms}

    @property
    def fold(self) -> int:
        """The fold of its cohort, 0 without any."""
        return self.cohort.fold

    @cached_property
    def _chains(self) -> dict[str, list[Cell]]:
        """Name of a synthetic set -> the cells that it needs, its own last."""
        chains: dict[str, list[Cell]] = {}
        for arm in self.arms:
            if arm.set_name is not None and arm.set_name not in chains:
                chains[arm.set_name] = self._synthetic(arm)
        return chains

    @property
    def drawn(self) -> list[Cell]:
        """The cells of all synthetic sets, of what they need, and of what chooses amounts."""
        return [cell for chain in (*self._chains.values(), *self._amounts.values()) for cell in chain]

    @property
    def fit_cohorts(self) -> list[Cell]:
        """The cohorts of cross-fitting: made first, so that too few patients are said before anything is trained."""
        if not any(arm.auto or "hard" in arm.variants for arm in self.arms):
            return []
        return [cell for planner in self._fits for cell in (planner.cohort, *planner.fit_cohorts)]

    @cached_property
    def _fits(self) -> list[_Planner]:
        """For cross-fitting: planners of cohorts that each hold out a part of the training patients."""
        source, number, seed = self.cohort, self.study.variants.cross_fit, self._seed("cross-fit")
        cohorts = [
            Cell(
                name=f"cohort{_of_fold(self.fold, fit)}",
                stage="cohort",
                settings={"cross_fit": number, "fit": fit, "seed": seed},
                inputs={"whole": source.folder},
                details={"whole_path": source.details["path"]} if "path" in source.details else {},
                fold=self.fold,
                fit=fit,
            )
            for fit in range(1, number + 1)
        ]
        arms = [Arm(), *(tried for arm in self.arms if arm.auto for tried in self._tried(arm))]
        return [_Planner(self.study, self.recipe, cohort, arms) for cohort in cohorts]

    def _tried(self, arm: Arm) -> list[Arm]:
        return [replace(arm, auto=False, amount=amount, name="") for amount in sorted(self.study.amounts)]

    def _fitted(self, arms: Iterable[Arm]) -> tuple[list[Cell], dict[str, str]]:
        """Return what tests arms by cross-fitting, and its evaluations: role -> folder."""
        cells: list[Cell] = []
        roles = {}
        for planner in self._fits:
            cells.append(planner.cohort)
            if any("masked" in arm.variants for arm in arms):
                cells += planner.trained_and_scored(Arm(), 0)
            for arm in arms:
                cells += [] if arm.set_name is None else planner._chains[arm.set_name]  # noqa: SLF001 - of its own kind
                cells += planner.trained_and_scored(arm, 0)
                roles[f"{arm.name}, fit {planner.cohort.fit}"] = cells[-1].folder
        return [replace(cell, arm="", repeat=-1, set_name="", fit=cell.fit or 1) for cell in cells], roles

    @cached_property
    def _hardness(self) -> list[Cell]:
        cells, roles = self._fitted([Arm()])
        keep = {"keep": list(self.recipe.synthesis.relabel.keep)}
        return [*cells, self._cell("hardness", "hardness", "cross-fit", keep, **roles)]

    @cached_property
    def _amounts(self) -> dict[str, list[Cell]]:
        """Name of an arm -> the cells that choose its amount, the last one that does."""
        chains = {}
        for arm in [arm for arm in self.arms if arm.auto]:
            tried = self._tried(arm)
            cells, roles = self._fitted(tried)
            settings = {"tried": {one.name: one.amount for one in tried}}
            chosen = self._cell(f"amount of {arm.name}", "amount", "cross-fit", settings, **roles)
            chains[arm.name] = [*cells, replace(chosen, arm=arm.name)]
        return chains

    def _most(self, arm: Arm) -> float:
        return max(self.study.amounts) if arm.auto else arm.amount

    def _synthetic(self, arm: Arm) -> list[Cell]:
        method = METHODS[str(arm.method)]
        made: dict[str, Cell] = {}
        for training in method.trainings:
            made[training.stage] = self._training(training, "generators", made)
        chain = list(made.values())
        settings: dict[str, Any] = {"method": method.name, "config": self._synthesis(arm)}
        settings |= self.recipe.drawing(method)
        inputs = {"generator": chain[-1].folder} if chain else {}
        if "filtered" in arm.variants:
            judge = self._training(JUDGE, "judge", {})
            chain.append(judge)
            inputs["judge"] = judge.folder
            settings["filter"] = self.study.variants.filtered.model_dump(mode="json")
        if "novel" in arm.variants:
            settings["novel"] = self.study.variants.novel
        if "hard" in arm.variants:
            chain += self._hardness
            inputs["hardness"] = chain[-1].folder
        amount = max(self._most(other) for other in self.arms if other.set_name == arm.set_name)
        count = synthetic_count(amount, self.recipe.segmenter.mixing)
        cell = self._cell(f"synthetic {arm.set_name}", "synthetic", "synthetic", settings, **inputs)
        cell = replace(cell, details={"count": count}, set_name=arm.set_name or "")
        parts = _parts(cell, self.study.resources.synthesis_shards)
        return [*chain, *parts, replace(cell, after=tuple(part.folder for part in parts))]

    def _synthesis(self, arm: Arm) -> dict[str, Any]:
        config = self.recipe.synthesis.model_dump(mode="json")
        if "layouts" in arm.variants:
            given = self.study.variants.layouts.model_dump(mode="json")
            config["layouts"] = given | {"relabel": "kept" not in arm.variants}
        return config

    def trained_and_scored(self, arm: Arm, repeat: int) -> list[Cell]:
        """Return the cells of one training of an arm: the segmenter and its evaluation."""
        inputs = {"cohort": self.cohort.folder}
        if arm.set_name is not None:
            inputs["synthetic"] = self._chains[arm.set_name][-1].folder
        settings = {
            "config": self._segmenter_configs[arm.name],
            "size_px": self.recipe.size_px,
            # The same for all arms: equal initialisation and order of the data.
            "seed": self._seed("repeat", repeat),
            "amount": self._most(arm),
        } | ({"share": 1.0} if arm.only else {})
        if arm.auto:
            inputs["amount"] = self._amounts[arm.name][-1].folder
        if "masked" in arm.variants:
            inputs["critic"] = self.trained_and_scored(Arm(), repeat)[0].folder
            settings["ignore_above"] = self.study.variants.masked
        if "reviewed" in arm.variants:
            count = synthetic_count(arm.amount, self.recipe.segmenter.mixing)
            settings["left_out"] = rejected_in(self.root / inputs["synthetic"], count) if self.root else []
        if "relabelled" in arm.variants:
            settings["border_um"] = self.study.variants.relabelled
        name = f"{arm.name} #{repeat}{self._suffix}"
        whose: dict[str, Any] = {"arm": arm.name, "repeat": repeat, "fold": self.fold, "fit": self.cohort.fit}
        segmenter, scored = trained_and_scored(name, settings, inputs, self.parts, **whose)
        if self.unmerged is not None and self.unmerged.folder != self.cohort.folder:
            seen = scored.inputs | {"cohort": self.unmerged.folder}
            scored = replace(scored, inputs=seen, settings=scored.settings | {"merge": self.study.cohort.merge})
        return [segmenter, scored]

    @property
    def _suffix(self) -> str:
        return _of_fold(self.fold, self.cohort.fit)

    def _training(self, training: Training, seeded_by: str, made: Mapping[str, Cell]) -> Cell:
        # How images are drawn is a matter of the synthetic set, not of the network.
        config = identity_of(self.recipe.settings_of(training))
        drawing = {name: config.pop(name) for name in training.drawing}
        needs = {stage: made[stage].folder for stage in training.needs}
        cell = self._cell(training.title, training.stage, seeded_by, {"config": config}, **needs)
        return replace(cell, details={"drawing": drawing}) if drawing else cell

    def _cell(self, name: str, stage: str, seeded_by: str, settings: dict[str, Any], **inputs: str) -> Cell:
        settings = {"size_px": self.recipe.size_px, "seed": self._seed(seeded_by)} | settings
        needs = {"cohort": self.cohort.folder} | inputs
        return Cell(
            name=name + self._suffix, stage=stage, settings=settings, inputs=needs, fold=self.fold, fit=self.cohort.fit
        )

    def _seed(self, *keys: int | str) -> int:
        return derive(self.study.seed, *keys, *(("fold", self.fold) if self.fold else ()))


def _parts(cell: Cell, shards_per_cell: int | None) -> list[Cell]:
    """Return cells that draw the shards of a synthetic set, whose own cell then finds them all there.

    How a set is cut changes neither its name nor its content: every patch follows from the set's seed and its number.
    """
    shards = -(-cell.count // SHARD_PATCHES)
    if shards_per_cell is None or shards <= shards_per_cell:
        return []
    parts = []
    for first in range(0, shards, shards_per_cell):
        end = min(first + shards_per_cell, shards)
        settings = cell.settings | {"set": cell.folder, "first": first, "end": end}
        name = f"shards {first}-{end - 1} of {cell.name}"
        parts.append(replace(cell, name=name, stage="shards", settings=settings))
    return parts
