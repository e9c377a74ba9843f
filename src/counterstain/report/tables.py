"""The tables of the page, as records that its template writes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from counterstain.progress import PERCENT
from counterstain.report.effects import MAIN, UNDEFINED, Effects, both_p_text, needed_text
from counterstain.report.formatting import (
    CEILING,
    NONE,
    bracketed,
    duration,
    fixed,
    is_baseline,
    is_oracle,
    label_of,
    signed,
    span,
)
from counterstain.report.results import Results
from counterstain.study.statistics.arm_differences import measures_of, spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell."""

    text: str
    note: str = ""
    """Small, under the text."""
    value: float | None = None
    """What a column is sorted by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row."""

    head: str
    tags: tuple[str, ...] = ()
    """Short remarks beside the head."""
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table; its first column is the head of each row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def results_table(results: Results, split: str, chosen: str | None) -> Table:
    """Return mean and sd of the main measures by arm."""
    columns = ["dice", "subtype_variance", *results.recalls]
    part = {"test": "Test part", "val": "Validation part"}[split]
    return _spread_table(results, split, chosen, columns, f"{part}: mean ± standard deviation over repeats")


def variants_table(results: Results, split: str, chosen: str | None) -> Table | None:
    """Return mean and sd of every further measure by arm; None if there is none."""
    main = {"dice", "subtype_variance", *results.recalls}
    columns = [column for column in measures_of(results.results) if column not in main]
    part = {"test": "test", "val": "validation"}[split]
    return _spread_table(results, split, chosen, columns, f"Further measures, {part} part") if columns else None


def differences_table(results: Results, effects: Effects, chosen: str | None) -> Table:
    """Return the paired differences of every arm to the reference, with intervals."""
    subtypes = zip(results.study.taxonomy.names, results.recalls, strict=True)
    recalls = {f"{name} recall": column for name, column in subtypes}
    heads = ["Dice", "Subtype variance", "Subtype variance, relative", *recalls]
    rows = [
        Row(
            head=label_of(arm),
            tags=_tags(results, arm, chosen),
            cells=(
                _points(effects, arm, "dice"),
                _absolute(effects, arm),
                _relative(effects, arm),
                *(_points(effects, arm, column) for column in recalls.values()),
            ),
        )
        for arm in results.arms
        if arm != results.study.reference
    ]
    caption = (
        f"Differences to {label_of(results.study.reference)} on the test part, paired by repeat: mean ± standard "
        f"deviation (Dice and recall in points, 1 point = 0.01); smallest, largest repeat; [95{PERCENT} interval]; "
        "p-value, and corrected for the number of arms"
    )
    return Table(caption=caption, columns=("Arm", *heads), rows=tuple(rows))


def power_table(results: Results, effects: Effects) -> Table:
    """Return what a study would have to be to see each arm's differences."""
    rows = []
    for arm in (arm for arm in results.arms if arm != results.study.reference):
        cells = []
        for measure, scale, digits in zip(MAIN, (100, 1), (1, 4), strict=True):
            effect = effects.get((arm, measure), UNDEFINED)
            cells.append(Cell(text=fixed(scale * effect.detectable, digits), value=_finite(effect.detectable)))
            for needed, thing in ((effect.needed_repeats, "repeat"), (effect.needed_patients, "patient")):
                cells.append(Cell(text=needed_text(needed, thing) or NONE, value=_finite(needed)))
        rows.append(Row(head=label_of(arm), cells=tuple(cells)))
    heads = ("smallest difference seen", "repeats needed", "patients needed")
    columns = [f"{name}: {head}" for name in ("Dice", "Subtype variance") for head in heads]
    caption = (
        f"Power: the smallest difference that this study sees in 80{PERCENT} of cases (Dice in points), and how many "
        "repeats (with these patients) or patients (with these repeats) would see the observed difference"
    )
    return Table(caption=caption, columns=("Arm", *columns), rows=tuple(rows))


def filter_table(results: Results) -> Table:
    """Return how many images of each method the filter rejected."""
    rows = [
        Row(
            head=f"{method} ({CEILING})" if is_oracle(method) else method,
            cells=(
                Cell(text=f"{count.drawn:,}", value=count.drawn),
                Cell(text=f"{count.rejected:,}", value=count.rejected),
                Cell(text=f"{100 * count.rejected / count.drawn:.1f}{PERCENT}" if count.drawn else NONE),
            ),
        )
        for method, count in results.study.filter.items()
    ]
    judged = any("filtered" in name for name in results.study.filter)
    of_judge = "; of filtered sets also those that the judge refused" if judged else ""
    caption = f"Images that the filter rejected; it is the same for every method{of_judge}"
    return Table(caption=caption, columns=("Method", "Drawn", "Rejected", "Rate"), rows=tuple(rows))


def times_table(results: Results) -> Table:
    """Return how long each stage took."""
    rows = [
        Row(head=stage, cells=(Cell(text=duration(seconds), value=seconds),))
        for stage, seconds in results.study.seconds.items()
    ]
    return Table(caption="Time by stage", columns=("Stage", "Time"), rows=tuple(rows))


def versions_table(results: Results) -> Table:
    """Return the versions of the packages."""
    rows = [Row(head=name, cells=(Cell(text=version),)) for name, version in results.study.versions.items()]
    return Table(caption="Versions", columns=("Package", "Version"), rows=tuple(rows))


def _spread_table(results: Results, split: str, chosen: str | None, columns: Sequence[str], caption: str) -> Table:
    part = spread(results.results[results.results["split"] == split]).to_dict(orient="records")
    values = {(row["arm"], row["measure"]): (row["mean"], row["sd"]) for row in part}
    arms = [arm for arm in results.arms if (arm, columns[0]) in values]
    rows = [
        Row(
            head=label_of(arm),
            tags=_tags(results, arm, chosen),
            cells=tuple(_mean_sd(*values[arm, column], digits=4 if "variance" in column else 3) for column in columns),
        )
        for arm in arms
    ]
    return Table(caption=caption, columns=("Arm", *map(_heading, columns)), rows=tuple(rows))


def _heading(column: str) -> str:
    if column == "dice":
        return "Dice"
    if column.startswith("recall_"):
        return f"{column.removeprefix('recall_')} recall"
    return column.replace("_", " ").capitalize()


def _tags(results: Results, arm: str, chosen: str | None) -> tuple[str, ...]:
    said = {
        "reference": arm == results.study.reference,
        "baseline": is_baseline(arm) and arm != results.study.reference,
        "chosen on validation": arm == chosen,
        CEILING: is_oracle(arm),
    }
    return tuple(tag for tag, holds in said.items() if holds)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _mean_sd(mean: float, sd: float, digits: int) -> Cell:
    text = fixed(mean, digits) + (f" ± {fixed(sd, digits)}" if np.isfinite(sd) else "")
    return Cell(text=text, value=mean if np.isfinite(mean) else None)


def _points(effects: Effects, arm: str, measure: str) -> Cell:
    return _difference(effects, arm, measure, scale=100, digits=1)


def _absolute(effects: Effects, arm: str) -> Cell:
    return _difference(effects, arm, "subtype_variance", scale=1, digits=4)


def _difference(effects: Effects, arm: str, measure: str, *, scale: float, digits: int) -> Cell:
    if (arm, measure) not in effects:
        return Cell(text=NONE)
    effect = effects[arm, measure]
    sd = f" ± {fixed(scale * effect.sd, digits)}" if np.isfinite(effect.sd) else ""
    text = signed(scale * effect.mean, digits) + sd
    between = span(scale * effect.min, scale * effect.max, digits)
    p = both_p_text(effect)
    note = f"{between}\n{bracketed(scale * effect.low, scale * effect.high, digits)}" + (f"\n{p}" if p else "")
    return Cell(text=text, note=note, value=effect.mean)


def _relative(effects: Effects, arm: str) -> Cell:
    if (arm, "subtype_variance") not in effects:
        return Cell(text=NONE)
    effect = effects[arm, "subtype_variance"]
    note = bracketed(100 * effect.relative_low, 100 * effect.relative_high, 0, PERCENT)
    return Cell(text=f"{signed(100 * effect.relative, 1)}{PERCENT}", note=note, value=effect.relative)
