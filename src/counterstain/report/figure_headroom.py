"""The learning curve as a figure: Dice and the recall of every subtype over the number of training patients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from counterstain.report.figure_style import INK, light_grid, new_figure, styled
from counterstain.study.learning_curve import LEVELS, fit_power_law

if TYPE_CHECKING:
    from counterstain.study.headroom import Curve, Headroom

MARKERS = ("o", "s", "^", "D", "v", "P")  # told apart in grey as well
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito


@styled
def headroom_figure(found: Headroom) -> Figure:
    """Draw Dice with its 95 % interval, every repeat as a dot, the power law dashed to twice the patients; recalls."""
    figure = new_figure(3.2)
    left, right = figure.subplots(1, 2)
    _draw(left, found.sizes, found.curves[0], INK, "o", band=True)
    for curve, colour, marker in zip(found.curves[1:], COLOURS * 2, MARKERS * 2, strict=False):
        _draw(right, found.sizes, curve, colour, marker, band=False)
    left.set_title("Tumour Dice")
    right.set_title("Recall by subtype")
    for axes in (left, right):
        _scale(axes, found)
    if len(found.curves) > 1:
        right.legend(loc="lower right")
    return figure


def _draw(axes: Axes, sizes: Sequence[int], curve: Curve, colour: str, marker: str, *, band: bool) -> None:
    mean = curve.values.mean(axis=1)
    axes.plot(sizes, mean, color=colour, marker=marker, markersize=4, label=curve.name.removeprefix("Recall of "))
    if band:
        axes.fill_between(sizes, *np.nanpercentile(curve.draws, LEVELS, axis=0), color=colour, alpha=0.12, linewidth=0)
        axes.plot(np.repeat(sizes, curve.values.shape[1]), curve.values.ravel(), ".", color=colour, markersize=3)
    if not isinstance(curve.promised, str):
        a, b, c = fit_power_law(sizes, mean)
        n = np.geomspace(sizes[0], 2 * sizes[-1], 60)
        axes.plot(n, a - b * n**-c, color=colour, linestyle="--", linewidth=0.8)


def _scale(axes: Axes, found: Headroom) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.sizes, [str(size) for size in found.sizes])
    axes.minorticks_off()
    axes.set_xlabel("training patients")
    axes.set_ylabel(f"on the {'validation' if found.split == 'val' else 'test'} part")
    light_grid(axes, "y")
