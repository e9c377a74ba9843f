"""Headroom: the learning curve of the subtype-sampled baseline, as a small study over cohorts with fewer patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import AfterValidator, Field

from counterstain.config import Config
from counterstain.data.cohort import Cohort
from counterstain.errors import InputError
from counterstain.recipe import Recipe
from counterstain.seeding import derive
from counterstain.segmentation.counts import by_slide, dice, recalls
from counterstain.segmentation.evaluate import score
from counterstain.storage import claim, write_csv, write_parquet, write_text
from counterstain.study.learning_curve import Extrapolation, Step, bootstrapped, extrapolate, in_words, steps
from counterstain.study.plan import Cell, cells_folder, cohort_with_fewer
from counterstain.study.run import locked
from counterstain.study.stages import follow_cohort, is_done, run_cell
from counterstain.taxonomy import Taxonomy

SMALLEST = 4

Measure = Callable[[np.ndarray], np.ndarray]
Ran = Callable[[], None]


def _two_numbers(patients: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(patients)) < 2:
        raise ValueError("a curve needs two different numbers or more")
    return patients


class HeadroomConfig(Config):
    """Which points of the learning curve are trained."""

    patients: Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(_two_numbers)] | None = None
    """Numbers of training patients; null = all of them, half, a quarter, … down to about four."""
    repeats: Annotated[int, Field(ge=1, le=1000)] = 3
    """Trainings at each number. A repeat has its own choice of patients and its own seeds; along one repeat larger
    choices hold the smaller ones."""
    split: Literal["val", "test"] = "val"
    """The part that is tested on; looking at ``test`` uses it up for choices."""
    seed: int = 0
    """All seeds derive from it."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The learning curve of one measure."""

    name: str
    subtype: str | None
    """The one whose recall it is."""
    values: np.ndarray  # (S, R)
    draws: np.ndarray  # (n, S)
    steps: list[Step]
    promised: Extrapolation | str


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """The learning curves of a cohort."""

    sizes: tuple[int, ...]
    curves: list[Curve]
    split: str
    taxonomy: Taxonomy

    @property
    def absent(self) -> list[str]:
        """The subtypes that the part tested on does not have."""
        shown = {curve.subtype for curve in self.curves}
        return [name for name in self.taxonomy.names if name not in shown]

    def in_words(self) -> list[str]:
        """Return what the curves say, a few sentences on each."""
        lines = [line for curve in self.curves for line in in_words(curve.name, curve.steps, curve.promised)]
        if self.absent:
            lines.append(f"No recall of {', '.join(self.absent)}: the {self.split} part has none.")
        return lines


def measure_headroom(
    cohort: Cohort, recipe: Recipe, config: HeadroomConfig, out: Path, *, ran: Ran = lambda: None
) -> Headroom:
    """Train and test every point of the curve that is not done, and write the tables.

    Parameters
    ----------
    cohort : Cohort
        With a split; its training part is thinned out.
    recipe : Recipe
        Its segmenter, sampled by subtype, is the baseline.
    config : HeadroomConfig
    out : Path
        Folder; the same call goes on where it was stopped. Gets ``headroom.csv`` (a row per number of patients and
        repeat with every measure), ``counts.parquet`` and ``headroom.txt``.
    ran : callable, optional
        Called after each point.

    Raises
    ------
    InputError
        The training part has fewer patients than asked for, or none.
    MismatchError
        ``out`` belongs to another cohort.
    """
    sizes = sizes_of(config, len(cohort.patients("train")))
    points = plan_headroom(cohort, recipe, config, sizes)
    claim(out, "headroom", {"cohort": cohort.fingerprint})
    root = cells_folder(out)
    with locked(out):
        for point in points:
            follow_cohort(point[0], root)
            for cell in point:
                if not is_done(cell, root):
                    run_cell(cell, root)
            ran()
        table = _counts(points, root, sizes, config.repeats)
        rows = [
            {"train_patients": size, "repeat": repeat, "split": config.split} | score(part, cohort.taxonomy)
            for (size, repeat), part in table.groupby(["train_patients", "repeat"], sort=True)
        ]
        write_csv(out / "headroom.csv", pd.DataFrame(rows))
        curves = _curves(table, cohort.taxonomy, sizes, config)
        found = Headroom(sizes=sizes, curves=curves, split=config.split, taxonomy=cohort.taxonomy)
        write_parquet(out / "counts.parquet", table)
        write_text(out / "headroom.txt", "\n".join(found.in_words()) + "\n")
    return found


def sizes_of(config: HeadroomConfig, available: int) -> tuple[int, ...]:
    """Return the numbers of training patients, rising.

    Raises
    ------
    InputError
        There are too few patients for two points.
    """
    if config.patients is not None:
        return tuple(sorted(set(config.patients)))
    sizes = {available}
    while min(sizes) >= 2 * SMALLEST:
        sizes.add(round(min(sizes) / 2))
    if len(sizes) < 2:
        raise InputError(
            f"{available} training patients are too few to be halved; give numbers, such as --patients 2,{available}"
        )
    return tuple(sorted(sizes))


def plan_headroom(cohort: Cohort, recipe: Recipe, config: HeadroomConfig, sizes: Sequence[int]) -> list[list[Cell]]:
    """Return the cells of every point: its cohort, its segmenter, its evaluation."""
    points = []
    settings = recipe.segmenter.model_dump(mode="json")
    settings["sampling"]["mode"] = "subtype"
    for size in sizes:
        for repeat in range(config.repeats):
            name = f"{size} patients #{repeat}"
            fewer = cohort_with_fewer(cohort, size, derive(config.seed, "patients", repeat))
            segmenter = Cell(
                name=f"segmenter, {name}",
                stage="segmenter",
                settings={
                    "config": settings,
                    "size_px": recipe.size_px,
                    "seed": derive(config.seed, "repeat", repeat),
                    "amount": 0.0,
                },
                inputs={"cohort": fewer.folder},
            )
            scored = Cell(
                name=f"evaluation, {name}",
                stage="evaluation",
                settings={"parts": [config.split]},
                inputs={"cohort": fewer.folder, "segmenter": segmenter.folder},
            )
            points.append([fewer, segmenter, scored])
    return points


def _counts(points: Sequence[Sequence[Cell]], root: Path, sizes: Sequence[int], repeats: int) -> pd.DataFrame:
    tables = []
    for number, point in enumerate(points):
        table = pd.read_parquet(root / point[-1].folder / "counts.parquet")
        size, repeat = divmod(number, repeats)
        tables.append(table.assign(train_patients=sizes[size], repeat=repeat))
    return pd.concat(tables, ignore_index=True)


def _curves(table: pd.DataFrame, taxonomy: Taxonomy, sizes: Sequence[int], config: HeadroomConfig) -> list[Curve]:
    """Return the curves of Dice and of the recall of every subtype that the tested patients have."""
    counts = np.array(
        [
            [
                _by_patient(table[(table["train_patients"] == size) & (table["repeat"] == repeat)])
                for repeat in range(config.repeats)
            ]
            for size in sizes
        ]
    )  # (S, R, P, K + 1, 2)
    present = counts[0, 0].sum(axis=(0, 2)) > 0
    measures: dict[str | None, Measure] = {None: dice}
    measures |= {s.name: partial(_recall, s.id) for s in taxonomy.subtypes if present[s.id]}
    return [_curve(subtype, measure, counts, sizes, config.seed) for subtype, measure in measures.items()]


def _curve(subtype: str | None, measure: Measure, counts: np.ndarray, sizes: Sequence[int], seed: int) -> Curve:
    values = measure(counts.sum(axis=2))
    draws = bootstrapped(counts, measure, seed)
    repeats, patients = counts.shape[1:3]
    mean = values.mean(axis=1)
    promised = extrapolate(sizes, mean, draws, repeats=repeats, patients=patients)
    name = f"Recall of {subtype}" if subtype else "Dice"
    return Curve(
        name=name, subtype=subtype, values=values, draws=draws, steps=steps(sizes, mean, draws), promised=promised
    )


def _by_patient(table: pd.DataFrame) -> np.ndarray:
    """Return the count tables of a long form added up by patient, (P, K + 1, 2)."""
    return np.array([by_slide(of_patient).sum(axis=0) for _, of_patient in table.groupby("patient", sort=True)])


def _recall(subtype: int, counts: np.ndarray) -> np.ndarray:
    found: np.ndarray = recalls(counts)[..., subtype - 1]
    return found
