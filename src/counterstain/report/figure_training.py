"""Figure of the training curves: a small panel for every stage and every loss."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from counterstain.report.arms import figure_label_of, is_baseline, method_of
from counterstain.report.figure_style import colour_of, empty, light_grid, new_figure, styled

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
