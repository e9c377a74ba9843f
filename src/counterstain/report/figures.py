"""The charts of a report: cohort and balance, results by arm, confusion, training curves, learning curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch as Key
from matplotlib.patches import Rectangle

from counterstain.generators.methods import METHODS
from counterstain.report.figure_style import (
    EDGE,
    FAINT,
    INK,
    colour_of,
    empty,
    light_grid,
    new_figure,
    styled,
    subtype_key,
)
from counterstain.report.results import figure_label_of, is_ceiling
from counterstain.report.tables import PARTS, fixed, signed
from counterstain.seeding import numpy_generator
from counterstain.study.arms import Arm
from counterstain.study.statistics.arm_differences import CountArray
from counterstain.taxonomy import Taxonomy

if TYPE_CHECKING:
    from counterstain.study.headroom import Curve, Headroom

MOST_NUMBERS, ROOMY = 24, 15  # bars that have room for a number over them, and for a larger one
POINTS = 150  # of a training curve; more cannot be seen and make a file heavy
COLUMNS = 3  # of panels with training curves
MANY = 12  # lines in a panel; more of them are drawn thinner
MARKERS = ("o", "s", "^", "D", "v", "P")  # told apart in grey as well


@styled
def composition(table: pd.DataFrame, taxonomy: Taxonomy, *, mpp: float | None = None) -> Figure:
    """Draw the share of each subtype in each split, by instances and by area (the paper's figure 2).

    Parameters
    ----------
    table : DataFrame
        Columns split (all missing: the cohort is not split), subtype (name), instances, area_px.
    taxonomy : Taxonomy
        Order and colours of the subtypes.
    mpp : float, optional
        Micrometres per pixel; areas are then written in mm².
    """
    found = _split_names(table)
    parts = [p for p in ("train", "val", "test") if p in set(found)]
    parts += sorted(set(found) - set(parts))
    if not parts:
        return empty("no instances")
    figure = new_figure(4.8)
    upper, lower = figure.subplots(2, 1)
    table = table.assign(split=found)
    instances, area = (
        table.pivot_table(index="split", columns="subtype", values=column, aggfunc="sum")
        .reindex(index=parts, columns=list(taxonomy.names))
        .fillna(0)
        .to_numpy(float)
        for column in ("instances", "area_px")
    )
    mm2 = area * (mpp * 1e-3) ** 2 if mpp else None
    _grouped_bars(upper, instances, taxonomy, [_few_figures(n) for n in instances.T.ravel()])
    _grouped_bars(lower, area, taxonomy, [_few_figures(a) for a in mm2.T.ravel()] if mm2 is not None else [])
    upper.set_title("Instances")
    lower.set_title("Area (mm² over the bars)" if mm2 is not None else "Area")
    for axes, totals, unit in (
        (upper, instances.sum(1), "instances"),
        (lower, area.sum(1), "px") if mm2 is None else (lower, mm2.sum(1), "mm²"),
    ):
        axes.set_xticks(range(len(parts)), [f"{p}: {_short(n)} {unit}" for p, n in zip(parts, totals, strict=True)])
    subtype_key(figure, taxonomy)
    return figure


@styled
def balance(table: pd.DataFrame, taxonomy: Taxonomy) -> Figure:
    """Draw the share of each subtype in the synthetic sets, before and after relabelling.

    Parameters
    ----------
    table : DataFrame
        Columns method (name of the set), subtype (name), instances, area_px, instances_before, area_px_before. Sets
        with the same numbers share a row of the figure.
    taxonomy : Taxonomy
        Order and colours of the subtypes.
    """
    groups = _same_balance(table)
    if not groups:
        return empty("no synthetic set")
    figure = new_figure(0.6 + 2.1 * len(groups))
    rows = figure.subplots(len(groups), 2, sharey=True, squeeze=False)
    for axes_row, (methods, part) in zip(rows, groups, strict=True):
        by_subtype = part.groupby("subtype").sum(numeric_only=True).reindex(taxonomy.names, fill_value=0)
        named = "All methods" if len(groups) == 1 else fill(", ".join(methods), 44)
        for axes, column, title in zip(axes_row, ("instances", "area_px"), ("instances", "area"), strict=True):
            _before_and_after(axes, by_subtype[f"{column}_before"], by_subtype[column], taxonomy)
            axes.set_title(f"{named}: {title}" if column == "instances" else title)
        axes_row[0].set_ylabel("share (%)")
    keys = [
        Key(facecolor="white", hatch="////", label="before relabelling", **EDGE),
        Key(facecolor=FAINT, label="after", **EDGE),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=2)
    return figure


def _split_names(table: pd.DataFrame) -> pd.Series:
    unsplit = "cohort" if table["split"].isna().all() else "no split"
    return table["split"].astype(object).where(table["split"].notna(), unsplit).astype(str)


def _grouped_bars(axes: Axes, values: np.ndarray, taxonomy: Taxonomy, numbers: Sequence[str]) -> None:
    parts, subtypes = values.shape
    shares = _percent(values, axis=1)
    width = 0.84 / subtypes
    for k, subtype in enumerate(taxonomy.subtypes):
        x = np.arange(parts) + (k - (subtypes - 1) / 2) * width
        bars = axes.bar(x, shares[:, k], width, color=subtype.colour, **EDGE)
        if numbers and parts * subtypes <= MOST_NUMBERS:
            axes.bar_label(
                bars, numbers[k * parts : (k + 1) * parts], padding=1.5, fontsize=8 if parts * subtypes <= ROOMY else 7
            )
    axes.set_ylabel("share (%)")
    axes.set_ylim(0, max(shares.max() * 1.15, 1))
    axes.tick_params(axis="x", length=0)
    light_grid(axes, "y")


def _before_and_after(axes: Axes, before: pd.Series, after: pd.Series, taxonomy: Taxonomy) -> None:
    x = np.arange(len(taxonomy.subtypes))
    colours = [s.colour for s in taxonomy.subtypes]
    axes.bar(x - 0.2, _percent(before.to_numpy(float)), 0.38, color="white", hatch="////", **EDGE)
    axes.bar(x + 0.2, _percent(after.to_numpy(float)), 0.38, color=colours, **EDGE)
    axes.axhline(100 / len(x), color=FAINT, linewidth=0.9, linestyle="--")
    many = len(x) > 6
    axes.set_xticks(x, taxonomy.names, rotation=45 if many else 0, ha="right" if many else "center")
    axes.tick_params(axis="x", length=0)
    light_grid(axes, "y")


def _same_balance(table: pd.DataFrame) -> list[tuple[list[str], pd.DataFrame]]:
    """Group sets with the same numbers: methods mostly share their relabelled masks."""
    groups: list[tuple[list[str], pd.DataFrame]] = []
    for method, part in table.groupby("method", sort=False):
        content = part.drop(columns="method").sort_values("subtype").reset_index(drop=True)
        same = next((methods for methods, known in groups if known.equals(content)), None)
        if same is not None:
            same.append(str(method))
        else:
            groups.append(([str(method)], content))
    return groups


def _percent(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    total = values.sum(axis=axis, keepdims=True)
    return 100 * values / np.where(total > 0, total, 1)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"


def _few_figures(value: float) -> str:
    """Write a number that fits over a bar: 0.034, 34, 1,234, 12k, 1.2M."""
    if value < 10_000:
        return _short(value)
    return f"{value / 1e3:.0f}k" if value < 999_500 else f"{value / 1e6:.2g}M"


@styled
def boxplots(results: pd.DataFrame, taxonomy: Taxonomy, *, arms: Sequence[Arm], reference: Arm) -> Figure:
    """Draw Dice and subtype variance of every arm on the test set (the paper's figure 5).

    Box = mean and standard deviation, whiskers = minimum and maximum, dots = repeats, dashed line = reference.

    Parameters
    ----------
    results : DataFrame
        A row per arm, repeat and split; columns dice and subtype_variance.
    taxonomy : Taxonomy
        For the name of the tissue class.
    arms, reference
        From top to bottom; the dashed line.
    """
    figure = new_figure(1.0 + 0.29 * len(arms))
    left, right = figure.subplots(1, 2, sharey=True)
    shown = results.loc[results["split"] == "test"]
    for axes, column in ((left, "dice"), (right, "subtype_variance")):
        for row, arm in enumerate(arms):
            _mean_sd_box(axes, row, shown.loc[shown["arm"] == arm.name, column].dropna().to_numpy(float), arm)
        at_reference = shown.loc[shown["arm"] == reference.name, column].mean()
        axes.axvline(at_reference, color=INK, linewidth=0.8, linestyle="--", zorder=0)
        light_grid(axes, "x")
    left.set_yticks(range(len(arms)), [figure_label_of(arm) for arm in arms])
    left.set_ylim(len(arms) - 0.4, -0.6)
    left.set_title(f"{taxonomy.tissue_class.capitalize()} Dice")
    left.set_xlabel("higher is better")
    right.set_title("Subtype variance of recall")
    right.set_xlabel("lower is better")
    right.tick_params(axis="y", length=0)
    return figure


@styled
def confusion(counts: pd.DataFrame, taxonomy: Taxonomy, *, reference: Arm, arm: Arm | None) -> Figure:
    """Draw the confusion by subtype of two arms on the test set and their difference (the paper's figure 6).

    Tables of pixels pooled over the split, row-normalised, averaged over repeats; in per cent.

    Parameters
    ----------
    counts : DataFrame
        Columns arm, repeat, split, patient, subtype (label), predicted_background, predicted_tumour.
    taxonomy : Taxonomy
        Names of the rows.
    reference, arm : Arm
        Without ``arm`` only the reference is shown.
    """
    pair = [reference] if arm is None else [reference, arm]
    shown = counts.loc[(counts["split"] == "test") & counts["arm"].isin([one.name for one in pair])]
    tables = _row_normalised(shown, taxonomy.num_labels)
    names = ["background", *taxonomy.names]
    figure = new_figure(1.1 + 0.36 * len(names))
    panels = figure.subplots(1, 3 if arm else 1, sharey=True, squeeze=False)[0]
    for axes, one in zip(panels, pair, strict=False):
        _heat(axes, tables[one.name], "Greys", (0, 180), fixed)
        axes.set_title(figure_label_of(one))
    if arm:
        difference = tables[arm.name] - tables[reference.name]
        reach = max(float(np.nanmax(np.abs(difference))), 1.0) * 1.8
        _heat(panels[2], difference, "PuOr_r", (-reach, reach), signed)
        panels[2].set_title("Difference (points)")
    for axes in panels:
        axes.set_xticks([0, 1], ["background", taxonomy.tissue_class])
        axes.set_xlabel("predicted as")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylabel("annotated as")
    return figure


def _mean_sd_box(axes: Axes, row: int, values: np.ndarray, arm: Arm) -> None:
    if not len(values):
        axes.annotate("no result", (0.02, row), xycoords=("axes fraction", "data"), va="center", color=FAINT)
        return
    mean, sd = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
    colour = colour_of(arm.method)
    axes.plot([values.min(), values.max()], [row, row], color=INK, linewidth=0.9, zorder=1, marker="|", markersize=6)
    box = Rectangle((mean - sd, row - 0.28), 2 * sd, 0.56, facecolor=colour, alpha=0.45, edgecolor="none", zorder=2)
    edge = Rectangle((mean - sd, row - 0.28), 2 * sd, 0.56, fill=False, edgecolor=INK, linewidth=0.7, zorder=3)
    edge.set_linestyle("--" if is_ceiling(arm.method) else "-")
    axes.add_patch(box)
    axes.add_patch(edge)
    axes.plot([mean, mean], [row - 0.28, row + 0.28], color=INK, linewidth=1.6, zorder=4, solid_capstyle="butt")
    jitter = numpy_generator(0, "jitter", len(values)).uniform(-0.15, 0.15, len(values))
    axes.plot(
        values, row + jitter, "o", color=INK, markerfacecolor="white", markersize=2.8, markeredgewidth=0.7, zorder=5
    )


def _row_normalised(counts: pd.DataFrame, num_labels: int) -> dict[str, np.ndarray]:
    """Return per cent of each row by arm, (L, 2), averaged over repeats; NaN for a label without pixels."""
    array = CountArray.of(counts, num_labels)
    pooled = array.counts.sum(axis=2).astype(float)  # (A, R, L, 2)
    totals = pooled.sum(axis=-1, keepdims=True)
    shares = 100 * pooled / np.where(totals > 0, totals, np.nan)
    return {arm: shares[a, array.present[a]].mean(axis=0) for a, arm in enumerate(array.arms)}


def _heat(
    axes: Axes, table: np.ndarray, colours: str, limits: tuple[float, float], form: Callable[[float, int], str]
) -> None:
    axes.imshow(table, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        axes.text(column, row, form(value, 1), ha="center", va="center", color=INK)
    axes.set_xticks([-0.5, 0.5, 1.5], minor=True)
    axes.set_yticks(np.arange(len(table) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


@styled
def training_curves(losses: pd.DataFrame, arms: Sequence[Arm]) -> Figure:
    """Draw the losses of every training, with a panel for each loss that has several steps.

    Parameters
    ----------
    losses : DataFrame
        Columns stage (``diffusion``, ``segmenter subtype #0``), step, name, value. Stages with the same first word
        share a panel; curves of more than 150 points are drawn as means over equal numbers of steps.
    arms : sequence of Arm
        For the colours.
    """
    if losses.empty:
        return empty("no training curves")
    of_stage = {stage: _method_of(stage, arms) for stage in losses["stage"].astype(str).unique()}
    table = losses.assign(family=losses["stage"].astype(str).str.partition(" ")[0])
    panels = [panel for panel in table.groupby(["family", "name"], sort=False) if np.ptp(panel[1]["step"]) > 0]
    rows = max(-(-len(panels) // COLUMNS), 1)
    figure = new_figure(0.4 + 1.55 * rows)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, ((family, name), part) in zip(grid, panels, strict=False):
        axes.set_title(f"{family}: {name}", fontsize=8.5)
        lines = list(part.groupby("stage", sort=False))
        for stage, line in lines:
            steps, values = (line[column].to_numpy(float) for column in ("step", "value"))
            _curve(axes, steps, values, colour_of(of_stage[str(stage)]), width=0.9 if len(lines) <= MANY else 0.45)
        _log_if_wide(axes, part["value"].to_numpy(float))
        axes.set_xlabel("step")
        light_grid(axes, "y")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    _method_key(figure, of_stage)
    return figure


def _method_of(stage: str, arms: Sequence[Arm]) -> str | None:
    """Return the method that a training serves, or whose images it is trained on."""
    of_arm = {arm.name: arm.method for arm in arms}
    words = stage.split()
    if len(words) > 1:
        return of_arm.get(words[1])
    makes = ((name, method.trainings[-1]) for name, method in METHODS.items() if method.trainings)
    return next((name for name, training in makes if stage in {training.stage, training.title}), "")


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, width: float) -> None:
    finite = np.isfinite(values)
    order = np.argsort(steps[finite], kind="stable")
    pieces = min(POINTS, max(len(order), 1))
    both = (np.array_split(array[finite][order], pieces) for array in (steps, values))
    means = [(s.mean(), v.mean()) for s, v in zip(*both, strict=True) if len(s)]
    if means:
        x, y = zip(*means, strict=True)
        axes.plot(x, y, color=colour, linewidth=width, alpha=0.85)


def _log_if_wide(axes: Axes, values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() > 50:
        axes.set_yscale("log")


def _method_key(figure: Figure, of_stage: dict[str, str | None]) -> None:
    methods = dict.fromkeys(method for stage, method in of_stage.items() if " " in stage)
    labels = {method: f"{method} (ceiling)" if is_ceiling(method) else method or "baselines" for method in methods}
    keys = [Line2D([], [], color=colour_of(method), linewidth=1.6, label=label) for method, label in labels.items()]
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), title="segmenters trained with")


@styled
def headroom_figure(found: Headroom) -> Figure:
    """Draw learning curves: Dice with its 95 % interval, recalls, every repeat as a dot, the power law dashed."""
    figure = new_figure(3.2)
    left, right = figure.subplots(1, 2)
    colours = {subtype.name: subtype.colour for subtype in found.taxonomy.subtypes}
    for curve, marker in zip(found.curves, cycle(MARKERS)):
        axes = left if curve.subtype is None else right
        _learning_curve(axes, found.sizes, curve, INK if curve.subtype is None else colours[curve.subtype], marker)
    left.set_title(f"{found.taxonomy.tissue_class.capitalize()} Dice")
    right.set_title("Recall by subtype")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(found.sizes, [str(size) for size in found.sizes])
        axes.minorticks_off()
        axes.set_xlabel("training patients")
        axes.set_ylabel(f"on the {PARTS[found.split]}")
        light_grid(axes, "y")
    if right.lines:
        right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _learning_curve(axes: Axes, sizes: Sequence[int], curve: Curve, colour: str, marker: str) -> None:
    mean = curve.scores.mean(axis=1)
    axes.plot(sizes, mean, color=colour, label=curve.subtype, marker=marker, markersize=5, mec=INK, mew=0.5)
    if curve.subtype is None:
        axes.fill_between(sizes, *curve.band, color=colour, alpha=0.12, linewidth=0)
        axes.plot(np.repeat(sizes, curve.scores.shape[1]), curve.scores.ravel(), ".", color=colour, markersize=3)
    n = np.geomspace(sizes[0], 2 * sizes[-1], 60)
    fitted = curve.fitted(sizes, n)
    if fitted is not None:
        axes.plot(n, fitted, color=colour, linestyle="--", linewidth=0.8)
