"""Figures of how many instances and how much area each subtype has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch as Key
from matplotlib.patches import Rectangle

from counterstain.report.figure_style import FAINT, INK, colour_of, empty, light_grid, new_figure, styled
from counterstain.report.formatting import figure_label_of, fixed, is_baseline, is_oracle, method_of, signed
from counterstain.seeding import numpy_generator
from counterstain.study.statistics.bootstrap import CountArray
from counterstain.taxonomy import Taxonomy

_PARTS = ("train", "val", "test")
_MOST_NUMBERS = 24  # bars that have room for a number over them
_ROOMY = 15
_KEY_LETTERS = 100  # in a row of the key


@styled
def composition(table: pd.DataFrame, taxonomy: Taxonomy, *, mpp: float | None = None) -> Figure:
    """Draw the share of each subtype in each part, by instances and by area (the paper's figure 2).

    Parameters
    ----------
    table : DataFrame
        Columns split (may be missing values: the whole cohort is one part), subtype (name), instances, area_px.
    taxonomy : Taxonomy
        Order and colours of the subtypes.
    mpp : float, optional
        Micrometres per pixel; areas are then written in mm².

    Returns
    -------
    Figure
    """
    parts = _parts(table)
    if not parts:
        return empty("no instances")
    figure = new_figure(4.8)
    upper, lower = figure.subplots(2, 1)
    instances = _totals(table, parts, taxonomy, "instances")
    area = _totals(table, parts, taxonomy, "area_px")
    mm2 = area * (mpp * 1e-3) ** 2 if mpp else None
    _grouped_bars(upper, instances, taxonomy, [_few_figures(n) for n in instances.T.ravel()])
    _grouped_bars(lower, area, taxonomy, [_few_figures(a) for a in mm2.T.ravel()] if mm2 is not None else [])
    upper.set_title("Instances")
    lower.set_title("Area (mm² over the bars)" if mm2 is not None else "Area")
    upper.set_xticks(
        range(len(parts)), [f"{p}: {n:,.0f} instances" for p, n in zip(parts, instances.sum(1), strict=True)]
    )
    totals = mm2.sum(1) if mm2 is not None else area.sum(1)
    unit = "mm²" if mm2 is not None else "px"
    lower.set_xticks(range(len(parts)), [f"{p}: {_short(n)} {unit}" for p, n in zip(parts, totals, strict=True)])
    _key(figure, taxonomy)
    return figure


@styled
def balance(table: pd.DataFrame, taxonomy: Taxonomy) -> Figure:
    """Draw the share of each subtype in the synthetic sets, before and after relabelling.

    Parameters
    ----------
    table : DataFrame
        Columns method, subtype (name), instances, area_px, instances_before, area_px_before.
    taxonomy : Taxonomy
        Order and colours of the subtypes.

    Returns
    -------
    Figure
        A row for every group of methods with the same numbers: instances on the left, area on the right.
    """
    groups = _same_balance(table)
    if not groups:
        return empty("no synthetic set")
    figure = new_figure(0.6 + 2.1 * len(groups))
    rows = figure.subplots(len(groups), 2, sharey=True, squeeze=False)
    for axes_row, (methods, part) in zip(rows, groups, strict=True):
        by_subtype = part.groupby("subtype").sum(numeric_only=True).reindex(taxonomy.names, fill_value=0)
        named = "All methods" if len(groups) == 1 else fill(", ".join(map(figure_label_of, methods)), 44)
        for axes, column, title in zip(axes_row, ("instances", "area_px"), ("instances", "area"), strict=True):
            _before_and_after(axes, by_subtype[f"{column}_before"], by_subtype[column], taxonomy)
            axes.set_title(f"{named}: {title}" if column == "instances" else title)
        axes_row[0].set_ylabel("share (%)")
    keys = [
        Key(facecolor="white", edgecolor=INK, hatch="////", label="before relabelling"),
        Key(facecolor=FAINT, edgecolor=INK, label="after"),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=2)
    return figure


def _parts(table: pd.DataFrame) -> list[str]:
    found = set(_split_names(table))
    return [p for p in _PARTS if p in found] + sorted(found - set(_PARTS))


def _split_names(table: pd.DataFrame) -> pd.Series:
    unsplit = "cohort" if table["split"].isna().all() else "no part"
    return table["split"].astype(object).where(table["split"].notna(), unsplit).astype(str)


def _totals(table: pd.DataFrame, parts: Sequence[str], taxonomy: Taxonomy, column: str) -> np.ndarray:
    """Sum a column: (parts, K)."""
    sums = table.assign(split=_split_names(table)).pivot_table(
        index="split", columns="subtype", values=column, aggfunc="sum"
    )
    return sums.reindex(index=list(parts), columns=list(taxonomy.names)).fillna(0).to_numpy(float)


def _grouped_bars(axes: Axes, values: np.ndarray, taxonomy: Taxonomy, numbers: Sequence[str]) -> None:
    parts, subtypes = values.shape
    shares = _percent(values, axis=1)
    width = 0.84 / subtypes
    for k, subtype in enumerate(taxonomy.subtypes):
        x = np.arange(parts) + (k - (subtypes - 1) / 2) * width
        bars = axes.bar(x, shares[:, k], width, color=subtype.colour, edgecolor=INK, linewidth=0.6)
        if numbers and parts * subtypes <= _MOST_NUMBERS:
            axes.bar_label(
                bars, numbers[k * parts : (k + 1) * parts], padding=1.5, fontsize=8 if parts * subtypes <= _ROOMY else 7
            )
    axes.set_ylabel("share (%)")
    axes.set_ylim(0, max(shares.max() * 1.15, 1))
    axes.tick_params(axis="x", length=0)
    light_grid(axes, "y")


def _before_and_after(axes: Axes, before: pd.Series, after: pd.Series, taxonomy: Taxonomy) -> None:
    x = np.arange(len(taxonomy.subtypes))
    colours = [s.colour for s in taxonomy.subtypes]
    axes.bar(x - 0.2, _percent(before.to_numpy(float)), 0.38, color="white", edgecolor=INK, hatch="////", linewidth=0.6)
    axes.bar(x + 0.2, _percent(after.to_numpy(float)), 0.38, color=colours, edgecolor=INK, linewidth=0.6)
    axes.axhline(100 / len(x), color=FAINT, linewidth=0.9, linestyle="--")
    many = len(x) > 6
    axes.set_xticks(x, taxonomy.names, rotation=45 if many else 0, ha="right" if many else "center")
    axes.tick_params(axis="x", length=0)
    light_grid(axes, "y")


def _same_balance(table: pd.DataFrame) -> list[tuple[list[str], pd.DataFrame]]:
    """Put methods together whose sets have the same numbers: methods mostly share their relabelled masks."""
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
    """Write a number so that it fits over a bar: 0.034, 34, 1,234, 12k, 1.2M."""
    if value < 10_000:
        return _short(value)
    return f"{value / 1e3:.0f}k" if value < 999_500 else f"{value / 1e6:.2g}M"


def _key(figure: Figure, taxonomy: Taxonomy) -> None:
    rows = -(-sum(len(name) + 9 for name in taxonomy.names) // _KEY_LETTERS)
    keys = [Key(facecolor=s.colour, edgecolor=INK, linewidth=0.6, label=s.name) for s in taxonomy.subtypes]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(-(-len(keys) // rows), 6))


# Figures of the results: measures by arm, confusion by subtype.


@styled
def boxplots(
    results: pd.DataFrame,
    taxonomy: Taxonomy,
    *,
    arms: Sequence[str],
    reference: str,
    split: str = "test",
) -> Figure:
    """Draw Dice and subtype variance of every arm (the paper's figure 5).

    Parameters
    ----------
    results : DataFrame
        A row per arm, repeat and split; columns dice and subtype_variance.
    taxonomy : Taxonomy
        For the name of the tissue class.
    arms : sequence of str
        From top to bottom.
    reference : str
        Its mean is the dashed line.
    split : str
        The part that is shown.

    Returns
    -------
    Figure
        Box = mean and standard deviation, whiskers = minimum and maximum, dots = repeats.
    """
    figure = new_figure(1.0 + 0.29 * len(arms))
    left, right = figure.subplots(1, 2, sharey=True)
    shown = results.loc[results["split"] == split]
    for axes, column in ((left, "dice"), (right, "subtype_variance")):
        for row, arm in enumerate(arms):
            _mean_sd_box(axes, row, shown.loc[shown["arm"] == arm, column].dropna().to_numpy(float), arm)
        at_reference = shown.loc[shown["arm"] == reference, column].mean()
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
def confusion(
    counts: pd.DataFrame,
    taxonomy: Taxonomy,
    *,
    reference: str,
    arm: str | None,
    split: str = "test",
) -> Figure:
    """Draw the confusion by subtype of two arms and their difference (the paper's figure 6).

    Parameters
    ----------
    counts : DataFrame
        Columns arm, repeat, split, patient, subtype (label), predicted_background, predicted_tumour.
    taxonomy : Taxonomy
        Names of the rows.
    reference, arm : str
        The arms; without ``arm`` the reference stands alone.
    split : str
        The part that is shown.

    Returns
    -------
    Figure
        Tables of pixels pooled over the part, row-normalised, averaged over repeats; in percent.
    """
    shown = counts.loc[(counts["split"] == split) & counts["arm"].isin([reference, arm])]
    tables = _row_normalised(shown, taxonomy.num_labels)
    names = ["background", *taxonomy.names]
    figure = new_figure(1.1 + 0.36 * len(names))
    panels = figure.subplots(1, 3 if arm else 1, sharey=True, squeeze=False)[0]
    for axes, of_arm in zip(panels, [reference, arm] if arm else [reference], strict=False):
        _heat(axes, tables[of_arm], "Greys", (0, 180), fixed)
        axes.set_title(figure_label_of(of_arm))
    if arm:
        difference = tables[arm] - tables[reference]
        reach = max(float(np.nanmax(np.abs(difference))), 1.0) * 1.8
        _heat(panels[2], difference, "PuOr_r", (-reach, reach), signed)
        panels[2].set_title("Difference (points)")
    for axes in panels:
        axes.set_xticks([0, 1], ["background", taxonomy.tissue_class])
        axes.set_xlabel("predicted as")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylabel("annotated as")
    return figure


def _mean_sd_box(axes: Axes, row: int, values: np.ndarray, arm: str) -> None:
    if not len(values):
        axes.annotate("no result", (0.02, row), xycoords=("axes fraction", "data"), va="center", color=FAINT)
        return
    mean, sd = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
    colour = colour_of(arm)
    axes.plot([values.min(), values.max()], [row, row], color=INK, linewidth=0.9, zorder=1, marker="|", markersize=6)
    box = Rectangle((mean - sd, row - 0.28), 2 * sd, 0.56, facecolor=colour, alpha=0.45, edgecolor="none", zorder=2)
    edge = Rectangle((mean - sd, row - 0.28), 2 * sd, 0.56, fill=False, edgecolor=INK, linewidth=0.7, zorder=3)
    edge.set_linestyle("--" if is_oracle(arm) else "-")
    axes.add_patch(box)
    axes.add_patch(edge)
    axes.plot([mean, mean], [row - 0.28, row + 0.28], color=INK, linewidth=1.6, zorder=4, solid_capstyle="butt")
    jitter = numpy_generator(0, "jitter", len(values)).uniform(-0.15, 0.15, len(values))
    axes.plot(
        values, row + jitter, "o", color=INK, markerfacecolor="white", markersize=2.8, markeredgewidth=0.7, zorder=5
    )


def _row_normalised(counts: pd.DataFrame, num_labels: int) -> dict[str, np.ndarray]:
    """Return percent of each row by arm, (L, 2), averaged over repeats; NaN for a label without pixels."""
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


# Figure of the training curves: a small panel for every stage and every loss.

_POINTS = 150  # of a line; more cannot be seen and make a file heavy
_COLUMNS = 3
_MANY = 12  # lines in a panel; more of them are drawn thinner


@styled
def training_curves(losses: pd.DataFrame) -> Figure:
    """Draw the losses of every training.

    Parameters
    ----------
    losses : DataFrame
        Columns stage (``diffusion``, ``segmenter subtype #0``), step, name, value. Stages that differ in what follows
        their first word share a panel.

    Returns
    -------
    Figure
        Lines of more than 150 points are means over equal numbers of steps.
    """
    if losses.empty:
        return empty("no training curves")
    table = losses.assign(family=losses["stage"].astype(str).str.partition(" ")[0])
    panels = list(table.groupby(["family", "name"], sort=False))
    rows = -(-len(panels) // _COLUMNS)
    figure = new_figure(0.4 + 1.55 * rows)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes, ((family, name), part) in zip(grid, panels, strict=False):
        axes.set_title(f"{family}: {name}", fontsize=8.5)
        lines = list(part.groupby("stage", sort=False))
        for stage, line in lines:
            steps, values = (line[column].to_numpy(float) for column in ("step", "value"))
            _curve(axes, steps, values, colour_of(_arm(str(stage))), width=0.9 if len(lines) <= _MANY else 0.45)
        _log_if_wide(axes, part["value"].to_numpy(float))
        axes.set_xlabel("step")
        light_grid(axes, "y")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    _method_key(figure, table["stage"])
    return figure


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, width: float) -> None:
    finite = np.isfinite(values)
    order = np.argsort(steps[finite], kind="stable")
    pieces = min(_POINTS, max(len(order), 1))
    means = [(s.mean(), v.mean()) for s, v in _pieces(steps[finite][order], values[finite][order], pieces) if len(s)]
    if means:
        x, y = zip(*means, strict=True)
        axes.plot(x, y, color=colour, linewidth=width, alpha=0.85, marker="o" if len(x) == 1 else "", markersize=3)


def _pieces(steps: np.ndarray, values: np.ndarray, pieces: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(np.array_split(steps, pieces), np.array_split(values, pieces), strict=True))


def _log_if_wide(axes: Axes, values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() > 50:
        axes.set_yscale("log")


def _arm(stage: str) -> str:
    """Return the arm of ``segmenter spade+100 #0``, or the stage itself."""
    words = stage.split()
    return words[1] if len(words) > 1 else stage


def _method_key(figure: Figure, stages: pd.Series) -> None:
    arms = dict.fromkeys(method_of(_arm(stage)) for stage in stages.astype(str).unique() if " " in stage)
    baselines = [m for m in arms if is_baseline(m)]
    named = ([("baselines", baselines[0])] if baselines else []) + [
        (figure_label_of(m), m) for m in arms if m not in baselines
    ]
    keys = [Line2D([], [], color=colour_of(method), linewidth=1.6, label=label) for label, method in named]
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), title="segmenters trained with")


# The figures of the report by name: tables in, matplotlib figures out.
