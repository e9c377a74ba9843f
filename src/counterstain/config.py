"""Strict configuration: YAML in, frozen pydantic models out, every unknown key an error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from counterstain.errors import ConfigError


class Config(BaseModel):
    """Base of all configuration: frozen, typed, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


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


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping that holds a key twice, of which YAML would keep the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the mapping that begins here."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises
    ------
    ConfigError
        The file is missing, is not YAML, or is not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)  # noqa: S506 - it is a SafeLoader
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ConfigError(f"{path}: no such file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({_fault(error)})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    return content


def to_yaml(config: Config) -> str:
    """Return a configuration as YAML that :func:`read_yaml` and :func:`build` read back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def build(model: type[ConfigT], content: Mapping[str, Any], source: str | Path = "settings") -> ConfigT:
    """Validate a mapping.

    Raises
    ------
    ConfigError
        One line that names the source, the key, the value and what was expected.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_describe(model, error)}") from error


def build_stored(model: type[ConfigT], content: Mapping[str, Any], source: str | Path = "settings") -> ConfigT:
    """Validate settings that a checkpoint or a study saved, perhaps under an earlier version of counterstain.

    Raises
    ------
    ConfigError
        As :func:`build`; or a setting of ``REMOVED_SETTINGS`` has a value that this version cannot have.
    """
    return build(model, _without_removed(model, content, source), source)


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``change`` laid over it, mapping by mapping; lists and scalars are replaced."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Turn ``["a.b=c", …]`` of ``--set`` into a nested mapping; values are read as YAML.

    Raises
    ------
    ConfigError
        An assignment has no ``=`` or no key.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not all(key.strip().split(".")):
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE, for example --set diffusion.training.steps=500")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {assignment}: the value is not YAML") from error
        for part in reversed(key.strip().split(".")):
            value = {part: value}
        overrides = merge(overrides, value)
    return overrides


def _fault(error: Exception) -> str:
    """Say what is wrong with YAML that was read as text; the caller names the file."""
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())


def _describe(model: type[BaseModel], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        deeper = sorted(key for key in _keys_below(model) if key.endswith(f".{first['loc'][-1]}"))
        near = near or ([" or ".join(deeper)] if len(first["loc"]) == 1 and deeper else [])
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{place}: unknown key; {hint}{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = "" if isinstance(given, Mapping | list | BaseModel) else f" (got {given!r})"
    return f"{place}: {message}{shown}{more}" if place else f"{message}{shown}{more}"


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
