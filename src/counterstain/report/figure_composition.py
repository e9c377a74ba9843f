"""Figures of how many instances and how much area each subtype has."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch as Key

from counterstain.report.arms import figure_label_of
from counterstain.report.figure_style import FAINT, INK, empty, light_grid, new_figure, styled
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
