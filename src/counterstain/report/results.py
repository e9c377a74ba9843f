"""What a study left for its report: records, tables and pictures, read and checked; older studies wrote less."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from counterstain.errors import InputError, StorageError
from counterstain.generators.methods import METHODS
from counterstain.storage import read_csv, read_json, stage_of
from counterstain.study.arms import Arm, read_arm
from counterstain.study.records import COLUMNS, TEXTS, Look, read_looks, record_look, run_of
from counterstain.study.status import FILES_FILE, damage, tests_of
from counterstain.taxonomy import Taxonomy

SPLITS = ("val", "test")
CROSS_VALIDATED = "pooled test set"  # of all folds: every patient
AGAIN = "run the study's command again"
CEILING = "ceiling, phantom only"
"""Added to the name of a method that draws with the phantom's own renderer: no real cohort has a perfect generator."""

T = TypeVar("T")


class Record(BaseModel):
    """What a study wrote; a later version may write more."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CohortRecord(Record):
    """The cohort of a study."""

    source: str = ""
    mpp: float | None = None
    fingerprint: str = ""
    regions: int = 0
    patients: dict[str, int] = Field(default_factory=dict)  # by split


class Failure(Record):
    """A cell of the study that did not finish, and why."""

    cell: str
    why: str


class FilterCount(Record):
    """Images of one synthetic set."""

    drawn: int = Field(ge=0)
    rejected: int = Field(ge=0)  # by the filter


class StudyRecord(Record):
    """``study.json``."""

    name: str
    preset: str = ""
    taxonomy: Taxonomy
    cohort: CohortRecord
    config: dict[str, Any] = Field(default_factory=dict)  # the resolved configuration
    arms: tuple[Annotated[Arm, BeforeValidator(lambda v: read_arm(v) if isinstance(v, str) else v)], ...] = Field(
        min_length=1
    )  # in the order in which they are shown
    reference: str  # name of the arm that the others are compared with
    repeats: int = Field(ge=1)
    versions: dict[str, str] = Field(default_factory=dict)  # package -> version
    seconds: dict[str, float] = Field(default_factory=dict)  # stage -> duration
    failed: tuple[Failure, ...] = ()
    filter: dict[str, FilterCount] = Field(default_factory=dict)  # by synthetic set
    device: str = ""
    amounts: dict[str, list[float]] = Field(default_factory=dict)  # arm -> what cross-fitting chose, in each fold
    folds: tuple[dict[str, list[str]], ...] = ()  # patients by part, and subtypes that its training patients lack

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that draw images for its arms, in the registry's order."""
        used = {arm.method for arm in self.arms}
        return tuple(name for name in METHODS if name in used)

    def set_label(self, name: str, ceiling: str = CEILING) -> str:
        """Return the name of a synthetic set, with a remark if it is a ceiling."""
        method = METHODS.get(next((arm.method for arm in self.arms if arm.method and arm.set_name == name), name))
        return f"{name} ({ceiling})" if method is not None and method.ceiling else name


class TrainingRecord(Record):
    """One training, of ``trainings.json``."""

    name: str
    stage: str
    sha256: str = ""  # hash of the weights
    steps: int
    batch_size: int
    patients_seen: int = 0
    seconds: float = 0.0
    logs: str = ""  # folder of its curves, relative to the study's folder; empty if there is none


class Change(Record):
    """Instances that were relabelled from one subtype to another, or kept it."""

    before: str
    after: str
    instances: int
    area_px: int


class SetRecord(Record):
    """One synthetic set, of ``sets.json``."""

    name: str
    fold: int = 0  # from 1
    method: str
    patches: int
    size_px: int
    mpp: float
    seed: str
    cohort: str  # fingerprint of the cohort that the masks come from
    generator: str  # hash of the generator's weights; empty if it has none
    patients_seen: tuple[str, ...]  # patients behind the masks and the generator
    settings: dict[str, Any]  # how it was drawn
    version: str
    sources: dict[str, int]  # number of regions, slides and patients that the masks come from
    drawn: int
    rejected: int
    background_only: int  # patches without an instance
    changes: tuple[Change, ...]
    review: dict[str, int | str] = {}  # hash of its decisions, and their counts; empty where no arm uses them


class ExternalRecord(Record):
    """A test of the study on another cohort, of its ``test.json``."""

    name: str
    cohort: CohortRecord
    split: str  # of the cohort; all = everything
    segmenters: tuple[dict[str, str | int], ...]  # arm, repeat and hash of the weights
    also_in_study: tuple[str, ...] = ()  # patients of the study's validation and test sets
    failed: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One patch, its new labels and the image that every method drew for them."""

    real: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W, 3) uint8, coloured
    new_mask: np.ndarray  # (H, W, 3) uint8, coloured
    images: dict[str, np.ndarray]  # name of the set -> (H, W, 3) uint8


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything a report shows."""

    folder: Path
    study: StudyRecord
    results: pd.DataFrame  # a row per arm, repeat, split
    counts: pd.DataFrame  # a row per arm, repeat, split, slide, label
    composition: pd.DataFrame  # a row per slide and subtype
    synthetic: pd.DataFrame  # a row per set and subtype
    losses: pd.DataFrame  # a row per stage, step, name
    fairness: pd.DataFrame  # a row per arm and repeat
    trainings: tuple[TrainingRecord, ...]
    sets: tuple[SetRecord, ...]
    examples: tuple[Example, ...]
    looks: tuple[Look, ...]  # when the results of which split were shown, oldest first
    tested_on: str = "test set"  # what the split ``test`` is

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that have a result, in the order of the study."""
        return tuple(arm for arm in self.study.arms if arm.name in set(self.results["arm"]))

    @property
    def reference(self) -> Arm:
        """The arm that the others are compared with."""
        return next(arm for arm in self.study.arms if arm.name == self.study.reference)

    @property
    def others(self) -> tuple[Arm, ...]:
        """All arms with a result but the reference."""
        return tuple(arm for arm in self.arms if arm != self.reference)

    @property
    def recalls(self) -> tuple[str, ...]:
        """The columns with the recall of each subtype, in the taxonomy's order."""
        return tuple(f"recall_{name}" for name in self.study.taxonomy.names)


def find_results(run: Path) -> Path:
    """Return ``RUN/results``, or ``RUN`` itself; raises InputError where neither holds a finished study."""
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; pass the folder of a study that has run")
    for folder in (run / "results", run):
        if (folder / "study.json").is_file():
            return folder
    if (run / "results").is_dir() or stage_of(run) == "study":
        raise InputError(f"{run}: the study is not finished; {AGAIN}, finished work is kept")
    raise InputError(f"{run}: contains no results of a study (expected {run / 'results' / 'study.json'})")


def read_results(run: Path) -> Results:
    """Read and check the results of a study; ``run`` is its folder, or its results folder.

    Raises InputError where something is missing, the study is not finished or a table holds an impossible value, and
    StorageError where a file is damaged or has changed.
    """
    folder = find_results(run)
    _check_unchanged(folder)
    study = _read_study(folder / "study.json")
    results, counts = _read_scores(folder, study)
    _check_arms(folder / "results.csv", results, study)
    amounts = ["instances", "area_px"]
    both = [*amounts, "instances_before", "area_px_before"]
    trainings, sets = folder / "trainings.json", folder / "sets.json"
    given = _read_optional(folder / "fairness.csv", COLUMNS, [name for name in COLUMNS if name not in TEXTS])
    return Results(
        folder=folder,
        study=study,
        results=results,
        counts=counts,
        composition=_read_table(folder / "composition.csv", ["split", "subtype", *amounts], amounts),
        synthetic=_read_optional(folder / "synthetic.csv", ["method", "subtype", *both], both),
        losses=_read_optional(folder / "losses.csv", ["stage", "step", "name", "value"], ["step", "value"]),
        fairness=given.astype(dict.fromkeys(TEXTS, object)).fillna(dict.fromkeys(TEXTS, "")),
        trainings=_validated(trainings, TypeAdapter(tuple[TrainingRecord, ...])) if trainings.exists() else (),
        sets=_validated(sets, TypeAdapter(tuple[SetRecord, ...])) if sets.exists() else (),
        examples=_read_examples(folder / "examples"),
        looks=read_looks(run_of(folder) or folder),
        tested_on=CROSS_VALIDATED if study.folds else "test set",
    )


def _read_scores(folder: Path, study: StudyRecord) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read results.csv and counts.parquet."""
    measures = ["dice", "subtype_variance", *(f"recall_{name}" for name in study.taxonomy.names)]
    keys, pixels = ["arm", "repeat", "split"], ["predicted_background", "predicted_tumour"]
    of_slides = [*keys, "slide", "patient", "subtype", *pixels]
    return (
        _read_table(folder / "results.csv", [*keys, *measures]),
        _read_table(folder / "counts.parquet", of_slides, ["repeat", "subtype", *pixels]),
    )


def read_tests(results: Results) -> list[tuple[ExternalRecord, Results | None]]:
    """Read the tests of a study on other cohorts, each with results whose split ``test`` is that cohort.

    None stands for the results of segmenters that the study has trained anew since.
    """
    tests: list[tuple[ExternalRecord, Results | None]] = []
    trained = {training.sha256 for training in results.trainings}
    for place in tests_of(results.folder.parent):
        _check_unchanged(place, f"give its 'study test' again, or delete {place}")
        record = _validated(place / "test.json", TypeAdapter(ExternalRecord))
        if any(segmenter.get("sha256") not in trained for segmenter in record.segmenters):
            tests.append((record, None))
            continue
        found = []
        for own, tested in zip((results.results, results.counts), _read_scores(place, results.study), strict=True):
            known = tested[tested["arm"].isin([arm.name for arm in results.study.arms])].assign(split="test")
            found.append(pd.concat([own[own["split"] == "val"], known], ignore_index=True))
        tested_on = f"external cohort {record.name}"
        tests.append((record, replace(results, results=found[0], counts=found[1], tested_on=tested_on)))
    return tests


def looked_at(results: Results, command: str) -> Results:
    """Record that a command shows the results of all splits, and return the results with that record.

    Copies of results, outside of the study's folder, keep the record that they came with.
    """
    run = run_of(results.folder)
    recorded = run is not None and record_look(run, command, SPLITS)
    return replace(results, looks=read_looks(run)) if run and recorded else results


def damaged(path: Path, error: Exception) -> StorageError:
    """Return the error that says that a table is damaged."""
    reason = " ".join(str(error).split())[:120]
    return StorageError(f"{path}: damaged ({reason}); delete it and {AGAIN}")


def _check_unchanged(folder: Path, remedy: str = AGAIN) -> None:
    """Raise StorageError where a file is no longer what was written; earlier versions did not note what that was."""
    if (folder / FILES_FILE).exists() and (file := damage(folder, hashes=True, note=FILES_FILE)):
        raise StorageError(f"{folder / file}: missing, or changed since it was written; {remedy}")


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'content'}: {first['msg']}"


def _read_study(path: Path) -> StudyRecord:
    try:
        study = StudyRecord.model_validate(read_json(path))
    except ValidationError as error:
        raise InputError(f"{path}: {_first_problem(error)}; {AGAIN}") from error
    names = [arm.name for arm in study.arms]
    if study.reference not in names:
        raise InputError(f"{path}: reference: {study.reference!r} is not one of the arms {', '.join(names)}")
    return study


def _validated(path: Path, kind: TypeAdapter[T]) -> T:
    try:
        return kind.validate_python(read_json(path))
    except ValidationError as error:
        raise StorageError(f"{path}: {_first_problem(error)}; {AGAIN}") from error


def _check_arms(path: Path, results: pd.DataFrame, study: StudyRecord) -> None:
    """Compare the rows with the plan: no unknown arm or split, no duplicates, none missing except failures."""
    for column, known in (("arm", [arm.name for arm in study.arms]), ("split", SPLITS)):
        unknown = results.loc[~results[column].isin(known), column]
        if len(unknown):
            raise InputError(
                f"{path}: line {unknown.index[0] + 2}: {column} is {unknown.iloc[0]!r}; expected {', '.join(known)}"
            )
    twice = results.duplicated(["arm", "repeat", "split"])
    if twice.any():
        row = results.loc[twice].iloc[0]
        raise InputError(f"{path}: arm {row['arm']}, repeat {row['repeat']:g}, {row['split']} is listed twice")
    tested = results.loc[results["split"] == "test", "arm"]
    if study.reference not in set(tested):
        raise InputError(f"{path}: the reference arm {study.reference!r} has no test result; run the study again")
    planned = len(study.arms) * study.repeats
    if len(tested) < planned and not study.failed:
        raise InputError(
            f"{path}: the study is not finished ({planned - len(tested)} of {planned} cells have no result); "
            f"{AGAIN}, finished work is kept"
        )


def _read_table(path: Path, columns: Sequence[str], numbers: Sequence[str] = ()) -> pd.DataFrame:
    """Read a table that has these columns; those named ``numbers``, without any all but arm and split, are numbers."""
    read: Callable[[Path], pd.DataFrame] = pd.read_parquet if path.suffix == ".parquet" else read_csv
    try:
        table = read(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; the study is not finished, {AGAIN}, finished work is kept") from error
    except (ValueError, OSError) as error:  # pandas and Arrow derive theirs from these
        raise damaged(path, error) from error
    for missing in [column for column in columns if column not in table.columns]:
        found = ", ".join(str(column)[:40] for column in table.columns[:12])
        raise InputError(f"{path}: no column {missing!r}; found {found}")
    for column in numbers or table.columns.difference(["arm", "split"]):
        values = pd.to_numeric(table[column], errors="coerce")
        wrong = np.flatnonzero(values.isna() & table[column].notna())
        if len(wrong):
            raise StorageError(
                f"{path}: line {wrong[0] + 2}, column {column}: {table[column].iloc[wrong[0]]!r} is not a number; "
                f"the file is damaged, delete it and {AGAIN}"
            )
        table[column] = values
    return table


def _read_optional(path: Path, columns: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    return _read_table(path, columns, numbers) if path.exists() else pd.DataFrame(columns=list(columns))


def _read_examples(folder: Path) -> tuple[Example, ...]:
    listing = folder / "examples.json"
    if not listing.exists():
        return ()
    try:
        return tuple(
            Example(
                **{name: _read_image(folder, entry[name]) for name in ("real", "mask", "new_mask")},
                images={method: _read_image(folder, name) for method, name in entry["images"].items()},
            )
            for entry in read_json(listing)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{listing}: damaged ({error!r}); delete {folder} and {AGAIN}") from error


def _read_image(folder: Path, name: str) -> np.ndarray:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder / 'examples.json'}: {name!r} is outside {folder}")
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such image; {AGAIN}") from error
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's of a broken PNG is a SyntaxError
        raise StorageError(f"{path}: not an image ({error}); delete {folder} and {AGAIN}") from error
