"""The numbers of a report: differences from the reference arm, tables, and how values are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import numpy as np
import pandas as pd

from counterstain.progress import PERCENT, counted
from counterstain.report.results import CEILING, Results
from counterstain.segmentation.counts import dice, recalls, subtype_variance
from counterstain.storage import csv_of
from counterstain.study.arms import Arm
from counterstain.study.statistics.arm_differences import differences, effects_of, measures_of, spread
from counterstain.study.statistics.significance import Measure
from counterstain.taxonomy import Taxonomy

MAIN = ("dice", "subtype_variance")
PARTS = {"test": "test set", "val": "validation set"}
MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NO-BREAK SPACE}"
NONE = "\N{EN DASH}"  # written where there is no value
NO_INTERVAL = "no interval"
HEADINGS = {
    "dice_slide_mean": "Dice, mean of slides",
    "iou": "IoU",
    "precision": "Precision",
    "subtype_variance_all": "Variance of all subtypes",
    "subtype_variance_ddof1": "Sample variance of subtypes",
    "subtype_variance_slide_mean": "Subtype variance, mean recalls of slides",
}
MOST_RELATIVE = 2.0  # changes of the variance up to +200 % are told in per cent


def fixed(value: float, digits: int) -> str:
    """Write a number with so many decimals."""
    if not math.isfinite(value):
        return NONE
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", MINUS)


def signed(value: float, digits: int) -> str:
    """Write a difference with its sign, except for zero itself (``-0.0`` is slightly below)."""
    if not math.isfinite(value):
        return NONE
    return f"{value:+.{digits}f}".replace("-", MINUS) if value else fixed(value, digits)


def interval(low: float, high: float, digits: int, unit: str = "", form: str = "{} to {}") -> str:
    """Write an interval of differences (``+0.4 to +1.2``), or that there is none."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return NO_INTERVAL
    return form.format(signed(low, digits), signed(high, digits)) + unit


def rate(part: int, whole: int) -> str:
    """Write a part of a whole in per cent (``1.2 %``)."""
    return f"{100 * part / whole:.1f}{PERCENT}" if whole else NONE


def short_p(p: float) -> str:
    """Write a p-value without its name (``0.03``, ``< 0.001``)."""
    return fixed(p, 2 if p >= 0.0995 else 3) if p >= 0.001 else "< 0.001"


def p_text(p: float, corrected: float = math.nan) -> str:
    """Write a p-value and the one corrected for the number of arms (``p = 0.03, corrected 0.21``); empty for NaN."""
    if not math.isfinite(p):
        return ""
    also = f", corrected {short_p(corrected)}" if math.isfinite(corrected) and corrected != p else ""
    return f"p{SPACE}{'' if p < 0.001 else f'={SPACE}'}{short_p(p)}{also}"


def needed_text(number: float, thing: str) -> str:
    """Write how many repeats or patients are needed (``9 repeats``); empty if that is unknown."""
    if math.isinf(number):
        return "not achievable"
    return "" if math.isnan(number) else counted(int(number), thing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """The difference of one arm from the reference arm in one measure, paired by repeat; NaN if unknown.

    What each number is: :mod:`counterstain.study.statistics.arm_differences`.
    """

    n: int = 0
    reference: float = math.nan
    value: float = math.nan
    mean: float = math.nan
    sd: float = math.nan
    min: float = math.nan
    max: float = math.nan
    relative: float = math.nan
    low: float = math.nan
    high: float = math.nan
    relative_low: float = math.nan
    relative_high: float = math.nan
    undefined: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    detectable: float = math.nan
    needed_repeats: float = math.nan
    needed_patients: float = math.nan


UNDEFINED = Effect()
Effects = dict[tuple[str, str], Effect]  # by name of the arm and measure


def effects_on_test(results: Results, *, draws: int = 10_000) -> Effects:
    """Return the differences from the reference arm on the test set, with 95 % intervals, p-values and power.

    Only Dice, subtype variance and recalls have the latter; other measures have only their differences.
    """
    study = results.study
    paired = differences(results.results, study.reference)
    counts = results.counts.loc[results.counts["split"] == "test"]
    measures = _measures(study.taxonomy, counts)
    labels = study.taxonomy.num_labels
    tested = effects_of(counts, study.reference, measures, num_labels=labels, draws=draws)
    joined = paired.loc[paired["split"] == "test"].merge(tested.drop(columns="n"), on=["arm", "measure"], how="left")
    names, rows = [field.name for field in fields(Effect)], joined.to_dict(orient="records")
    return {(row["arm"], row["measure"]): Effect(**{name: row[name] for name in names}) for row in rows}


def _measures(taxonomy: Taxonomy, counts: pd.DataFrame) -> dict[str, Measure]:
    """Return the main measures; a draw without a subtype that the test set has is undefined."""
    pixels = counts.groupby("subtype")[["predicted_background", "predicted_tumour"]].sum().sum(axis=1)
    present = [k for k in taxonomy.counted_ids if pixels.get(k, 0) > 0]

    def variance(table: np.ndarray) -> np.ndarray:
        lacks_one = (table[..., present, :].sum(axis=-1) == 0).any(axis=-1)
        return np.where(lacks_one, np.nan, subtype_variance(table, present))

    def recall_of(subtype: int) -> Measure:
        return lambda table: recalls(table[..., [0, subtype], :])[..., 0]

    found = {f"recall_{s.name}": recall_of(s.id) for s in taxonomy.subtypes}
    return {"dice": dice, "subtype_variance": variance, **found}


class Cell(NamedTuple):
    """One cell: its text, a small note under it, and the value that a column is sorted by."""

    text: str
    note: str = ""
    value: float | None = None


class Row(NamedTuple):
    """One row: its head with short remarks, and its cells."""

    head: str
    cells: tuple[Cell, ...]
    tags: tuple[str, ...] = ()


class Table(NamedTuple):
    """One table; its first column is the head of each row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def plain_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a table of plain values."""
    written = (Row(str(head), tuple(Cell(str(value)) for value in values)) for head, *values in rows)
    return Table(caption, tuple(columns), tuple(written))


def recall_spread(variance: float) -> float:
    """Return the standard deviation of the subtypes' recalls in points, from their variance; NaN stays NaN."""
    return 100 * math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan


def relative_means_something(effect: Effect) -> bool:
    """Whether a change of the variance can be told in per cent: a variance near zero can grow by thousands."""
    ends = (effect.relative, effect.relative_high)
    return math.isfinite(effect.relative) and all(end <= MOST_RELATIVE for end in ends if math.isfinite(end))


def missed_most(results: Results) -> str | None:
    """Return the counted subtype of which the reference arm finds the smallest share of pixels.

    Validation decides where it has any of the subtypes, so that the test set plays no part in the choice.
    """
    table = results.results[results.results["arm"] == results.study.reference]
    counted_ones = [f"recall_{s.name}" for s in results.study.taxonomy.subtypes if s.counted]
    for split in ("val", "test"):
        means = table.loc[table["split"] == split, counted_ones].mean().dropna()
        if len(means):
            return str(means.idxmin()).removeprefix("recall_")
    return None


def first_table(results: Results, effects: Effects, arm: Arm) -> Table:
    """Return what an arm changes for each subtype: the pixels found by the reference arm and by this one."""
    rows, worst = [], missed_most(results)
    for subtype in results.study.taxonomy.subtypes:
        effect = effects.get((arm.name, f"recall_{subtype.name}"), UNDEFINED)
        shares = (effect.reference, effect.value)
        found = [NONE if math.isnan(share) else f"{fixed(100 * share, 1)}{PERCENT}" for share in shares]
        tags = ("missed most",) if subtype.name == worst else ()
        rows.append(Row(subtype.name, (*map(Cell, found), _plain_difference(effect)), tags))
    of_dice, of_variance = (effects.get((arm.name, measure), UNDEFINED) for measure in MAIN)
    scores = [fixed(100 * score, 1) for score in (of_dice.reference, of_dice.value)]
    rows.append(Row(f"Dice of {results.study.taxonomy.tissue_class}", (*map(Cell, scores), _plain_difference(of_dice))))
    spreads = [recall_spread(variance) for variance in (of_variance.reference, of_variance.value)]
    between = Cell(signed(spreads[1] - spreads[0], 1), p_text(of_variance.p))
    rows.append(Row("Spread of the recalls", (*(Cell(fixed(spread, 1)) for spread in spreads), between)))
    caption = (
        f"Share of each subtype's pixels that are found on the {results.tested_on}, means over repeats; Dice (overlap "
        "with the annotation, 100 = perfect) and the standard deviation of the subtypes' recalls, in points; "
        f"[95{PERCENT} interval]"
    )
    return Table(caption, ("Subtype", results.reference.label, arm.label, "Difference in points"), tuple(rows))


def results_table(results: Results, split: str, chosen: Arm | None) -> Table:
    """Return mean and sd of the main measures by arm."""
    part = results.tested_on if split == "test" else PARTS[split]
    caption = f"{part[0].upper()}{part[1:]}: mean ± standard deviation over repeats"
    return _spread_table(results, split, chosen, [*MAIN, *results.recalls], caption)


def further_tables(results: Results, chosen: Arm | None) -> list[Table]:
    """Return mean and sd of every further measure by arm, for the test and the validation set; empty without any."""
    columns = [c for c in measures_of(results.results) if c not in {*MAIN, *results.recalls}]
    return [
        _spread_table(results, split, chosen, columns, f"Further measures, {part}")
        for split, part in PARTS.items()
        if columns
    ]


def _spread_table(results: Results, split: str, chosen: Arm | None, columns: Sequence[str], caption: str) -> Table:
    part = spread(results.results[results.results["split"] == split]).to_dict(orient="records")
    values = {(row["arm"], row["measure"]): (row["mean"], row["sd"]) for row in part}
    rows = []
    for arm in results.arms:
        if (arm.name, columns[0]) in values:
            cells = []
            for column in columns:
                (mean, sd), digits = values[arm.name, column], 4 if "variance" in column else 3
                cells.append(Cell(text=fixed(mean, digits) + _plus_minus(sd, digits), value=_finite(mean)))
            rows.append(Row(head=arm.label, tags=_tags(results, arm, chosen), cells=tuple(cells)))
    return Table(caption=caption, columns=("Arm", *map(_heading, columns)), rows=tuple(rows))


def differences_table(results: Results, effects: Effects, chosen: Arm | None) -> Table:
    """Return the paired differences of every arm from the reference, with intervals."""
    rows = []
    for arm in results.others:
        of_dice, of_variance, *others = (effects.get((arm.name, m)) for m in (*MAIN, *results.recalls))
        points = [_difference(effect, 100, 1) for effect in (of_dice, *others)]
        cells = (points[0], _difference(of_variance, 1, 4), _relative(of_variance), *points[1:])
        rows.append(Row(head=arm.label, tags=_tags(results, arm, chosen), cells=cells))
    caption = (
        f"Differences from {results.reference.label} on the {results.tested_on}, paired by repeat: mean ± standard "
        f"deviation (Dice and recall in points, 1 point = 0.01); [95{PERCENT} interval]; p-value (corrected "
        "for the number of arms)"
    )
    heads = ("Arm", "Dice", "Subtype variance", "Its relative change", *map(_heading, results.recalls))
    return Table(caption=caption, columns=heads, rows=tuple(rows))


def power_table(results: Results, effects: Effects) -> Table:
    """Return how large a study must be to detect each arm's differences."""
    rows = []
    for arm in results.others:
        cells = []
        for measure, scale, digits in zip(MAIN, (100, 1), (1, 4), strict=True):
            effect = effects.get((arm.name, measure), UNDEFINED)
            cells.append(Cell(text=fixed(scale * effect.detectable, digits), value=_finite(effect.detectable)))
            for needed, thing in ((effect.needed_repeats, "repeat"), (effect.needed_patients, "patient")):
                cells.append(Cell(text=needed_text(needed, thing) or NONE, value=_finite(needed)))
        rows.append(Row(head=arm.label, cells=tuple(cells)))
    heads = ("smallest detectable difference", "repeats needed", "patients needed")
    columns = [f"{name}: {head}" for name in ("Dice", "Subtype variance") for head in heads]
    caption = (
        f"Power: the smallest difference this study detects with 80{PERCENT} power (Dice in points), and the number of "
        "repeats (with these patients) or patients (with these repeats) needed to detect the observed difference"
    )
    return Table(caption=caption, columns=("Arm", *columns), rows=tuple(rows))


def filter_table(results: Results) -> Table:
    """Return how many images of each synthetic set the filter rejected."""
    study = results.study
    rows = [
        (study.set_label(name), f"{n.drawn:,}", f"{n.rejected:,}", rate(n.rejected, n.drawn))
        for name, n in study.filter.items()
    ]
    judged = any("filtered" in arm.variants for arm in study.arms)
    also = "; for filtered sets, including those rejected by the judge" if judged else ""
    caption = f"Images rejected by the filter, which is the same for every method{also}"
    return plain_table(caption, ("Synthetic set", "Drawn", "Rejected", "Rate"), rows)


def table_copies(results: Results, effects: Effects, chosen: Arm | None) -> dict[str, dict[str, str]]:
    """Return what can be copied: ``csv`` with every digit, and ``tex`` (booktabs) as on the page, by the table's name.

    Names are ``results-test``, ``results-val`` and, with two arms or more, ``effects``.
    """
    shown = {}
    for split in ("test", "val"):
        part = spread(results.results[results.results["split"] == split])
        shown[f"results-{split}"] = part, results_table(results, split, chosen)
    if effects:
        rows = [{"arm": arm, "measure": measure} | asdict(effect) for (arm, measure), effect in effects.items()]
        shown["effects"] = pd.DataFrame(rows), differences_table(results, effects, chosen)
    return {
        name: {"csv": csv_of(numbers), "tex": _latex(table, label=name)} for name, (numbers, table) in shown.items()
    }


def _latex(table: Table, *, label: str) -> str:
    """Write a table as LaTeX with booktabs, labelled ``tab:LABEL``; small notes get lines of their own."""
    rows = []
    for row in table.rows:
        notes = [cell.note.split("\n") if cell.note else [] for cell in row.cells]
        rows.append([row.head + (f" ({', '.join(row.tags)})" if row.tags else ""), *(cell.text for cell in row.cells)])
        for number in range(max(map(len, notes), default=0)):
            rows.append(["", *(note[number] if number < len(note) else "" for note in notes)])
    caption = table.caption.replace("%", r"\%")
    style = pd.DataFrame(rows, columns=list(table.columns)).style.hide(axis="index").format(escape="latex")
    text = style.format_index(escape="latex", axis=1).to_latex(
        hrules=True,
        column_format="l" + "r" * (len(table.columns) - 1),
        caption=f"{caption}.",
        label=f"tab:{label}",
        environment="table*",
        position_float="centering",
    )
    for character, written in {SPACE: "~", "±": r"$\pm$", MINUS: "$-$", NONE: "--"}.items():
        text = text.replace(character, written)
    return f"% needs \\usepackage{{booktabs}}\n{text}"


def _heading(column: str) -> str:
    if column.startswith("recall_"):
        return f"{column.removeprefix('recall_')} recall"
    return HEADINGS.get(column, column.replace("_", " ").capitalize())


def _tags(results: Results, arm: Arm, chosen: Arm | None) -> tuple[str, ...]:
    reference = arm == results.reference
    baseline = arm.method is None and not arm.variants and not reference
    said = {"reference": reference, "baseline": baseline, "chosen on validation": arm == chosen, CEILING: arm.ceiling}
    return tuple(tag for tag, holds in said.items() if holds)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _plus_minus(sd: float, digits: int) -> str:
    return f" ± {fixed(sd, digits)}" if np.isfinite(sd) else ""


def _difference(effect: Effect | None, scale: float, digits: int) -> Cell:
    if effect is None:
        return Cell(text=NONE)
    text = signed(scale * effect.mean, digits) + _plus_minus(scale * effect.sd, digits)
    ends = interval(scale * effect.low, scale * effect.high, digits, form="[{}, {}]")
    corrected = f" ({short_p(effect.p_holm)})" if math.isfinite(effect.p_holm) else ""
    note = "\n".join(filter(None, (ends, p_text(effect.p) + corrected)))
    return Cell(text=text, note=note, value=effect.mean)


def _plain_difference(effect: Effect) -> Cell:
    ends = interval(100 * effect.low, 100 * effect.high, 1, form="[{}, {}]")
    return Cell(signed(100 * effect.mean, 1), ", ".join(filter(None, (ends, p_text(effect.p)))))


def _relative(effect: Effect | None) -> Cell:
    if effect is None:
        return Cell(text=NONE)
    if not relative_means_something(effect):
        spreads = " to ".join(fixed(recall_spread(variance), 1) for variance in (effect.reference, effect.value))
        return Cell(text=NONE, note=f"spread of recalls\n{spreads} points", value=_finite(effect.relative))
    note = interval(100 * effect.relative_low, 100 * effect.relative_high, 0, PERCENT, form="[{}, {}]")
    return Cell(text=f"{signed(100 * effect.relative, 1)}{PERCENT}", note=note, value=effect.relative)
