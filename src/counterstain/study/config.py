"""STUDY.yaml: a cohort, the arms, how often they are repeated, and changes to a preset's recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from counterstain.audit.judge_config import JudgeConfig, JudgeFilterConfig
from counterstain.config import Config, build, merge, parse_overrides, read_yaml
from counterstain.data.phantom.styles import PhantomConfig
from counterstain.data.sampling import CopyPasteConfig
from counterstain.data.split import SplitConfig
from counterstain.data.stains import Stains
from counterstain.errors import ConfigError
from counterstain.generators.methods import DEFAULT_METHODS, METHODS, Lazy, Training
from counterstain.recipe import Recipe, recipe_from
from counterstain.study.arms import Arm, parse_arm
from counterstain.training_config import LoggerName

JUDGE = Training(
    stage="judge",
    title="judge",
    config=JudgeConfig,
    train=Lazy("counterstain.audit.judge:train_judge"),
    version=2,
)


def trainings() -> dict[str, Training]:
    """Return the trainings of all methods, and the judge's, by their stage."""
    return METHODS.trainings | {JUDGE.stage: JUDGE}


def stages() -> tuple[str, ...]:
    """Return the stages of a study, in the order of the data."""
    return ("cohort", *trainings(), "shards", "synthetic", "segmenter", "evaluation")


def _known_stage(name: str) -> str:
    if name not in stages():
        raise ValueError(f"expected one of {', '.join(stages())}")
    return name


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"expected one of {', '.join(METHODS)}")
    return name


class StageResources(Config):
    """What one cell of a stage asks a cluster for."""

    cpus: Annotated[float, Field(gt=0)] | None = None
    """Processors; as many as threads if not given."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """Graphics processors; 0.5 lets two cells share one."""


class Resources(Config):
    """What cells may use, none of it part of their names.

    Results follow from the threads, not from how many cells run at once, nor where.
    """

    threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of each cell: sums round differently for another number of them. If not given: all that torch finds
    where cells run one after another in one process, otherwise 1."""
    retries: Annotated[int, Field(ge=0, le=100)] = 2
    """How often a cell starts again whose process or machine was lost."""
    synthesis_shards: Annotated[int, Field(ge=1)] | None = None
    """Shards of 64 patches that one cell draws, so that several draw one set; one cell draws all if not given."""
    logger: LoggerName | None = None
    """Where the curves of all trainings go beside TensorBoard and CSV: ``mlflow`` or ``wandb``."""
    stages: dict[Annotated[str, AfterValidator(_known_stage)], StageResources] = Field(default_factory=dict)
    """What a cell of a stage asks a Ray cluster for, for example ``spade: {cpus: 4, gpus: 1}``."""

    def cpus(self, stage: str) -> float:
        """Return the processors that a cell of a stage asks for."""
        asked = self.stages.get(stage, StageResources()).cpus
        return float(self.threads or 1) if asked is None else asked

    def gpus(self, stage: str) -> float:
        """Return the graphics processors that a cell of a stage asks for."""
        return self.stages.get(stage, StageResources()).gpus


class VariantsConfig(Config):
    """How strong the variants of arms are; changing one renames only the cells of arms that have it."""

    weighted: Annotated[float, Field(gt=0, le=1)] = 1.0
    """``+weighted``: power of the inverse frequency of a subtype's pixels."""
    stain: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """``+stain``: standard deviation of the factor and of the offset of each stain's optical density."""
    stains: Stains = "dab"
    """``+stain``: the stains that are jittered."""
    mixup: Annotated[float, Field(gt=0)] = 0.4
    """``+mixup``: alpha of the Beta distribution from which shares are drawn."""
    copypaste: CopyPasteConfig = CopyPasteConfig()
    """``+copypaste``: what is pasted, and how much."""
    filtered: JudgeFilterConfig = JudgeFilterConfig()
    """``+filtered``: which synthetic patches a judge lets pass, the same for all methods."""
    pretrain: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """``+pretrain``: share of the steps on synthetic patches."""


def segmenter_changes(arm: Arm, variants: VariantsConfig) -> dict[str, Any]:
    """Return what an arm changes in the segmenter's settings, to be merged over them."""
    sampling: dict[str, Any] = {"mode": arm.mode}
    changes: dict[str, Any] = {"sampling": sampling}
    if "weighted" in arm.variants:
        changes["subtype_weighting"] = variants.weighted
    if "stain" in arm.variants:
        sampling |= {"stain_jitter": variants.stain, "stains": variants.stains}
    if "mixup" in arm.variants:
        changes["mixup_alpha"] = variants.mixup
    if "copypaste" in arm.variants:
        changes["copy_paste"] = variants.copypaste.model_dump(mode="json")
    if "pretrain" in arm.variants:
        changes["mixing"] = {"schedule": "pretrain", "pretrain_share": variants.pretrain}
    if "anneal" in arm.variants:
        changes["mixing"] = {"schedule": "anneal"}
    return changes


class CohortSource(Config):
    """Where a study's cohort comes from: a folder, or the phantom."""

    path: Path | None = None
    """A cohort that is split already; a relative path starts at the study's file."""
    phantom: PhantomConfig | None = None
    """Or make a phantom."""
    split: SplitConfig = SplitConfig()
    """How a phantom's patients are dealt out."""
    train_patients: Annotated[int, Field(ge=1)] | None = None
    """Train on so many patients of the training part, chosen by score; a larger choice holds a smaller one."""
    train_patients_seed: int = 0
    """Another seed chooses other patients."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.path is None) == (self.phantom is None):
            raise ValueError("give either path (a cohort's folder) or phantom (its settings)")
        if self.path is not None and self.split != SplitConfig():  # which a study's own copy of its settings has
            raise ValueError("split is for phantoms; split a cohort with 'counterstain split'")
        return self


class StudyConfig(Config):
    """A study: arms x repeats on one cohort.

    Examples
    --------
    >>> study = StudyConfig(name="her2", cohort={"path": "cohort"}, methods=("spade",), amounts=(0.5,))
    >>> study.preset
    'best'
    """

    name: Annotated[str, Field(min_length=1, max_length=80)]
    """Shown on the report; the identity of the study's folder."""
    preset: Literal["paper", "best", "demo"] = "best"
    """The recipe to start from."""
    cohort: CohortSource
    """The tissue."""
    baselines: tuple[Literal["tumor", "subtype"], ...] = ("tumor", "subtype")
    """Arms without synthetic patches; ``subtype`` is the reference and always runs."""
    methods: tuple[Annotated[str, AfterValidator(_known_method)], ...] = DEFAULT_METHODS
    """How synthetic images are drawn; ``oracle`` is possible on the phantom."""
    amounts: tuple[Annotated[float, Field(gt=0, le=100)], ...] = (0.5, 1.0, 2.0, 4.0)
    """Synthetic patches as multiples of the dataset size; 1.0 is +100 %."""
    extra_arms: tuple[str, ...] = ()
    """More arms, by name, for example ``subtype+weighted``; :mod:`counterstain.study.arms` says which there are."""
    variants: VariantsConfig = VariantsConfig()
    """How strong the variants of arms are."""
    repeats: Annotated[int, Field(ge=1, le=1000)] = 5
    """Trainings of each arm, with other seeds."""
    seed: int = 0
    """All seeds of the study derive from it."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Changes to the preset's recipe."""
    gallery: Annotated[int, Field(ge=0, le=1000)] = 48
    """Patches of each synthetic set that the report shows in its gallery."""
    resources: Resources = Resources()
    """What cells may use; the results do not depend on it, but for ``threads``."""

    @field_validator("extra_arms")
    @classmethod
    def _known_arms(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            parse_arm(name)
        return names

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if "subtype" not in self.baselines:
            raise ValueError("baselines: subtype must be among them, all arms are held against it")
        ceilings = [arm.method for arm in self.arms if arm.method is not None and METHODS[arm.method].ceiling]
        if ceilings and self.cohort.phantom is None:
            raise ValueError(f"methods: the {ceilings[0]} draws phantoms only; take it out, or set cohort.phantom")
        if self.methods and not self.amounts:
            raise ValueError("amounts: give at least one, for example [1.0]")
        for field in ("methods", "amounts", "baselines"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field}: each at most once")
        names = [arm.name for arm in self.arms]
        twice = [name for name in self.extra_arms if names.count(name) > 1]
        if twice:
            raise ValueError(f"extra_arms: {twice[0]} is an arm already; take it out")
        return self

    @property
    def arms(self) -> list[Arm]:
        """The arms: baselines, then each method with each amount, then the extra ones."""
        return [
            *(Arm.of(mode=mode) for mode in self.baselines),
            *(Arm.of(method=method, amount=amount) for method in self.methods for amount in self.amounts),
            *(parse_arm(name) for name in self.extra_arms),
        ]

    def resolved_recipe(self, source: str | Path) -> Recipe:
        """Return the preset with the study's changes."""
        return recipe_from(self.preset, self.recipe, f"{source}: recipe")


def load_study(file: Path, overrides: tuple[str, ...] | list[str] = ()) -> StudyConfig:
    """Read STUDY.yaml; ``--set`` assignments go over it, ``--set recipe.spade.…`` reaches the recipe.

    Raises
    ------
    ConfigError
        The file is missing or something in it is wrong.
    """
    changes = parse_overrides(overrides)
    for key in changes:
        if key in Recipe.model_fields and key not in StudyConfig.model_fields:
            raise ConfigError(f"--set {key}: belongs to the recipe of the study; write --set recipe.{key}")
    content = merge(read_yaml(file), changes)
    study = build(StudyConfig, content, file)
    study.resolved_recipe(file)  # wrong settings of the recipe are met here, not hours later
    path = study.cohort.path
    if path is None or path.is_absolute():
        return study
    found = (file.parent / path).resolve()  # so that the copy in the study's folder finds it too
    return study.model_copy(update={"cohort": study.cohort.model_copy(update={"path": found})})
