"""Headroom: the learning curve of the subtype-sampled baseline, and what more training patients would gain.

Other arms, such as synthetic patches alone, are trained on the same patients and compared with it.

Shapes: S = numbers of training patients, R = repeats, P = test patients, K = subtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import AfterValidator, Field

from counterstain.config import Config, build
from counterstain.data.cohort import Cohort
from counterstain.errors import ConfigError, InputError
from counterstain.generators.methods import METHODS
from counterstain.recipe import Recipe
from counterstain.seeding import derive, numpy_generator
from counterstain.segmentation.counts import by_slide, dice, measures, recalls
from counterstain.storage import claim, write_csv, write_parquet, write_text
from counterstain.study.arms import Arm, parse_arm
from counterstain.study.cells import CELLS, REFERENCE, Cell, cohort_with_fewer, trained_and_scored
from counterstain.study.config import StudyConfig, lacking
from counterstain.study.plan import plan_arm
from counterstain.study.run import locked
from counterstain.study.stages import follow_cohort, run_cell
from counterstain.study.statistics.significance import Measure
from counterstain.study.status import is_done
from counterstain.taxonomy import Taxonomy

SMALLEST = 4  # patients; the default curve halves down to about this number
EXPONENTS = np.linspace(0.1, 2.0, 39)  # of the power law
MIN_SIZES, MIN_REPEATS, MIN_PATIENTS = 4, 3, 4
STEEP = 0.01  # gain per doubling from which a curve is called steep: one point of Dice or recall
WIDEST = 0.05  # an interval of the gain that is wider is not shown
DRAWS = 500
BASELINE = Arm()
LEVELS = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True)
class Step:
    """From one number of training patients to the next: the gain per doubling, with its 95 % interval."""

    fewer: int
    more: int
    per_doubling: float
    low: float
    high: float

    @property
    def steep(self) -> bool:
        """Whether the gain is a point or more and its interval excludes zero."""
        return self.per_doubling >= STEEP and self.low > 0


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """The gain that a power law, fitted to the curve, predicts for twice the patients."""

    patients: int
    gain: float
    low: float
    high: float


def bootstrapped(counts: np.ndarray, measure: Measure, seed: int, draws: int = DRAWS) -> np.ndarray:
    """Draw repeats and test patients of (S, R, P, K + 1, 2) counts and return the curve of each draw, (draws, S).

    They are drawn with replacement, the same at all sizes, so that differences along a curve are paired.
    """
    rng = numpy_generator(seed, "learning curve")
    _, repeats, patients = counts.shape[:3]
    curves = []
    for _ in range(draws):
        drawn = counts[:, rng.integers(repeats, size=repeats)][:, :, rng.integers(patients, size=patients)]
        curves.append(measure(drawn.sum(axis=2)).mean(axis=1))
    return np.array(curves)


def steps(sizes: Sequence[int], curve: np.ndarray, draws: np.ndarray) -> list[Step]:
    """Return the gain per doubling from each size to the next, from a curve, (S,), and its draws, (n, S)."""
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


def _gain(sizes: Sequence[int] | np.ndarray, values: np.ndarray, patients: int) -> float:
    """Return what the fitted law gains from this number of patients to twice as many."""
    _, b, c = fit_power_law(sizes, values)
    return float(b * patients**-c * (1 - 2**-c))


def extrapolate(
    sizes: Sequence[int], curve: np.ndarray, draws: np.ndarray, *, repeats: int, patients: int
) -> Extrapolation | str:
    """Return the gain from twice the patients with a 95 % interval, or why it cannot be estimated.

    The interval covers repeats, test patients, and the uncertainty of a law fitted to few points: each draw is fitted
    without one size, chosen at random. It does not cover patients unlike these, and with three or four repeats it is
    slightly too narrow.
    """
    for needed, found, what in (
        (MIN_SIZES, len(sizes), "a power law needs at least {} numbers of patients"),
        (MIN_REPEATS, repeats, "an interval needs at least {} repeats"),
        (MIN_PATIENTS, patients, "an interval needs at least {} test patients"),
    ):
        if found < needed:
            return f"{what.format(needed)}, found {found}"
    if np.isnan(curve).any():
        return "some points of the curve are missing"
    low, high = np.nanpercentile(draws[:, -1] - draws[:, -2], LEVELS)
    if high - low > 2 * WIDEST:
        return f"the last step of the curve, {low:+.3f} to {high:+.3f}, is too uncertain; use more repeats"
    rng = numpy_generator(0, "sizes left out")
    gains = []
    for draw in draws[~np.isnan(draws).any(axis=1)]:
        kept = np.delete(np.arange(len(sizes)), rng.integers(len(sizes)))
        gains.append(_gain(np.take(sizes, kept), draw[kept], sizes[-1]))
    low, high = np.percentile(gains, LEVELS)
    if high - low > WIDEST:
        return f"the interval, {low:+.3f} to {high:+.3f}, is too wide; use more repeats"
    gain = _gain(sizes, curve, sizes[-1])
    return Extrapolation(patients=2 * sizes[-1], gain=gain, low=float(min(low, gain)), high=float(max(high, gain)))


def in_words(name: str, found: Sequence[Step], predicted: Extrapolation | str) -> list[str]:
    """Say in sentences where a curve is steep, and what more patients would gain."""
    said = f"{name}: {_where(found)}."
    if isinstance(predicted, str):
        return [said, f"The gain from more patients cannot be estimated: {predicted}."]
    unsure = "" if predicted.low > 0 else ", so possibly none"
    interval = f"95 % interval {predicted.low:+.3f} to {predicted.high:+.3f}{unsure}"
    law = f"With {predicted.patients} training patients, the power law fitted to the curve predicts a gain of"
    return [said, f"{law} {predicted.gain:+.3f} ({interval})."]


def compared(curve: Curve, base: Curve, sizes: Sequence[int]) -> list[str]:
    """Say how far an arm's Dice is from the baseline's on the same patients, and of how many real ones it is."""
    mean, real = curve.scores.mean(axis=1), base.scores.mean(axis=1)
    (low, high), repeats = np.nanpercentile(curve.draws - base.draws, LEVELS, axis=0), curve.scores.shape[1]
    sure = repeats >= MIN_REPEATS and curve.patients >= MIN_PATIENTS
    few = "" if sure else f" ({repeats} repeats and {curve.patients} patients are too few for intervals)"
    lines = [f"{curve.arm.label} against {base.arm.label}, Dice{few}:"]
    for size, gain, score, *ends in zip(sizes, mean - real, mean, low, high, strict=True):
        interval = f" (95 % interval {ends[0]:+.3f} to {ends[1]:+.3f})" if sure else ""
        worth = ""
        if (np.diff(real) > 0).all() and curve.arm.only:
            found = f"about {2 ** np.interp(score, real, np.log2(sizes)):.0f}"
            found = f"under {sizes[0]}" if score <= real[0] else f"{sizes[-1]} or more" if score >= real[-1] else found
            worth = f"; real patches of {found} patients do as well"
        lines.append(f"  {size} patients: {gain:+.3f}{interval}{worth}")
    return lines


def _where(found: Sequence[Step]) -> str:
    last, steep = found[-1], [step for step in found if step.steep]
    end = f"{last.per_doubling:+.3f} per doubling from {last.fewer} to {last.more} patients"
    if not steep:
        flat = "better data can bring little measurable gain"
        fallen = "it falls, which more patients do not explain: give more --repeats"
        unclear = "too few trainings and test patients to tell whether the curve is flat"
        why = fallen if last.per_doubling <= -STEEP else flat if last.high <= STEEP else unclear
        return f"no step of the curve is significantly a point or more, {end}; {why}"
    top = max(steep, key=lambda step: step.per_doubling)
    start = f"steepest from {top.fewer} to {top.more} patients, {top.per_doubling:+.3f} per doubling"
    if last.steep:
        return f"{start}; still steep at the end, {end}: better data can help"
    return f"{start}; flat at the end, {end}; test better data with {steep[-1].more} training patients or fewer"


def _two_numbers(patients: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(patients)) < 2:
        raise ValueError("a curve needs at least two different numbers")
    return patients


def _others(arms: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(parse_arm(name).name for name in arms if name != REFERENCE))


class HeadroomConfig(Config):
    """Which points of the learning curve are trained."""

    patients: Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(_two_numbers)] | None = None
    """Numbers of training patients; null = all of them, half, a quarter, … down to about four."""
    repeats: Annotated[int, Field(ge=1, le=1000)] = 3
    """Trainings per number of patients, each with its own patients and seeds. Within a repeat, larger choices of
    patients contain the smaller ones."""
    split: Literal["val", "test"] = "val"
    """Split to evaluate on; a choice made after viewing ``test`` is a choice on the test set."""
    seed: int = 0
    """All seeds derive from it."""
    arms: Annotated[tuple[str, ...], AfterValidator(_others)] = ()
    """Arms beside ``subtype``, by name, for example ``diffusion+only``: generators are trained on the same patients."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The learning curve of Dice, or of the recall of a subtype."""

    subtype: str | None
    scores: np.ndarray  # (S, R)
    draws: np.ndarray  # (n, S)
    steps: list[Step]
    predicted: Extrapolation | str
    patients: int = MIN_PATIENTS  # patients tested on that have it; of one alone nothing is claimed
    arm: Arm = BASELINE

    @property
    def band(self) -> np.ndarray:
        """Ends of the 95 % interval at each size, (2, S)."""
        ends: np.ndarray = np.nanpercentile(self.draws, LEVELS, axis=0)
        return ends

    def fitted(self, sizes: Sequence[int], patients: np.ndarray) -> np.ndarray | None:
        """Return the power law at some numbers of patients; None if it cannot be extrapolated."""
        if isinstance(self.predicted, str):
            return None
        a, b, c = fit_power_law(sizes, self.scores.mean(axis=1))
        fitted: np.ndarray = a - b * patients**-c
        return fitted


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """The learning curves of a cohort."""

    sizes: tuple[int, ...]
    curves: list[Curve]
    split: str
    taxonomy: Taxonomy

    def in_words(self) -> list[str]:
        """Return what the curves say, a few sentences on each."""
        lines = []
        base = {curve.subtype: curve for curve in self.curves if curve.arm == BASELINE}
        for curve in self.curves:
            name = f"Recall of {curve.subtype}" if curve.subtype else "Dice"
            if curve.patients == 1:
                lines.append(f"{name}: measured on a single patient, so the curve says nothing about other patients.")
            elif curve.arm == BASELINE:
                lines += in_words(name, curve.steps, curve.predicted)
            elif curve.subtype is None:
                lines += compared(curve, base[None], self.sizes)
        shown = {curve.subtype for curve in self.curves}
        absent = [name for name in self.taxonomy.names if name not in shown]
        if absent:
            where = {"val": "validation", "test": "test"}[self.split]
            lines.append(f"No recall of {', '.join(absent)}: absent from the {where} set.")
        return lines


def measure_headroom(
    cohort: Cohort, recipe: Recipe, config: HeadroomConfig, out: Path, *, ran: Callable[[], None] = lambda: None
) -> Headroom:
    """Train and test the recipe's segmenter at every point of the curve that is not done, and write the tables.

    If interrupted, the same call continues. ``ran`` is called after each point. The folder ``out`` gets
    ``headroom.csv`` (a row per arm, number of patients and repeat with every measure), ``counts.parquet`` and
    ``headroom.txt``.

    Raises InputError where the training split has fewer patients than requested, or none; ConfigError where an arm
    needs something that is not here; MismatchError where ``out`` belongs to another cohort.
    """
    sizes = sizes_of(config, len(cohort.patients("train")))
    points = plan_headroom(cohort, recipe, config, sizes)
    if config.arms and (lines := lacking(recipe, (cell for *_, point in points for cell in point))):
        raise ConfigError("; ".join(lines))
    claim(out, "headroom", {"cohort": cohort.fingerprint})
    root = out / CELLS
    tables = []
    with locked(out):
        for arm, size, repeat, point in points:
            follow_cohort(point[0], root)
            for cell in point:
                if not is_done(cell, root):
                    run_cell(cell, root)
            counts = pd.read_parquet(root / point[-1].folder / "counts.parquet")
            tables.append(counts.assign(arm=arm.name, train_patients=size, repeat=repeat))
            ran()
        table = pd.concat(tables, ignore_index=True)
        keys = ["arm", "train_patients", "repeat"]
        rows = [
            dict(zip(keys, of, strict=True)) | {"split": config.split} | measures(part, cohort.taxonomy)
            for of, part in table.groupby(keys, sort=False)
        ]
        write_csv(out / "headroom.csv", pd.DataFrame(rows))
        by_arm = table.groupby("arm", sort=False)
        curves = [curve for name, t in by_arm for curve in _curves(t, cohort.taxonomy, sizes, config, str(name))]
        found = Headroom(sizes=sizes, curves=curves, split=config.split, taxonomy=cohort.taxonomy)
        write_parquet(out / "counts.parquet", table)
        write_text(out / "headroom.txt", "\n".join(found.in_words()) + "\n")
    return found


def sizes_of(config: HeadroomConfig, available: int) -> tuple[int, ...]:
    """Return the numbers of training patients, rising.

    Raises InputError where there are too few patients for two points.
    """
    if config.patients is not None:
        return tuple(sorted(set(config.patients)))
    sizes = [available]
    while sizes[-1] >= 2 * SMALLEST:
        sizes.append(round(sizes[-1] / 2))
    if len(sizes) < 2:
        raise InputError(
            f"{available} training patients are too few for a curve of halves; give numbers, such as "
            f"--patients 2,{available}"
        )
    return tuple(reversed(sizes))


def plan_headroom(
    cohort: Cohort, recipe: Recipe, config: HeadroomConfig, sizes: Sequence[int]
) -> list[tuple[Arm, int, int, list[Cell]]]:
    """Return arm, number of patients, repeat and cells (cohort first, evaluation last) of every point.

    Repeats differ by their patients. Where all are used, they share a generator, as the repeats of a study do.
    """
    points: list[tuple[Arm, int, int, list[Cell]]] = []
    segmenter = recipe.segmenter.model_dump(mode="json")
    segmenter["sampling"]["mode"] = REFERENCE
    given = {"baselines": [REFERENCE], "methods": [], "extra_arms": config.arms, "seed": config.seed}
    source = {"path": str(cohort.folder)}
    study = build(StudyConfig, {"name": "headroom", "cohort": source, **given}, "headroom: arms")
    for method in {arm.method: None for arm in study.arms if arm.method is not None}:
        METHODS[method].check(recipe)
    for arm in study.arms:
        for size in sizes:
            shared = arm.method is not None and size == (cohort.regions.query("split == 'train'")["patient"].nunique())
            for repeat in range(config.repeats):
                chosen = derive(config.seed, "patients", 0 if shared else repeat)
                fewer = cohort_with_fewer(cohort, size, chosen)
                if arm.name == REFERENCE:
                    seed = derive(config.seed, "repeat", repeat)
                    settings = {"config": segmenter, "size_px": recipe.size_px, "seed": seed, "amount": 0.0}
                    inputs = {"cohort": fewer.folder}
                    made = trained_and_scored(f"of {size} patients #{repeat}", settings, inputs, [config.split])
                else:
                    made = plan_arm(study, recipe, fewer, arm, repeat=repeat, parts=[config.split])
                points.append((arm, size, repeat, [fewer, *made]))
    return points


def _curves(
    table: pd.DataFrame, taxonomy: Taxonomy, sizes: Sequence[int], config: HeadroomConfig, arm: str
) -> list[Curve]:
    """Return the curves of Dice and of the recall of every subtype that the test patients have."""
    by_patient = [
        by_slide(part).sum(axis=0) for _, part in table.groupby(["train_patients", "repeat", "patient"], sort=True)
    ]
    counts = np.reshape(by_patient, (len(sizes), config.repeats, -1, *by_patient[0].shape))  # (S, R, P, K + 1, 2)
    having = (counts[0, 0].sum(axis=-1) > 0).sum(axis=0).tolist()  # patients by label
    measured: list[tuple[str | None, Measure, int]] = [(None, dice, counts.shape[2])]
    measured += [(s.name, partial(_recall, s.id), having[s.id]) for s in taxonomy.subtypes if having[s.id]]
    curves = [_curve(name, measure, counts, sizes, patients=n, seed=config.seed) for name, measure, n in measured]
    return [replace(curve, arm=parse_arm(arm)) for curve in curves]


def _recall(subtype: int, counts: np.ndarray) -> np.ndarray:
    return recalls(counts)[..., subtype - 1]


def _curve(
    subtype: str | None, measure: Measure, counts: np.ndarray, sizes: Sequence[int], *, patients: int, seed: int
) -> Curve:
    values, draws = measure(counts.sum(axis=2)), bootstrapped(counts, measure, seed)
    mean = values.mean(axis=1)
    predicted = extrapolate(sizes, mean, draws, repeats=counts.shape[1], patients=patients)
    found = steps(sizes, mean, draws)
    return Curve(subtype=subtype, scores=values, draws=draws, steps=found, predicted=predicted, patients=patients)
