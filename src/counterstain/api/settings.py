"""The settings: shown, explained, listed, and as a JSON schema for editors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from counterstain.api import PathLike, Settings, recipe_of, verb
from counterstain.errors import ConfigError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

TAXONOMY_TEMPLATE = """\
# The subtypes of a tissue class. Give this file with --taxonomy, or list its subtypes in LABELS.yaml.
name: my-taxonomy
tissue_class: tumour          # what all subtypes are; the segmenter tells it from background
subtypes:                     # ids 1, 2, 3, ... in this order are the values of label images; 0 is background
  - {id: 1, name: Subtype A, colour: "#4477aa"}
  - {id: 2, name: Subtype B, colour: "#ee6677"}
  - {id: 3, name: Mixed, colour: "#228833", counted: false}   # segmented, but left out of the variance between subtypes
score_rules:                  # only for counterstain score: the first step that holds, from the top
  main:
    counted: [Subtype A, Subtype B]   # what a score is made of
    steps:
      - {score: high, subtypes: [Subtype B], above: 0.1}   # more than 10 % of what is counted
    otherwise: low
"""


@verb
def config_show(
    *, preset: str | None = "best", config: PathLike | None = None, settings: Settings | None = None
) -> str:
    """Show every setting of a recipe, as YAML that can be given as config.

    Parameters
    ----------
    preset, config, settings
        As for :func:`train`.
    """
    from counterstain.config import to_yaml

    return to_yaml(recipe_of(preset, config, settings))


@verb
def config_explain(key: str) -> str:
    """Explain a setting: what it does, its type, its value in every preset.

    Parameters
    ----------
    key : str
        For example spade.training.steps, or a part such as spade.training; study.repeats for those of a study.
    """
    from counterstain.recipe import PRESETS

    settings = list(_settings())
    found = []
    for setting in settings:
        if f"{setting.key}.".startswith(f"{key}."):
            names = ("default ",) if len(setting.values) == 1 else [f"{preset} " for preset in PRESETS]
            values = ", ".join(f"{name}{value}" for name, value in zip(names, setting.values, strict=True))
            values = values.removeprefix("default ") if values == "default required" else values
            found.append(f"{setting.key} ({setting.type})\n  {setting.text}\n  {values}\n")
    if not found:
        last = key.rpartition(".")[2]
        near = sorted(setting.key for setting in settings if setting.key.rpartition(".")[2] == last)
        hint = f"did you mean {' or '.join(near)}?" if near else "'counterstain config show' lists all"
        raise ConfigError(f"config explain {key}: no such setting; {hint}")
    return "\n".join(found)


@verb
def config_schema() -> dict[str, Any]:
    """Show a JSON schema of STUDY.yaml, for editors that complete and check YAML."""
    from counterstain.recipe import recipe_class
    from counterstain.study.config import StudyConfig

    schema, recipe = StudyConfig.model_json_schema(), recipe_class().model_json_schema()
    parts = recipe.pop("$defs", {})
    for part in (recipe, *parts.values()):
        part.pop("required", None)  # a study's recipe holds changes alone
    schema["$defs"] = schema.get("$defs", {}) | parts | {"Recipe": recipe}
    schema["properties"]["recipe"] = {"$ref": "#/$defs/Recipe", "description": "Changes to the preset's recipe."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@verb
def config_taxonomy() -> str:
    """Show a taxonomy file to start from."""
    return TAXONOMY_TEMPLATE


@verb
def config_reference() -> str:
    """Show the reference of all settings, as Markdown (docs/settings.md)."""
    lines = [
        "# Settings",
        "",
        "Written by `counterstain config reference`. A recipe's settings stand under `recipe:` in STUDY.yaml and after",
        "`--set` and in `--config` files of single commands; those of a study stand at the top of STUDY.yaml.",
        "`off (x)`: its group is off (null); `{}` or any of its settings switches it on, and this one is then x.",
    ]
    sections: dict[str, list[str]] = {}
    for setting in _settings():
        section, _, name = setting.key.rpartition(".")
        cells = [f"`{name}`", setting.type, *setting.values, setting.text]
        row = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        sections.setdefault(section, []).append(row)
    for section, rows in sections.items():
        header = STUDY_HEADER if section.startswith("study") else RECIPE_HEADER
        lines += ["", f"## {section or 'recipe'}", "", header, *rows]
    return "\n".join(lines) + "\n"


RECIPE_HEADER = "| setting | type | paper | best | demo | meaning |\n|---|---|---|---|---|---|"
STUDY_HEADER = "| setting | type | default | meaning |\n|---|---|---|---|"


class _Setting(NamedTuple):
    key: str
    type: str
    values: list[str]  # by preset, or the default alone
    text: str

    @classmethod
    def of(cls, key: str, field: FieldInfo, values: Iterable[Any]) -> _Setting:
        text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join((field.description or "").replace("``", "`").split()))
        text = re.sub(r"\bNone\b", "null", text)
        return cls(key, _type_name(field.annotation, field.metadata), [_shown(value) for value in values], text)


def _settings() -> Iterator[_Setting]:
    """All settings of a recipe, then those of a study."""
    from counterstain.recipe import PRESETS, load_recipe, recipe_class
    from counterstain.study.config import StudyConfig

    presets = [load_recipe(preset).model_dump(mode="json") for preset in PRESETS]
    for key, field in _fields(recipe_class()):
        yield _Setting.of(key, field, [_value(preset, key, field) for preset in presets])
    for key, field in _fields(StudyConfig):
        if not key.startswith("recipe"):
            default = field.get_default(call_default_factory=True)
            yield _Setting.of(f"study.{key}", field, ["required" if field.is_required() else default])


def _fields(model: Any, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        inner = _model_of(field.annotation)
        if inner is None:
            yield prefix + name, field
        else:
            yield from _fields(inner, f"{prefix}{name}.")


def _model_of(annotation: Any) -> Any:
    """Return the settings class of a field that is one, perhaps optional."""
    from pydantic import BaseModel

    if str(annotation).count("[") > 1 or "tuple" in str(annotation):
        return None
    kinds = (kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def _value(settings: Any, key: str, field: FieldInfo) -> Any:
    """Return the value of a setting; of a group that is off (null), also what it would be."""
    for part in key.split("."):
        if not isinstance(settings, Mapping):
            return "off" if field.is_required() else f"off ({_shown(field.get_default(call_default_factory=True))})"
        settings = settings.get(part)
    return settings


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).replace("'", "").replace("True", "true").replace("False", "false")


WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}


def _type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return a type in words, with its bounds."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(inner[0], [part for field in inner[1:] for part in getattr(field, "metadata", [field])])
    if origin is Literal:
        name = ", ".join(str(value) for value in inner)
    elif origin in {Union, UnionType}:
        name = " or ".join(_type_name(kind) for kind in inner)
    elif origin is tuple:
        name = f"list of {_type_name(inner[0])}"
    elif origin is dict:
        name = f"mapping to {_type_name(inner[1])}"
    else:
        name = WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())
    bounds = ((words, getattr(bound, key, None)) for bound in metadata for key, words in BOUNDS.items())
    return " ".join((name, *(f"{words} {limit}" for words, limit in bounds if limit is not None)))
