"""What a study wrote about its trainings and synthetic sets, read for the report; older studies wrote less."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from counterstain.errors import InputError, StorageError
from counterstain.storage import read_json, stage_of
from counterstain.study.arms import Arm, read_arms
from counterstain.study.test_access_log import Look, read_looks, record_look, run_of
from counterstain.taxonomy import Taxonomy


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


# The reader of a study's results folder: everything is checked here, so that the page need not.

SPLITS = ("val", "test")


class _StudyRecord(BaseModel):
    """What a study wrote about itself; a later version may write more."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CohortRecord(_StudyRecord):
    """The cohort a study ran on."""

    source: str = ""
    """Where it came from."""
    mpp: float | None = None
    """Micrometres per pixel."""
    fingerprint: str = ""
    """Hash of its tables and split."""
    regions: int = 0
    """How many regions it has."""
    patients: dict[str, int] = Field(default_factory=dict)
    """Patients by part."""


class Failure(_StudyRecord):
    """A cell of the study that did not finish."""

    cell: str
    """Its name."""
    why: str
    """One line."""


class FilterCount(_StudyRecord):
    """What the filter of generated images did to one method."""

    drawn: int = Field(ge=0)
    """Images drawn, rejected ones included."""
    rejected: int = Field(ge=0)
    """Images thrown away and drawn again."""


class StudyRecord(_StudyRecord):
    """``study.json``."""

    name: str
    """The study's name."""
    preset: str = ""
    """The preset it started from."""
    taxonomy: Taxonomy
    """Subtypes, names, colours."""
    cohort: CohortRecord
    """What it ran on."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The resolved configuration."""
    arms: tuple[str, ...] = Field(min_length=1)
    """Names, in the order in which they are shown."""
    arm_records: tuple[Arm, ...] = ()
    """What each of them is."""
    reference: str
    """The arm that the others are held against."""
    repeats: int = Field(ge=1)
    """Trainings of every arm."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Package -> version."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Stage -> duration."""
    failed: tuple[Failure, ...] = ()
    """Cells without a result."""
    filter: dict[str, FilterCount] = Field(default_factory=dict)
    """Method -> what the filter rejected."""
    device: str = ""
    """What it ran on."""
    notes: tuple[str, ...] = ()
    """Anything the study has to say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One patch, its new labels and what every method made of them."""

    real: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W, 3) uint8, coloured
    new_mask: np.ndarray  # (H, W, 3) uint8, coloured
    images: dict[str, np.ndarray]  # method -> (H, W, 3) uint8


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything a report shows."""

    folder: Path
    study: StudyRecord
    results: pd.DataFrame  # a row per arm, repeat, split
    counts: pd.DataFrame  # a row per arm, repeat, split, slide, label
    composition: pd.DataFrame  # a row per slide and subtype
    synthetic: pd.DataFrame  # a row per method and subtype
    losses: pd.DataFrame  # a row per stage, step, name
    examples: tuple[Example, ...]
    looks: tuple[Look, ...] = ()  # who saw the figures of which part, oldest first

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that have a result, in the order of the study."""
        found = set(self.results["arm"])
        return tuple(arm for arm in self.study.arms if arm in found)

    @property
    def recalls(self) -> tuple[str, ...]:
        """The columns with the recall of each subtype, in the taxonomy's order."""
        return tuple(f"recall_{name}" for name in self.study.taxonomy.names)


def find_results(run: Path) -> Path:
    """Return the results folder of a run (``RUN/results``, or ``RUN`` itself).

    Raises
    ------
    InputError
        There is no such folder, or no finished study in it.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; give the folder of a study that has run")
    for folder in (run / "results", run):
        if (folder / "study.json").is_file():
            return folder
    if (run / "results").is_dir() or stage_of(run) == "study":
        raise InputError(f"{run}: the study is not finished; give its command again, finished work is kept")
    raise InputError(f"{run}: no results of a study in it (expected {run / 'results' / 'study.json'})")


def read_results(run: Path) -> Results:
    """Read and check the results of a study.

    Parameters
    ----------
    run : Path
        Folder of the run, or its results folder.

    Raises
    ------
    InputError
        Something is missing, the study is not finished, or a table holds what it cannot.
    StorageError
        A file is damaged.
    """
    folder = find_results(run)
    study = _read_study(folder / "study.json")
    measures = ["dice", "subtype_variance", *(f"recall_{name}" for name in study.taxonomy.names)]
    results = _read_table(folder / "results.csv", ["arm", "repeat", "split"], ["repeat"])
    _require_columns(folder / "results.csv", results, measures)
    results = _numeric(folder / "results.csv", results, [c for c in results.columns if c not in {"arm", "split"}])
    _check_arms(folder / "results.csv", results, study)
    pixels = ["predicted_background", "predicted_tumour"]
    counts = _read_table(
        folder / "counts.parquet",
        ["arm", "repeat", "split", "slide", "patient", "subtype", *pixels],
        ["repeat", "subtype", *pixels],
    )
    amounts = ["instances", "area_px"]
    before = ["instances_before", "area_px_before"]
    return Results(
        folder=folder,
        study=study,
        results=results,
        counts=counts,
        composition=_read_table(folder / "composition.csv", ["split", "subtype", *amounts], amounts),
        synthetic=_read_optional(
            folder / "synthetic.csv", ["method", "subtype", *amounts, *before], [*amounts, *before]
        ),
        losses=_read_optional(folder / "losses.csv", ["stage", "step", "name", "value"], ["step", "value"]),
        examples=_read_examples(folder / "examples"),
        looks=read_looks(run_of(folder) or folder),
    )


def looked_at(results: Results, command: str) -> Results:
    """Put on record that a command shows the figures of all parts, and return the results with that record.

    Results outside of the study's run (a copy) keep the record that they came with.
    """
    run = run_of(results.folder)
    if run is None or not record_look(run, command, SPLITS):
        return results
    return replace(results, looks=read_looks(run))


def _read_study(path: Path) -> StudyRecord:
    try:
        study = StudyRecord.model_validate(_with_arms(read_json(path)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "content"
        raise InputError(f"{path}: {place}: {first['msg']}; give the study's command again") from error
    if study.reference not in study.arms:
        raise InputError(f"{path}: reference: {study.reference!r} is not one of the arms {', '.join(study.arms)}")
    return study


def _with_arms(content: dict[str, Any]) -> dict[str, Any]:
    if not content.get("arms"):
        return content
    arms = read_arms(content)
    return content | {"arms": [arm.name for arm in arms], "arm_records": arms}


def _check_arms(path: Path, results: pd.DataFrame, study: StudyRecord) -> None:
    """Hold the rows against the plan: no strange arm or split, none twice, none lacking but those that failed."""
    for column, known in (("arm", study.arms), ("split", SPLITS)):
        strange = results.loc[~results[column].isin(known), column]
        if len(strange):
            raise InputError(
                f"{path}: line {strange.index[0] + 2}: {column} is {strange.iloc[0]!r}; expected {', '.join(known)}"
            )
    twice = results.duplicated(["arm", "repeat", "split"])
    if twice.any():
        row = results.loc[twice].iloc[0]
        raise InputError(f"{path}: arm {row['arm']}, repeat {row['repeat']:g}, {row['split']} stands there twice")
    if "test" not in set(results.loc[results["arm"] == study.reference, "split"]):
        raise InputError(f"{path}: the reference arm {study.reference!r} has no test result; run the study again")
    planned = len(study.arms) * study.repeats
    lacking = planned - len(results.loc[results["split"] == "test"])
    if lacking > 0 and not study.failed:
        raise InputError(
            f"{path}: the study is not finished ({lacking} of {planned} cells have no result); "
            "give its command again, finished work is kept"
        )


def _read_table(path: Path, columns: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    read: Callable[[Path], pd.DataFrame] = pd.read_parquet if path.suffix == ".parquet" else pd.read_csv
    try:
        table = read(path)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file; the study is not finished, give its command again, finished work is kept"
        ) from error
    except (ValueError, OSError) as error:  # pandas and Arrow derive theirs from these
        reason = " ".join(str(error).split())[:120]
        raise StorageError(f"{path}: damaged ({reason}); delete it and give the study's command again") from error
    _require_columns(path, table, columns)
    return _numeric(path, table, numbers)


def _read_optional(path: Path, columns: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    return _read_table(path, columns, numbers) if path.exists() else pd.DataFrame(columns=list(columns))


def _require_columns(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> None:
    lacking = [column for column in columns if column not in table.columns]
    if lacking:
        raise InputError(f"{path}: no column {lacking[0]!r}; found {', '.join(map(str, table.columns))}")


def _numeric(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    numbers = {column: pd.to_numeric(table[column], errors="coerce") for column in columns}
    for column, values in numbers.items():
        wrong = values.isna() & table[column].notna()
        if wrong.any():
            line = int(np.flatnonzero(wrong)[0])
            raise StorageError(
                f"{path}: line {line + 2}, column {column}: {table[column].iloc[line]!r} is not a number; "
                "the file is damaged, delete it and give the study's command again"
            )
    return table.assign(**numbers)


def _read_examples(folder: Path) -> tuple[Example, ...]:
    listing = folder / "examples.json"
    if not listing.exists():
        return ()
    try:
        return tuple(
            Example(
                real=_read_image(folder, entry["real"]),
                mask=_read_image(folder, entry["mask"]),
                new_mask=_read_image(folder, entry["new_mask"]),
                images={method: _read_image(folder, name) for method, name in entry["images"].items()},
            )
            for entry in read_json(listing)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{listing}: damaged ({error!r}); delete {folder} and run the study again") from error


def _read_image(folder: Path, name: str) -> np.ndarray:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder / 'examples.json'}: {name!r} lies outside of {folder}")
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such image; run the study again") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: not an image ({error}); delete {folder} and run the study again") from error
