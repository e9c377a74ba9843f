"""The learning curve as a figure: Dice and the recall of every subtype over the number of training patients."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from counterstain.report.figure_style import INK, light_grid, new_figure, styled
from counterstain.study.learning_curve import LEVELS, fit_power_law

if TYPE_CHECKING:
    from counterstain.study.headroom import Curve, Headroom

MARKERS = ("o", "s", "^", "D", "v", "P")  # told apart in grey as well


@styled
def headroom_figure(found: Headroom) -> Figure:
    """Draw Dice with its 95 % interval, every repeat as a dot, the power law dashed to twice the patients; recalls."""
    figure = new_figure(3.2)
    left, right = figure.subplots(1, 2)
    colours = {subtype.name: subtype.colour for subtype in found.taxonomy.subtypes}
    for curve, marker in zip(found.curves, cycle(MARKERS)):
        if curve.subtype is None:
            _draw(left, found.sizes, curve, INK, marker, band=True)
        else:
            _draw(right, found.sizes, curve, colours[curve.subtype], marker, band=False)
    left.set_title(f"{found.taxonomy.tissue_class.capitalize()} Dice")
    right.set_title("Recall by subtype")
    for axes in (left, right):
        _scale(axes, found)
    if right.lines:
        right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _draw(axes: Axes, sizes: Sequence[int], curve: Curve, colour: str, marker: str, *, band: bool) -> None:
    mean = curve.values.mean(axis=1)
    axes.plot(sizes, mean, color=colour, label=curve.subtype, marker=marker, markersize=5, mec=INK, mew=0.5)
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
