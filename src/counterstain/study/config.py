"""STUDY.yaml: a cohort, the arms, how often they are repeated, and changes to a preset's recipe."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from counterstain.audit import NOVEL, JudgeConfig, JudgeFilterConfig
from counterstain.config import Config, build, merge, parse_overrides, read_yaml
from counterstain.data.phantom.styles import PhantomConfig
from counterstain.data.sampling import CopyPasteConfig
from counterstain.data.split import SplitConfig
from counterstain.data.stains import Stains, named_stains
from counterstain.errors import ConfigError, InputError
from counterstain.generators.methods import DEFAULT_METHODS, METHODS, Lazy, Training
from counterstain.recipe import Recipe, preset_settings, recipe_class
from counterstain.remote import RemoteFolder, place_of
from counterstain.study.arms import Arm, parse_arm
from counterstain.taxonomy import NameStr
from counterstain.training_config import LoggerName

JUDGE = Training(
    stage="judge",
    title="judge",
    config=JudgeConfig,
    train=Lazy("counterstain.audit.judge:train_judge"),
    version=2,
)


MOST_AMOUNT = 10  # in ``amounts``; larger ones are mostly meant as per cent


def trainings() -> dict[str, Training]:
    """Return the trainings of all methods, and the judge's, by their stage."""
    return METHODS.trainings | {JUDGE.stage: JUDGE}


def stages() -> tuple[str, ...]:
    """Return the stages of a study, in the order of the data."""
    return ("cohort", *trainings(), "shards", "synthetic", "segmenter", "evaluation", "hardness", "amount")


def lacking(recipe: Recipe, cells: Iterable[Any]) -> list[str]:
    """Return what cells that are to run will not find on this machine, a line per package or file of weights."""
    found = {cell.stage for cell in cells}
    lines: list[str] = []
    if "segmenter" in found and recipe.segmenter.encoder_weights not in {None, "imagenet"}:
        from counterstain.segmentation.model import encoder_patients  # imports torch

        try:
            encoder_patients(recipe.segmenter)
        except InputError as error:
            lines.append(f"segmenter.{error}")
    for stage, training in trainings().items():
        if stage in found:
            lines += training.missing(recipe.settings_of(training))
    return lines


def _one_of(known: Callable[[], Iterable[str]]) -> AfterValidator:
    def check(name: str) -> str:
        names = list(known())
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{meant}expected one of {', '.join(names)}")
        return name

    return AfterValidator(check)


Stage = Annotated[str, _one_of(stages)]
Folder = Annotated[str, BeforeValidator(lambda given: str(given) if isinstance(given, Path | RemoteFolder) else given)]


def _is_multiple(amount: float) -> float:
    if amount > MOST_AMOUNT:
        raise ValueError(
            f"{amount:g} is +{100 * amount:,.0f} % synthetic patches; 1.0 is +100 %: did you mean {amount / 100:g}? "
            f"More than {MOST_AMOUNT} times the dataset is written out, as in extra_arms: [METHOD+{100 * amount:.0f}]"
        )
    return amount


def _share_or_number(value: float) -> float:
    if value >= 1 and not value.is_integer():
        raise ValueError("expected a share below 1, or a whole number of patients")
    return value


def _parsed(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(parse_arm(name).name for name in names)


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
    stages: dict[Stage, StageResources] = Field(default_factory=dict)
    """What a cell of a stage asks a Ray cluster for, for example ``spade: {cpus: 4, gpus: 1}``."""

    def of(self, stage: str) -> tuple[float, float]:
        """Return the CPUs and GPUs that a cell of a stage asks for."""
        asked = self.stages.get(stage, StageResources())
        return float(self.threads or 1) if asked.cpus is None else asked.cpus, asked.gpus


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
    layouts: CopyPasteConfig = CopyPasteConfig()
    """``+layouts``: which instances are moved into synthetic patches, and how many."""
    cross_fit: Annotated[int, Field(ge=2)] = 3
    """``+hard``, ``METHOD+auto``: parts of the training patients, each tested by networks trained on the others; for
    ``METHOD+auto`` its generators are trained anew for each."""
    filtered: JudgeFilterConfig = JudgeFilterConfig()
    """``+filtered``: which synthetic patches a judge lets pass, the same for all methods."""
    novel: Annotated[float, Field(gt=0, lt=0.5)] = NOVEL
    """``+novel``: an image is drawn again that is nearer to a training patient's tissue than all but this share of real
    patches are to that of other patients."""
    pretrain: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """``+pretrain``: share of the steps on synthetic patches."""
    masked: Annotated[float, Field(gt=0)] = 1.25
    """``+masked``: synthetic pixels are ignored on which the loss of the ``subtype`` arm of the same repeat is more
    than so many times its mean on real training pixels of the label."""
    relabelled: Annotated[float, Field(gt=0)] = 4.0
    """``+relabelled``: um from the border of a synthetic instance up to which labels may be corrected."""


def segmenter_changes(arm: Arm, variants: VariantsConfig) -> Mapping[str, Any]:
    """Return what an arm changes in the segmenter's settings, to be merged over them."""
    of_variant: dict[str, dict[str, Any]] = {
        "weighted": {"subtype_weighting": variants.weighted},
        "stain": {"sampling": {"stain_jitter": variants.stain, "stains": variants.stains}},
        "mixup": {"mixup_alpha": variants.mixup},
        "copypaste": {"copy_paste": variants.copypaste.model_dump(mode="json")},
        "pretrain": {"mixing": {"schedule": "pretrain", "pretrain_share": variants.pretrain}},
        "anneal": {"mixing": {"schedule": "anneal"}},
    }
    changes = (of_variant.get(variant, {}) for variant in arm.variants)
    return reduce(merge, changes, {"sampling": {"mode": arm.mode}})


class CohortSource(Config):
    """Where a study's cohort comes from: a folder, or the phantom."""

    path: Folder | None = None
    """A cohort, in a folder or at a URL; it needs a split unless ``folds`` is set. A relative path starts at
    the study's file."""
    phantom: PhantomConfig | None = None
    """Or make a phantom."""
    split: SplitConfig = SplitConfig()
    """How a phantom's patients are dealt out."""
    folds: Annotated[int, Field(ge=2)] | Literal["leave_one_out"] | None = None
    """Cross-validate: deal the patients, whatever their split, into so many folds, stratified by score, each tested by
    networks trained on the others. ``leave_one_out``: each patient is a fold."""
    validation: Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_share_or_number)] = 0.2
    """Validation patients of each fold, out of those that it does not test: a share of all patients, or a number."""
    merge: Annotated[
        NameStr | dict[NameStr, tuple[NameStr, ...]] | None, Field(exclude_if=lambda given: given is None)
    ] = None
    """Put subtypes together for everything but the final counts: a merge of the taxonomy (HER2 has ``stained``), or
    new subtype -> names, the others staying as they are. Results hold the original subtypes as well (``unmerged/``)."""
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
        if self.folds is not None and self.split != SplitConfig():
            raise ValueError("split and folds exclude each other; take one out")
        if self.folds is None and self.validation != CohortSource.model_fields["validation"].default:
            raise ValueError("validation is for folds; give their number, or take it out")
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
    methods: tuple[Annotated[str, _one_of(lambda: METHODS)], ...] = DEFAULT_METHODS
    """How synthetic images are drawn; ``oracle`` is possible on the phantom."""
    amounts: tuple[Annotated[float, Field(gt=0), AfterValidator(_is_multiple)], ...] = (0.5, 1.0, 2.0, 4.0)
    """Synthetic patches as multiples of the dataset size; 1.0 is +100 %."""
    extra_arms: Annotated[tuple[str, ...], AfterValidator(_parsed)] = ()
    """More arms, by name, for example ``subtype+weighted``; docs/studies.md lists them."""
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

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if "subtype" not in self.baselines:
            raise ValueError("baselines: subtype must be among them, all arms are held against it")
        for arm in self.arms:
            if arm.ceiling and (self.cohort.phantom is None or self.cohort.merge is not None):
                needed = "set cohort.phantom, without cohort.merge"
                raise ValueError(f"methods: the {arm.method} draws phantoms only; take it out, or {needed}")
        if any(arm.auto for arm in self.arms) and len(self.amounts) < 2:
            raise ValueError("amounts: give at least two that METHOD+auto can choose from, for example [0.5, 1.0]")
        if self.methods and not self.amounts:
            raise ValueError("amounts: give at least one, for example [1.0]")
        for field in ("methods", "amounts", "baselines"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field}: each at most once")
        names = [arm.name for arm in self.arms]
        for name in self.extra_arms:
            if names.count(name) > 1:
                raise ValueError(f"extra_arms: {name} is an arm already; take it out")
        return self

    @property
    def arms(self) -> list[Arm]:
        """The arms: baselines, then each method with each amount, then the extra ones."""
        return [
            *(Arm(mode=mode) for mode in self.baselines),
            *(Arm(method=method, amount=amount) for method in self.methods for amount in self.amounts),
            *map(parse_arm, self.extra_arms),
        ]

    def stains(self, recipe: Recipe) -> list[tuple[str, str]]:
        """Return the settings in use that name the stain beside haematoxylin, each with what it says."""
        stages = {"segmenter", *(t.stage for arm in self.arms if arm.method for t in METHODS[arm.method].trainings)}
        named = list(named_stains({"recipe": recipe.model_dump(mode="json", include=stages)}))
        varied = any("stain" in arm.variants for arm in self.arms)
        return [*named, *([("variants.stains", self.variants.stains)] if varied else [])]

    def resolved_recipe(self, source: str | Path) -> Recipe:
        """Return the preset with the study's changes."""
        return build(recipe_class(), merge(preset_settings(self.preset), self.recipe), f"{source}: recipe")


def load_study(file: str | Path, overrides: Iterable[str] = ()) -> StudyConfig:
    """Read STUDY.yaml; ``--set`` assignments go over it, ``--set recipe.spade.…`` reaches the recipe.

    Raises ConfigError where the file is missing or something in it is wrong.
    """
    file, changes = Path(file), parse_overrides([overrides] if isinstance(overrides, str) else overrides)
    for key in changes:
        if key in Recipe.model_fields and key not in StudyConfig.model_fields:
            raise ConfigError(f"--set {key}: belongs to the recipe of the study; write --set recipe.{key}")
    content = merge(read_yaml(file), changes)
    study = build(StudyConfig, content, file)
    study.resolved_recipe(file)  # an error in the recipe is reported now, not hours later
    path = study.cohort.path
    if path is None or isinstance(place := place_of(path), RemoteFolder) or place.is_absolute():
        return study
    found = str((file.parent / place).resolve())  # so that the copy in the study's folder finds it too
    return study.model_copy(update={"cohort": study.cohort.model_copy(update={"path": found})})
