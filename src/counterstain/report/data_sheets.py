"""What a study recorded of its trainings and synthetic sets: data sheets, and whether its arms were treated equally."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml
from pydantic import TypeAdapter, ValidationError

from counterstain.errors import StorageError
from counterstain.generators.methods import METHODS
from counterstain.progress import PERCENT, TIMES, counted
from counterstain.report.results import AGAIN, CEILING, Record, StudyRecord, damaged, first_problem, is_ceiling
from counterstain.report.tables import NONE, Cell, Row, Table
from counterstain.storage import read_json
from counterstain.study.fairness import COLUMNS, FAIRNESS_FILE, departures, fairness_of

INTENDED_USE = (
    "Training of segmenters of this tissue class, together with real patches, when rare subtypes are underrepresented; "
    "research on subtype balance."
)
LIMITS = (
    "Not for diagnosis, for training pathologists, or as evidence of how a tissue looks.",
    "Never for validation or testing: report results on real tissue only.",
    "New labels are placed in existing outlines: shapes, neighbours and frequencies are not those of real subtypes.",
    "The images inherit the biases of the training patients: scanner, stain, laboratory, population.",
    "They may reproduce parts of training images, and do where background or nuclei are kept: treat as patient data.",
)


RecordT = TypeVar("RecordT", bound=Record)


class TrainingRecord(Record):
    """One training: its name, what was trained, and how long."""

    name: str
    stage: str
    sha256: str = ""
    """Hash of the weights."""
    steps: int
    """Optimiser steps."""
    batch_size: int
    patients_seen: int = 0
    seconds: float = 0.0
    logs: str = ""
    """Folder of its curves, relative to the study's folder; empty if there is none."""


class Change(Record):
    """Instances that were relabelled from one subtype to another, or kept it."""

    before: str
    after: str
    instances: int
    area_px: int


class SetRecord(Record):
    """One synthetic set."""

    name: str
    method: str
    patches: int
    size_px: int
    mpp: float
    seed: str
    cohort: str
    """Fingerprint of the cohort that the masks come from."""
    generator: str
    """Hash of the generator's weights; empty if it has none."""
    patients_seen: tuple[str, ...]
    """Patients behind the masks and the generator."""
    settings: dict[str, Any]
    """How it was drawn."""
    version: str
    sources: dict[str, int]
    """Number of regions, slides and patients that the masks come from."""
    drawn: int
    rejected: int
    background_only: int
    """Patches without an instance."""
    changes: tuple[Change, ...]


def read_trainings(folder: Path) -> tuple[TrainingRecord, ...]:
    """Read ``trainings.json`` of a results folder; empty if it is missing, StorageError if it is damaged."""
    return _read_records(folder / "trainings.json", TypeAdapter(tuple[TrainingRecord, ...]))


def read_sets(folder: Path) -> tuple[SetRecord, ...]:
    """Read ``sets.json`` of a results folder; empty if it is missing, StorageError if it is damaged."""
    return _read_records(folder / "sets.json", TypeAdapter(tuple[SetRecord, ...]))


def _read_records(path: Path, kind: TypeAdapter[tuple[RecordT, ...]]) -> tuple[RecordT, ...]:
    try:
        return kind.validate_python(read_json(path)) if path.exists() else ()
    except ValidationError as error:
        raise StorageError(f"{path}: {first_problem(error)}; {AGAIN}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """One data sheet."""

    name: str
    facts: tuple[tuple[str, str], ...]
    changes: Table
    """Instances by old and new subtype."""
    patients: str
    """Every source patient."""
    settings: str
    """YAML."""


def data_sheets(
    sets: Sequence[SetRecord], trainings: Sequence[TrainingRecord], study: StudyRecord
) -> tuple[Sheet, ...]:
    """Return a data sheet of each set."""
    return tuple(_sheet(found, trainings, study) for found in sets)


def _sheet(found: SetRecord, trainings: Sequence[TrainingRecord], study: StudyRecord) -> Sheet:
    ceiling = is_ceiling(found.method)
    facts = _drawing(found, study) | {
        "Generator": f"checkpoint {found.generator}" if found.generator else f"none ({CEILING})" if ceiling else "none",
        "Training of the generator": _training(found, trainings, study),
        "Patches": f"{found.patches:,} of {found.size_px} {TIMES} {found.size_px} pixels at {found.mpp:g} µm per "
        f"pixel, {found.background_only:,} of them without an instance",
        "Masks from": f"{counted(found.sources.get('region', 0), 'region')} of "
        f"{counted(found.sources.get('patient', 0), 'patient')}, training split of cohort {found.cohort[:16]}",
        "Seed": found.seed,
        "Rejected": f"{found.rejected:,} of {found.drawn:,} images drawn "
        f"({100 * found.rejected / max(found.drawn, 1):.1f}{PERCENT})",
        "Version": f"counterstain {found.version}",
    }
    return Sheet(
        name=f"{found.name} ({CEILING})" if ceiling else found.name,
        facts=tuple(facts.items()),
        changes=_changes(found, study.taxonomy.names, study.taxonomy.tissue_class),
        patients=", ".join(found.patients_seen),
        settings=yaml.safe_dump(found.settings, sort_keys=False, allow_unicode=True),
    )


def _drawing(found: SetRecord, study: StudyRecord) -> dict[str, str]:
    """Say what images are drawn from, and how, as the registry has it."""
    method = METHODS.get(found.method)
    described = method.data_sheet if method is not None else None
    title = method.title if method is not None else found.method
    plain = {"Method": title, "Drawn with": NONE}
    return plain | dict(described(found.settings, study.config.get("recipe", {})) if described is not None else {})


def _training(found: SetRecord, trainings: Sequence[TrainingRecord], study: StudyRecord) -> str:
    if not found.generator:
        return "none"
    trained = next((t for t in trainings if t.sha256 and t.sha256 == found.generator), None)
    if trained is None:
        return f"not part of this study; it and the masks used {counted(len(found.patients_seen), 'patient')}"
    source = (
        f"the training split of the cohort “{study.cohort.source}”" if study.cohort.source else "the training split"
    )
    return (
        f"{trained.name}: {trained.steps:,} steps of {trained.batch_size} patches of {source}, "
        f"{counted(trained.patients_seen, 'patient')}"
    )


def _changes(found: SetRecord, names: Sequence[str], tissue: str) -> Table:
    """Return the matrix of old by new subtypes, with sums."""
    befores = [name for name in names if any(change.before == name for change in found.changes)]
    rows = []
    for before in (*befores, "all"):
        cells = []
        for after in (*names, "all"):
            chosen = [c for c in found.changes if before in {c.before, "all"} and after in {c.after, "all"}]
            instances, area = sum(c.instances for c in chosen), sum(c.area_px for c in chosen)
            note = f"{area * (found.mpp * 1e-3) ** 2:.3g} mm²"
            cells.append(Cell(text=f"{instances:,}", note=note, value=instances))
        rows.append(Row(head=before, cells=tuple(cells)))
    caption = f"Instances of {tissue} by old (row) and new subtype (column), with their area"
    return Table(caption=caption, columns=("Old \\ new", *names, "all"), rows=tuple(rows))


def read_fairness(folder: Path) -> pd.DataFrame:
    """Read ``fairness.csv`` of a results folder: a row per arm and repeat; empty if it is missing."""
    if not (folder / FAIRNESS_FILE).exists():
        return pd.DataFrame(columns=list(COLUMNS))
    try:
        return fairness_of(folder)[list(COLUMNS)]
    except (ValueError, KeyError) as error:  # pandas derives its errors from these
        raise damaged(folder / FAIRNESS_FILE, error) from error


def fairness_sentences(table: pd.DataFrame, study: StudyRecord) -> tuple[str, ...]:
    """Say what arms had in common, then in what they differ; empty if the study recorded nothing."""
    return (*_common(table, study), *(f"Differs: {line}." for line in departures(table))) if len(table) else ()


def _common(table: pd.DataFrame, study: StudyRecord) -> Iterator[str]:
    values = {column: list(dict.fromkeys(table[column].tolist())) for column in table.columns}
    equal = {column: found[0] for column, found in values.items() if len(found) == 1}
    if {"steps", "batch_size"} <= equal.keys():
        yield (
            f"Equal optimiser steps: every segmenter ({len(table)}) was trained for {equal['steps']:,} steps of "
            f"{equal['batch_size']} patches, so no arm benefits from more updates."
        )
    if "augmentation" in equal:
        yield f"Equal augmentation of real and synthetic patches in all arms: {equal['augmentation']}."
    if "settings" in equal:
        yield "Equal settings of network, losses and optimiser in all arms."
    if all(len(set(rows["seed"].tolist())) == 1 for _, rows in table.groupby("repeat")):
        repeats = counted(len(values["repeat"]), "repeat")
        yield f"Equal seeds: within each of {repeats} all arms have the same initial weights and order of real patches."
    yield from _filters(table[table["synthetic_patches"] > 0], study)


def _filters(table: pd.DataFrame, study: StudyRecord) -> Iterator[str]:
    """Say how many images were rejected, for the largest amount of each set that an arm uses."""
    names = {arm.name: arm.set_name or arm.name for arm in study.arms}
    largest = table.sort_values("synthetic_patches").drop_duplicates(["filter", "synthetic_set"], keep="last")
    rates: dict[str, list[str]] = {}
    for row in largest.to_dict("records"):
        drawn, rejected = int(row["drawn"]), int(row["rejected"])
        share = f"{100 * rejected / max(drawn, 1):.1f}{PERCENT}"
        name = names.get(str(row["arm"]), str(row["synthetic_set"]))
        rates.setdefault(str(row["filter"]), []).append(f"{name} {rejected:,} of {drawn:,} images ({share})")
    for name, told in rates.items():
        which = "all synthetic sets" if len(rates) == 1 else "these sets"
        yield f"The same filter for {which} ({name}); rejected: {', '.join(told)}."
