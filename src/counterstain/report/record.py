"""What a study wrote about its trainings and synthetic sets, read for the report; older studies wrote less."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from counterstain.errors import StorageError
from counterstain.storage import read_json


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


RecordT = TypeVar("RecordT", bound=_Record)


class TrainingRecord(_Record):
    """One training."""

    name: str
    """As people read it."""
    stage: str
    """What was trained."""
    sha256: str = ""
    """Hash of the weights."""
    steps: int
    """Optimiser steps."""
    batch_size: int
    patients_seen: int = 0
    seconds: float = 0.0
    logs: str = ""
    """Folder of its curves, from the study's folder; empty where there is none."""


class Change(_Record):
    """How many instances of one subtype became another, or stayed."""

    before: str
    after: str
    instances: int
    area_px: int


class SetRecord(_Record):
    """One synthetic set."""

    name: str
    """As the study calls it."""
    method: str
    patches: int
    size_px: int
    mpp: float
    seed: str
    cohort: str
    """Fingerprint of the cohort that gave the masks."""
    generator: str
    """Hash of the generator's weights; empty for the oracle."""
    patients_seen: tuple[str, ...]
    """Patients behind the masks and the generator."""
    settings: dict[str, Any]
    """How it was drawn."""
    version: str
    sources: dict[str, int]
    """Regions, slides and patients that gave masks."""
    drawn: int
    rejected: int
    background_only: int
    """Patches without an instance."""
    changes: tuple[Change, ...]


_TRAININGS = TypeAdapter(tuple[TrainingRecord, ...])
_SETS = TypeAdapter(tuple[SetRecord, ...])


def read_trainings(folder: Path) -> tuple[TrainingRecord, ...]:
    """Read ``trainings.json`` of a results folder; nothing where it is missing.

    Raises
    ------
    StorageError
        It is damaged.
    """
    return _read(folder / "trainings.json", _TRAININGS)


def read_sets(folder: Path) -> tuple[SetRecord, ...]:
    """Read ``sets.json`` of a results folder; nothing where it is missing.

    Raises
    ------
    StorageError
        It is damaged.
    """
    return _read(folder / "sets.json", _SETS)


def _read(path: Path, kind: TypeAdapter[tuple[RecordT, ...]]) -> tuple[RecordT, ...]:
    if not path.exists():
        return ()
    try:
        return kind.validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise StorageError(f"{path}: {place}: {first['msg']}; give the study's command again") from error
