"""Figures of the results: measures by arm, confusion by subtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from counterstain.report.arms import figure_label_of, is_oracle
from counterstain.report.figure_style import FAINT, INK, colour_of, light_grid, new_figure, styled
from counterstain.report.numbers import fixed, signed
from counterstain.seeding import numpy_generator
from counterstain.study.statistics import CountArray
from counterstain.taxonomy import Taxonomy


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
