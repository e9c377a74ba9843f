"""A learning curve: how a measure grows with the number of training patients, and what more of them could win.

Shapes: S = numbers of training patients, R = repeats, P = patients that were tested on, K = subtypes.
"""

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
from counterstain.seeding import derive, numpy_generator
from counterstain.segmentation.counts import by_slide, dice, measures, recalls
from counterstain.storage import claim, write_csv, write_parquet, write_text
from counterstain.study.plan import Cell, cells_folder, cohort_with_fewer
from counterstain.study.run import locked
from counterstain.study.stages import follow_cohort, is_done, run_cell
from counterstain.taxonomy import Taxonomy

EXPONENTS = np.linspace(0.1, 2.0, 39)  # of the power law; slower and faster ones cannot be told from its ends
MIN_SIZES, MIN_REPEATS, MIN_PATIENTS = 4, 3, 4
STEEP = 0.01  # gain per doubling from which a curve is called steep: one point of Dice or recall
WIDEST = 0.05  # an interval of the gain that is wider says nothing
DRAWS = 500
LEVELS = (2.5, 97.5)

Measure = Callable[[np.ndarray], np.ndarray]  # count tables (…, K + 1, 2) -> values (…)


@dataclass(frozen=True, kw_only=True)
class Step:
    """From one number of training patients to the next."""

    fewer: int
    more: int
    per_doubling: float
    """Gain of the measure, brought to a doubling."""
    low: float
    high: float
    """95 % interval of it, over repeats and tested patients."""

    @property
    def steep(self) -> bool:
        """Whether the gain is a point or more and surely above 0."""
        return self.per_doubling >= STEEP and self.low > 0


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """What a power law, fitted to the curve, promises of twice the patients."""

    patients: int
    gain: float
    low: float
    high: float


def bootstrapped(counts: np.ndarray, measure: Measure, seed: int, draws: int = DRAWS) -> np.ndarray:
    """Draw repeats and tested patients with replacement and return the curve of each draw, (draws, S).

    Parameters
    ----------
    counts : (S, R, P, K + 1, 2) int array
        The same repeats and patients at all sizes, so that differences along a curve are paired.
    """
    rng = numpy_generator(seed, "learning curve")
    _, repeats, patients = counts.shape[:3]
    curves = []
    for _ in range(draws):
        drawn = counts[:, rng.integers(repeats, size=repeats)][:, :, rng.integers(patients, size=patients)]
        curves.append(measure(drawn.sum(axis=2)).mean(axis=1))
    return np.array(curves)


def steps(sizes: Sequence[int], curve: np.ndarray, draws: np.ndarray) -> list[Step]:
    """Return the gain from each size to the next, brought to a doubling.

    Parameters
    ----------
    sizes : sequence of int, rising
    curve : (S,) array
        Mean over repeats.
    draws : (n, S) array
        See :func:`bootstrapped`.
    """
    doublings = np.diff(np.log2(sizes))
    gains, drawn = np.diff(curve) / doublings, np.diff(draws, axis=1) / doublings
    low, high = np.nanpercentile(drawn, LEVELS, axis=0)
    return [
        Step(fewer=a, more=b, per_doubling=float(g), low=float(lo), high=float(hi))
        for a, b, g, lo, hi in zip(sizes[:-1], sizes[1:], gains, low, high, strict=True)
    ]


def fit_power_law(sizes: Sequence[int] | np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """Fit value = a - b n**-c by least squares, b at least 0 and a at most 1; return a, b, c.

    The usual form of learning curves (Figueroa et al. 2012; Hestness et al. 2017).
    """
    x = np.asarray(sizes, float) ** -EXPONENTS[:, None]  # (exponents, S)
    centred = x - x.mean(1, keepdims=True)
    b = np.maximum(-(centred @ values) / (centred**2).sum(1), 0)
    a = values.mean() + b * x.mean(1)
    beyond = a > 1
    b = np.where(beyond, (x @ (1 - values)) / (x**2).sum(1), b)
    a = np.where(beyond, 1.0, a)
    best = int(np.argmin(((a[:, None] - b[:, None] * x - values) ** 2).sum(1)))
    return float(a[best]), float(b[best]), float(EXPONENTS[best])


def extrapolate(
    sizes: Sequence[int], curve: np.ndarray, draws: np.ndarray, *, repeats: int, patients: int
) -> Extrapolation | str:
    """Say what twice the patients would win, with a 95 % interval, or why that cannot be told.

    The interval covers repeats and tested patients, and that the law may have been seen from too few points: each draw
    is fitted without one size, drawn at random. It does not cover patients unlike those at hand, and with three or four
    repeats it is a little narrow.
    """
    why = _too_little(sizes, curve, draws, repeats, patients)
    if why is not None:
        return why
    rng = numpy_generator(0, "sizes left out")
    whole = [draw for draw in draws if not np.isnan(draw).any()]
    gains = []
    for draw in whole:
        kept = np.delete(np.arange(len(sizes)), rng.integers(len(sizes)))
        gains.append(_gain(fit_power_law(np.take(sizes, kept), draw[kept]), sizes[-1]))
    low, high = np.percentile(gains, LEVELS)
    if high - low > WIDEST:
        return f"the interval, {low:+.3f} to {high:+.3f}, is too wide; give more repeats"
    gain = _gain(fit_power_law(sizes, curve), sizes[-1])
    return Extrapolation(patients=2 * sizes[-1], gain=gain, low=float(min(low, gain)), high=float(max(high, gain)))


def _too_little(sizes: Sequence[int], curve: np.ndarray, draws: np.ndarray, repeats: int, patients: int) -> str | None:
    """Return why a curve cannot be extrapolated, if so."""
    for needed, found, what in (
        (MIN_SIZES, len(sizes), "a law needs {} numbers of patients"),
        (MIN_REPEATS, repeats, "an interval needs {} repeats"),
        (MIN_PATIENTS, patients, "an interval needs {} tested patients"),
    ):
        if found < needed:
            return f"{what.format(needed)} or more, here are {found}"
    if np.isnan(curve).any():
        return "some points of the curve are missing"
    low, high = np.nanpercentile(draws[:, -1] - draws[:, -2], LEVELS)
    if high - low > 2 * WIDEST:
        return f"the last step of the curve, {low:+.3f} to {high:+.3f}, is too uncertain; give more repeats"
    return None


def in_words(name: str, found: Sequence[Step], promised: Extrapolation | str) -> list[str]:
    """Say in sentences where a curve is steep, and what more patients could win."""
    steep = [step for step in found if step.steep]
    said = [f"{name}: {_where(found, steep)}."]
    if isinstance(promised, str):
        return [*said, f"What more patients would win cannot be told: {promised}."]
    sure = "" if promised.low > 0 else ", so perhaps nothing"
    interval = f"95 % interval {promised.low:+.3f} to {promised.high:+.3f}{sure}"
    law = f"by the power law through the curve ({interval})"
    return [*said, f"{promised.patients} training patients would win {promised.gain:+.3f} {law}."]


def _where(found: Sequence[Step], steep: Sequence[Step]) -> str:
    last = found[-1]
    end = f"{last.per_doubling:+.3f} per doubling from {last.fewer} to {last.more} patients"
    if not steep:
        flat = "better data can win little that shows"
        open_ = "whether it is flat cannot be told from so few trainings and tested patients"
        return f"no step of the curve is surely a point or more, {end}; {flat if last.high <= STEEP else open_}"
    top = max(steep, key=lambda step: step.per_doubling)
    start = f"steepest from {top.fewer} to {top.more} patients, {top.per_doubling:+.3f} per doubling"
    if last.steep:
        return f"{start}; still steep at the end, {end}: there is room for better data"
    return f"{start}; flat at the end, {end}; look for the effect of better data at {steep[-1].more} patients or fewer"


def _gain(law: tuple[float, float, float], patients: int) -> float:
    _, b, c = law
    return float(b * patients**-c * (1 - 2**-c))


# Headroom: the learning curve of the subtype-sampled baseline, as a small study over cohorts with fewer patients.

SMALLEST = 4

MeasureName = Callable[[np.ndarray], np.ndarray]
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
            {"train_patients": size, "repeat": repeat, "split": config.split} | measures(part, cohort.taxonomy)
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
    measures: dict[str | None, MeasureName] = {None: dice}
    measures |= {s.name: partial(_recall, s.id) for s in taxonomy.subtypes if present[s.id]}
    return [_curve(subtype, measure, counts, sizes, config.seed) for subtype, measure in measures.items()]


def _curve(subtype: str | None, measure: MeasureName, counts: np.ndarray, sizes: Sequence[int], seed: int) -> Curve:
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
