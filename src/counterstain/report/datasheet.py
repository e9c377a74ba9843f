"""Whether the arms of a study were treated alike, read off what its trainings recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from counterstain.errors import StorageError
from counterstain.generators.methods import METHODS
from counterstain.progress import PERCENT, TIMES, counted
from counterstain.report.formatting import CEILING, NONE, is_oracle, label_of
from counterstain.report.results import SetRecord, StudyRecord, TrainingRecord
from counterstain.report.tables import Cell, Row, Table
from counterstain.study.fairness import COLUMNS, FAIRNESS_FILE, departures, fairness_of


def read_fairness(folder: Path) -> pd.DataFrame:
    """Read ``fairness.csv`` of a results folder, with a row per arm and repeat; empty where it is missing.

    Raises
    ------
    StorageError
        It is damaged.
    """
    if not (folder / FAIRNESS_FILE).exists():
        return pd.DataFrame(columns=list(COLUMNS))
    try:
        return fairness_of(folder)[list(COLUMNS)]
    except (ValueError, KeyError) as error:  # pandas derives its errors from these
        reason = " ".join(str(error).split())[:120]
        file = folder / FAIRNESS_FILE
        raise StorageError(f"{file}: damaged ({reason}); delete it and give the study's command again") from error


def fairness_sentences(table: pd.DataFrame) -> tuple[str, ...]:
    """Say what arms had in common, then in what they differ; empty where the study recorded nothing."""
    return (*_common(table), *(f"Differs: {line}." for line in departures(table))) if len(table) else ()


def _common(table: pd.DataFrame) -> Iterator[str]:
    values = {column: list(dict.fromkeys(table[column].tolist())) for column in table.columns}
    alike = {column: found[0] for column, found in values.items() if len(found) == 1}
    if {"steps", "batch_size"} <= alike.keys():
        yield (
            f"Equal optimiser steps: every segmenter ({len(table)}) took {alike['steps']:,} steps of "
            f"{alike['batch_size']} patches, so no arm wins by more updates."
        )
    if "augmentation" in alike:
        yield f"Equal augmentation of real and synthetic patches in all arms: {alike['augmentation']}."
    if "settings" in alike:
        yield "Equal settings of network, losses and optimiser in all arms."
    if all(len(set(rows["seed"].tolist())) == 1 for _, rows in table.groupby("repeat")):
        repeats = counted(len(values["repeat"]), "repeat")
        yield f"Equal seeds: within each of {repeats} all arms have the same initial weights and order of real patches."
    yield from _filters(table[table["synthetic_patches"] > 0])


def _filters(table: pd.DataFrame) -> Iterator[str]:
    """Say what was refused, by the largest amount that arms use of each set."""
    largest = table.sort_values("synthetic_patches").drop_duplicates(["filter", "synthetic_set"], keep="last")
    rates: dict[str, list[str]] = {}
    for row in largest.to_dict("records"):
        drawn, rejected = int(row["drawn"]), int(row["rejected"])
        share = f"{100 * rejected / max(drawn, 1):.1f}{PERCENT}"
        rates.setdefault(str(row["filter"]), []).append(
            f"{label_of(str(row['synthetic_set']))} {rejected:,} of {drawn:,} images ({share})"
        )
    for name, told in rates.items():
        whom = "all synthetic sets" if len(rates) == 1 else "these sets"
        yield f"One filter for {whom} ({name}); refused: {', '.join(told)}."


# A data sheet of every synthetic set: what it is, where it comes from, what it is good for (Gebru et al. 2021).

INTENDED_USE = (
    "Training of segmenters for this tissue class, beside real patches, where the rare subtypes are too few; methods "
    "research on subtype balance."
)
LIMITS = (
    "Not for diagnosis, for training pathologists, or as evidence of how a tissue looks.",
    "Never for validation or testing: report figures on real tissue alone.",
    "New labels stand in old outlines: shape, neighbours and frequency of the subtypes are not those of real tissue.",
    "A generator keeps what its training patients had: scanner, stain, laboratory, population.",
    "It may repeat their images, and does where it keeps background or nuclei: the data protection holds for the set.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """One data sheet."""

    name: str
    facts: tuple[tuple[str, str], ...]
    changes: Table
    """Instances by old and new subtype."""
    patients: str
    """Every patient behind the set."""
    settings: str
    """YAML."""


def data_sheets(
    sets: Sequence[SetRecord], trainings: Sequence[TrainingRecord], study: StudyRecord
) -> tuple[Sheet, ...]:
    """Return a data sheet of each set."""
    return tuple(_sheet(found, trainings, study) for found in sets)


def _sheet(found: SetRecord, trainings: Sequence[TrainingRecord], study: StudyRecord) -> Sheet:
    trained = next((t for t in trainings if t.sha256 and t.sha256 == found.generator), None)
    method = METHODS.get(found.method)
    recipe = study.config.get("recipe", {})
    described = method.data_sheet(found.settings, recipe) if method and method.data_sheet else {}
    facts = {
        "Method": described.get("Method", found.method),
        "Generator": f"checkpoint {found.generator}" if found.generator else f"none ({CEILING})",
        "Training of the generator": _training(found, trained, study),
        "Patches": f"{found.patches:,} of {found.size_px} {TIMES} {found.size_px} pixels at {found.mpp:g} µm per "
        f"pixel, {found.background_only:,} of them without an instance",
        "Masks from": f"{counted(found.sources.get('region', 0), 'region')} of "
        f"{counted(found.sources.get('patient', 0), 'patient')}, training part of cohort {found.cohort[:16]}",
        "Seed": found.seed,
        "Drawn with": described.get("Drawn with", NONE),
        "Refused": f"{found.rejected:,} of {found.drawn:,} images drawn "
        f"({100 * found.rejected / max(found.drawn, 1):.1f}{PERCENT})",
        "Version": f"counterstain {found.version}",
    }
    return Sheet(
        name=f"{found.name} ({CEILING})" if is_oracle(found.name) else found.name,
        facts=tuple(facts.items()),
        changes=_changes(found, study.taxonomy.names, study.taxonomy.tissue_class),
        patients=", ".join(found.patients_seen),
        settings=yaml.safe_dump(found.settings, sort_keys=False, allow_unicode=True),
    )


def _training(found: SetRecord, trained: TrainingRecord | None, study: StudyRecord) -> str:
    if not found.generator:
        return "none"
    patients = counted(len(found.patients_seen), "patient")
    if trained is None:
        return f"not part of this study; it and the masks saw {patients}"
    source = f"the training part of the cohort “{study.cohort.source}”" if study.cohort.source else "the training part"
    return (
        f"{trained.name}: {trained.steps:,} steps of {trained.batch_size} patches of {source}, "
        f"{counted(trained.patients_seen, 'patient')} seen"
    )


def _changes(found: SetRecord, names: Sequence[str], tissue: str) -> Table:
    """Return the matrix of old by new subtypes, with sums."""
    counts = {(change.before, change.after): change for change in found.changes}
    befores = [name for name in names if any(before == name for before, _ in counts)]
    rows = []
    for before in (*befores, "all"):
        cells = []
        for after in (*names, "all"):
            chosen = [c for (b, a), c in counts.items() if before in {b, "all"} and after in {a, "all"}]
            instances, area = sum(c.instances for c in chosen), sum(c.area_px for c in chosen)
            cells.append(Cell(text=f"{instances:,}", note=_mm2(area, found.mpp), value=instances))
        rows.append(Row(head=before, cells=tuple(cells)))
    caption = f"Instances of {tissue} by old (row) and new subtype (column), with their area"
    return Table(caption=caption, columns=("Old \\ new", *names, "all"), rows=tuple(rows))


def _mm2(area_px: int, mpp: float) -> str:
    return f"{area_px * (mpp * 1e-3) ** 2:.3g} mm²"
