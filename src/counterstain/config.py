"""Strict configuration: YAML in, frozen pydantic models out, every unknown key an error."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from counterstain.errors import ConfigError


class Config(BaseModel):
    """Base of all configuration: frozen, typed, no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True, allow_inf_nan=False
    )

    if not TYPE_CHECKING:  # type checkers read the fields instead

        def __init__(self, /, **values: Any) -> None:
            """Validate the values; raises ConfigError in one line, as :func:`build` does."""
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(f"{type(self).__name__}: {_describe(type(self), error)}") from None

        __init__.__pydantic_base_init__ = True  # so that build and groups inside others are validated as ever

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Show only what differs from its default."""
        for name, value in super().__repr_args__():
            field = type(self).model_fields.get(str(name))
            if field is None or field.get_default(call_default_factory=True) != value:
                yield name, value


ConfigT = TypeVar("ConfigT", bound=Config)

REMOVED_SETTINGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "SpadeConfig": {
        "betas": ([0.0, 0.9],),
        "feature_weight": (10.0,),
        "kl_weight": (0.05, 0.0),  # 0 stood beside use_vae: false, where it has no effect
        "monitor_codes": (4,),
    },
    "AutoencoderConfig": {
        "betas": ([0.5, 0.9],),
        "crop_px": (None,),
        "codebook_weight": (1.0,),
        "codebook_decay": (0.99,),
        "lr_schedule": ("constant",),
    },
    "DiffusionConfig": {"weight_decay": (0.0,)},
    "WindowsConfig": {"decode_overlap_px": (64,)},
    "TrainingConfig": {"strategy": ("auto", "ddp", "ddp_find_unused_parameters_true")},
    "PhantomConfig": {
        "duct_share": (0.15,),
        "tumour_share": (0.36,),
        **dict.fromkeys(("artefact_rate", "mimic_rate", "blur", "haze", "noise"), (1.0,)),
    },
    "JudgeConfig": {"instance_weight": (1.0,), "weight_decay": (0.01,)},
    "SegmenterConfig": {"betas": ([0.9, 0.999],), "require_weights": (False, True)},
}
"""Settings that earlier versions saved and that are constants now: by configuration, with the values that mean the
same as today."""


LARGEST_YAML_BYTES, MOST_YAML_VALUES = 1_000_000, 100_000
SHOWN_FAULTS, SHOWN_CHARACTERS = 4, 80
ALTERNATIVE = re.compile(r"constrained-\w+|literal\[.*\]")  # what pydantic calls one of several types in a place
EXPECTED = {  # instead of pydantic's own words
    "missing": "required",
    "tuple_type": "expected a list, such as [a, b]",
    **dict.fromkeys(("model_type", "dict_type"), "expected a mapping, such as {key: value}"),
}


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last without a word, and aliases that explode."""

    def compose_document(self) -> Any:
        """Return the document, once it is known how large its aliases make it."""
        document: Any = super().compose_document()
        self._size(document, {})
        return document

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the mapping that begins here."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node

    def _size(self, node: yaml.Node, known: dict[int, int]) -> int:
        """Return how many values a node holds once all aliases are written out."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if known.setdefault(id(node), 0) == 0:
            pairs = isinstance(node, yaml.MappingNode)
            inner = [part for pair in node.value for part in pair] if pairs else node.value
            if any(known.get(id(part)) == 0 for part in inner):
                raise yaml.composer.ComposerError(None, None, "a value that contains itself", node.start_mark)
            known[id(node)] = 1 + sum(self._size(part, known) for part in inner)
        if known[id(node)] > MOST_YAML_VALUES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MOST_YAML_VALUES:,} values once its aliases are written out", node.start_mark
            )
        return known[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises ConfigError where the file is missing, cannot be read, is not YAML, or is not a mapping.
    """
    try:
        if path.stat().st_size > LARGEST_YAML_BYTES:
            raise ConfigError(f"{path}: larger than {LARGEST_YAML_BYTES // 1_000_000} MB; is this the right file?")
        text = path.read_text(encoding="utf-8-sig")
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder, expected a YAML file") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML (byte {error.start} is not UTF-8); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    content = _yaml_value(text, f"{path}: not YAML")
    if content is None:
        raise ConfigError(f"{path}: is empty; expected settings, each as 'name: value'")
    if not isinstance(content, dict):
        found = "a list" if isinstance(content, list) else f"only {_short(str(content), SHOWN_CHARACTERS)!r}"
        raise ConfigError(f"{path}: expected settings, each as 'name: value', found {found}")
    return content


def _yaml_value(text: str, refusal: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)  # noqa: S506 - it is a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if mark is not None and "'\\t'" in str(error):
            reason = f"line {mark.line + 1}: indented with a tab; use spaces, not tabs"
        else:
            reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # 2026-13-45, !!int x
        reason = f"a value that YAML cannot hold: {error}"
    except (TypeError, KeyError, AttributeError):  # !!bool x, !!timestamp x
        reason = "a tag (!!) that its value does not fit"
    raise ConfigError(f"{refusal} ({_short(reason, 3 * SHOWN_CHARACTERS)})")


def to_yaml(config: Config) -> str:
    """Return a configuration as YAML that :func:`read_yaml` and :func:`build` read back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def build(model: type[ConfigT], content: Mapping[str, Any], source: str | Path = "settings") -> ConfigT:
    """Validate a mapping.

    Raises ConfigError with one line that names the source, the key, the value and what was expected.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_describe(model, error)}") from error


def build_stored(model: type[ConfigT], content: Mapping[str, Any], source: str | Path = "settings") -> ConfigT:
    """Validate settings that a checkpoint or a study saved, perhaps under an earlier version of counterstain.

    Raises ConfigError as :func:`build`, or where a setting of ``REMOVED_SETTINGS`` has a value that this version cannot
    have.
    """
    return build(model, _without_removed(model, content, source) if isinstance(content, Mapping) else content, source)


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``change`` laid over it, mapping by mapping; lists and scalars are replaced."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Turn ``["a.b=c", …]`` of ``--set`` into a nested mapping; values are read as YAML.

    Raises ConfigError where an assignment has no ``=`` or no key.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not all(key.strip().split(".")):
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE, for example --set diffusion.training.steps=500")
        value = _yaml_value(text, f"--set {_short(assignment)}: the value is not YAML")
        for part in reversed(key.strip().split(".")):
            value = {part: value}
        overrides = merge(overrides, value)
    return overrides


def _describe(model: type[BaseModel], error: ValidationError) -> str:
    faults = error.errors(include_url=False)
    within = {fault["loc"][:depth] for fault in faults for depth in range(1, len(fault["loc"]))}
    faults = [fault for fault in faults if fault["loc"] not in within]  # a list is too short without its faulty items
    places: dict[tuple[int | str, ...], list[ErrorDetails]] = {}
    for fault in faults:
        places.setdefault(tuple(part for part in fault["loc"] if not ALTERNATIVE.fullmatch(str(part))), []).append(
            fault
        )
    said = dict.fromkeys(itertools.starmap(partial(_fault, model), itertools.islice(places.items(), SHOWN_FAULTS)))
    more = f" (and {len(places) - SHOWN_FAULTS} more)" if len(places) > SHOWN_FAULTS else ""
    return "; ".join(said) + more


def _fault(model: type[BaseModel], loc: tuple[int | str, ...], faults: Sequence[ErrorDetails]) -> str:
    """Return what is wrong at a place; of a setting with alternatives, every one of them says so."""
    place, fault = ".".join(map(str, loc)), faults[0]
    if fault["type"] == "extra_forbidden":
        known = _known_keys(model, fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        deeper = sorted(key for key in _keys_below(model) if key.endswith(f".{fault['loc'][-1]}"))
        near = near or ([" or ".join(deeper)] if len(fault["loc"]) == 1 and deeper else [])
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{_short(place)}: unknown key; {hint}"
    messages = [EXPECTED.get(other["type"], other["msg"].removeprefix("Value error, ")) for other in faults]
    message = " or ".join([messages[0], *(other.removeprefix("Input should be ") for other in messages[1:])])
    given = fault["input"]
    shown = "" if isinstance(given, Mapping | list | tuple | BaseModel) else f" (got {_short(repr(given))})"
    return f"{_short(place)}: {message}{shown}" if place else f"{message}{shown}"


def _short(text: str, characters: int = SHOWN_CHARACTERS) -> str:
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def _known_keys(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in place:
        if isinstance(part, str):
            current = _config_at(current, part) or current
    return list(getattr(current, "model_fields", {}))


def _config_at(model: Any, key: str) -> type[BaseModel] | None:
    """Return the class of a setting that is a group of settings itself."""
    field = getattr(model, "model_fields", {}).get(key)
    annotation = None if field is None else field.annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((a for a in candidates if isinstance(a, type) and issubclass(a, BaseModel)), None)


def _without_removed(model: type[BaseModel], content: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    constants, kept = REMOVED_SETTINGS.get(model.__name__, {}), {}
    for key, value in content.items():
        if key not in constants:
            inner = _config_at(model, key)
            kept[key] = _without_removed(inner, value, source) if inner and isinstance(value, Mapping) else value
        elif value not in constants[key]:
            raise ConfigError(
                f"{source}: {key} is {value!r}, but is always {constants[key][0]!r} since this version; use the "
                "version that saved it, or train again"
            )
    return kept


def _keys_below(model: Any, prefix: str = "") -> Iterator[str]:
    """All keys of a model, those of its parts with dots between them."""
    for name, field in getattr(model, "model_fields", {}).items():
        yield prefix + name
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            yield from _keys_below(part, f"{prefix}{name}.")
