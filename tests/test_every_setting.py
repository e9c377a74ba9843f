"""Every setting of a study and its recipe reaches a cell of the plan, or is known to change nothing."""

from collections.abc import Iterator
from functools import reduce
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from counterstain.config import build, merge
from counterstain.errors import ConfigError
from counterstain.recipe import Recipe, preset_settings
from counterstain.study.config import StudyConfig
from counterstain.study.plan import plan_study

CHANGE_NOTHING = {
    "name": "is shown on the report",
    "gallery": "is what the report shows",
    "resources": "is where and how fast cells run",
    "recipe.distillation": "studies train no distilled network",
    "recipe.segmenter.sampling.mode": "an arm says where its patches are centred",
}
CHANGE_NO_RESULT = (".training.logger", ".training.workers")  # of any training
EVERYTHING = {
    "name": "s",
    "preset": "demo",
    "cohort": {"phantom": {"slides": 12}, "train_patients": 2},
    "methods": ["spade", "diffusion", "inpainting", "oracle"],
    "amounts": [1.0],
    "extra_arms": [
        "subtype+weighted", "subtype+stain", "subtype+mixup", "subtype+copypaste", "oracle+100+filtered",
        "oracle+100+novel", "oracle+100+pretrain", "oracle+100+masked", "oracle+100+relabelled",
        "oracle+100+layouts", "oracle+100+hard",
    ],
    "repeats": 1,
    "recipe": {"segmenter": {"encoder_depth": 5, "decoder_channels": None}},
}  # fmt: skip
ONLY_WITH: dict[str, dict[str, Any]] = {  # settings that others need
    "cohort.validation": {"cohort": {"folds": 3}},
    "cohort.merge": {"methods": ["spade"], "extra_arms": []},  # the oracle draws unmerged subtypes
}
SPECIAL: dict[str, list[Any]] = {  # where a value that fits cannot be guessed
    "baselines": [["subtype"]],
    "methods": [["spade"]],
    "extra_arms": [[]],
    "cohort.merge": ["stained"],
    "cohort.phantom.prevalence": [[0.25, 0.25, 0.25, 0.25]],
    "recipe.autoencoder.multipliers": [[1, 2, 4]],
    "recipe.segmenter.encoder_depth": [4],
    "recipe.segmenter.classes": ["subtypes"],
}


def leaves(model: type[BaseModel], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, field in model.model_fields.items():
        inner = nested(field.annotation)
        if inner is not None:
            yield from leaves(inner, (*at, name))
        else:
            yield (*at, name), field.annotation


def nested(annotation: Any) -> type[BaseModel] | None:
    parts = [part for part in (annotation, *get_args(annotation)) if isinstance(part, type)]
    return next((part for part in parts if issubclass(part, BaseModel)), None)


def others(annotation: Any, now: Any) -> Iterator[Any]:
    """Yield values that such a field may have, most likely valid ones first."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from others(parts[0], now)
    elif origin in {Union, UnionType}:
        for part in parts:
            yield from ([None] if part is type(None) else others(part, now))
    elif origin is Literal:
        yield from parts
    elif annotation is bool:
        yield not now
    elif annotation in {int, float}:
        known = now if isinstance(now, int | float) and not isinstance(now, bool) else 1
        yield from (known * 2, known + 1, known // 2 if annotation is int else known / 2, known - 1, 32, 64, 0.1, 0.5)
    elif annotation is str:
        yield from ("other", "resnet18", "tu-resnet18", "imagenet", "cpu")
    elif origin is tuple:
        values = list(now or ())
        yield from (values[:-1], values + values[-1:], [value * 2 for value in values])
        yield from ([value / 2 for value in values], ["LCIS/DCIS"], ["HER2 0"])
    elif origin is dict:
        yield {"HER2 0": 1.0}
    else:
        yield from ([2, 1], [1, 1, 1])


def value_at(content: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def plan(settings: dict[str, Any]) -> frozenset[str]:
    study = build(StudyConfig, settings, "study")
    cells = plan_study(study, study.resolved_recipe("study"))
    return frozenset(cell.folder for cell in cells if cell.stage != "shards")  # their number is a matter of speed


FIELDS = [(place, kind) for place, kind in leaves(StudyConfig) if place not in {("recipe",), ("cohort", "path")}]
FIELDS += [(("recipe", *place), kind) for place, kind in leaves(Recipe)]
RECIPE = build(Recipe, preset_settings("demo")).model_dump(mode="json")
RESOLVED = build(StudyConfig, EVERYTHING).model_dump(mode="json") | {"recipe": RECIPE}


@pytest.fixture(scope="module")
def before():
    return plan(EVERYTHING)


def silent(name: str) -> bool:
    return name.endswith(CHANGE_NO_RESULT) or any(
        name == known or name.startswith(f"{known}.") for known in CHANGE_NOTHING
    )


@pytest.mark.parametrize(("place", "kind"), FIELDS, ids=[".".join(place) for place, _ in FIELDS])
def test_another_value_of_a_setting_is_another_plan(before, place, kind):
    name, now = ".".join(place), value_at(RESOLVED, place)
    given, tried = merge(EVERYTHING, ONLY_WITH.get(name, {})), []
    if name in ONLY_WITH:
        before = plan(given)
    for value in SPECIAL.get(name) or others(kind, now):
        if value == now:
            continue
        change = reduce(lambda inner, key: {key: inner}, reversed(place), value)
        try:
            after = plan(merge(given, change))
        except ConfigError as error:
            tried.append(str(error))
            continue
        assert (after == before) is silent(name), f"{name}: {now!r} -> {value!r}"
        return
    if not silent(name):
        pytest.fail(f"no other value of {name} is valid: {now!r}; {tried}")


def test_the_workers_of_a_training_reach_its_cell():
    study = build(StudyConfig, merge(EVERYTHING, {"recipe": {"spade": {"training": {"workers": 3}}}}), "study")
    cells = plan_study(study, study.resolved_recipe("study"))
    workers = {cell.stage: cell.details["workers"] for cell in cells if "workers" in cell.details}
    assert workers == {"autoencoder": "auto", "diffusion": "auto", "judge": "auto", "segmenter": "auto", "spade": 3}
