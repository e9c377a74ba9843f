"""The figures of a report: the style of all, and the charts of results by arm, confusion and training."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch as Key
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter

from counterstain.errors import InputError
from counterstain.generators.methods import METHODS
from counterstain.report.tables import PARTS, fixed, signed
from counterstain.seeding import numpy_generator
from counterstain.storage import replacing, write_text
from counterstain.study.arms import Arm
from counterstain.study.cells import FOLD
from counterstain.study.statistics.arm_differences import CountArray
from counterstain.taxonomy import Subtype, Taxonomy

if TYPE_CHECKING:
    from counterstain.study.headroom import Curve, Headroom

WIDTH_IN = 7.2  # two columns of a journal
PNG_DPI = 150
INK = "#1a1a1a"
FAINT = "#8a8a8a"
UNKNOWN = "#cc79a7"
EDGE: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.6}
POINTS = 150  # of a training curve; more cannot be seen and make a file heavy
COLUMNS = 3  # of panels with training curves
MANY = 12  # lines in a panel; more of them are drawn thinner
MARKERS = ("o", "s", "^", "D", "v", "P")  # told apart in grey as well
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.7,
    "axes.formatter.useoffset": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name is a $
    "image.interpolation": "none",  # embedded pixel by pixel
}

styled = rc_context(STYLE)
"""Decorator of functions that draw: they see the style, the caller's settings are left alone."""


def new_figure(height_in: float) -> Figure:
    """Return an empty figure."""
    return Figure(figsize=(WIDTH_IN, height_in), layout="constrained")


def colour_of(method: str | None) -> str:
    """Return the colour of a method, the same in every figure; arms without synthetic images are grey."""
    if method is None:
        return FAINT
    return METHODS[method].colour if method in METHODS else UNKNOWN


def empty(message: str) -> Figure:
    """Return a figure that says why there is nothing to see."""
    figure = new_figure(1.0)
    figure.text(0.5, 0.5, message, ha="center", va="center", color=FAINT)
    return figure


def wrapped(name: str, letters: int) -> str:
    """Return a name in at most three lines of so many letters."""
    return "\n".join(TextWrapper(letters, max_lines=3, placeholder="…").wrap(name)) or name


def light_grid(axes: Axes, axis: Literal["x", "y"]) -> None:
    """Draw faint lines to read values by, along ``x`` or ``y``."""
    axes.grid(axis=axis, color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)


def subtype_key(figure: Figure, subtypes: Sequence[Subtype], *, background: bool = False) -> None:
    """Write the key of the subtypes' colours under a figure, in as many rows as the names need."""
    keys = [Key(facecolor="white", label="background", **EDGE)] if background else []
    keys += [Key(facecolor=s.colour, label=wrapped(s.name, 40), **EDGE) for s in subtypes]
    longest = max(len(line) for key in keys for line in str(key.get_label()).split("\n"))
    most = max(100 // (longest + 9), 1)  # letters in a row
    rows = -(-len(keys) // min(most, 6))
    figure.legend(handles=keys, loc="outside lower center", ncols=-(-len(keys) // rows))


def svg_text(figure: Figure) -> str:
    """Return a figure as SVG, the same text for the same figure."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "counterstain", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in one step, as SVG, PNG or PDF by its ending; except for PDF, always the same bytes."""
    kind = figure_kind(path)
    if kind == "svg":
        write_text(path, svg_text(figure))
        return
    with replacing(path) as partial:
        figure.savefig(partial, format=kind, dpi=PNG_DPI, metadata={"Software": None} if kind == "png" else None)


def figure_kind(path: Path) -> str:
    """Return ``svg``, ``png`` or ``pdf``, the ending of a figure's name; InputError if it cannot be written there."""
    kind = path.suffix.removeprefix(".").lower()
    if kind not in {"svg", "png", "pdf"}:
        raise InputError(f"{path}: unknown kind of figure {path.suffix!r}; expected .svg, .png or .pdf")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a file")
    return kind


@styled
def boxplots(results: pd.DataFrame, taxonomy: Taxonomy, *, arms: Sequence[Arm], reference: Arm) -> Figure:
    """Draw Dice and subtype variance of every arm on the test set (the paper's figure 5).

    Box = mean and standard deviation, whiskers = minimum and maximum, dots = repeats, dashed line = reference.
    ``results`` has a row per arm, repeat and split, with the columns dice and subtype_variance.
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
    left.set_yticks(range(len(arms)), [wrapped(_label(arm), 36) for arm in arms])
    left.set_ylim(len(arms) - 0.4, -0.6)
    left.set_title(wrapped(f"{taxonomy.tissue_class.capitalize()} Dice", 32))
    left.set_xlabel("higher is better")
    right.set_title("Subtype variance of recall")
    right.set_xlabel("lower is better")
    right.tick_params(axis="y", length=0)
    return figure


@styled
def confusion(counts: pd.DataFrame, taxonomy: Taxonomy, *, reference: Arm, arm: Arm | None) -> Figure:
    """Draw the confusion by subtype of two arms on the test set and their difference (the paper's figure 6).

    Tables of pixels pooled over the split, row-normalised, averaged over repeats; in per cent. Without ``arm`` only
    the reference is shown. ``counts`` has the columns arm, repeat, split, patient, subtype (label),
    predicted_background and predicted_tumour.
    """
    pair = [reference] if arm is None else [reference, arm]
    shown = counts.loc[(counts["split"] == "test") & counts["arm"].isin([one.name for one in pair])]
    tables = _row_normalised(shown, taxonomy.num_labels)
    names = ["background", *(wrapped(name, 24) for name in taxonomy.names)]
    lines = max(name.count("\n") for name in names)
    figure = new_figure(1.1 + (0.36 + 0.08 * lines) * len(names))
    panels = figure.subplots(1, 3 if arm else 1, sharey=True, squeeze=False)[0]
    for axes, one in zip(panels, pair, strict=False):
        _heat(axes, tables[one.name], fixed, cmap="Greys", vmin=0, vmax=180)
        axes.set_title(wrapped(_label(one), 24))
    if arm:
        difference = tables[arm.name] - tables[reference.name]
        reach = max(float(np.nanmax(np.abs(difference))), 1.0) * 1.8
        _heat(panels[2], difference, signed, cmap="PuOr_r", vmin=-reach, vmax=reach)
        panels[2].set_title("Difference (points)")
    for axes in panels:
        axes.set_xticks([0, 1], ["background", wrapped(taxonomy.tissue_class, 12)])
        axes.set_xlabel("predicted as")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylabel("annotated as")
    return figure


def _label(arm: Arm) -> str:
    return f"{arm.label} (ceiling)" if arm.ceiling else arm.label


def _mean_sd_box(axes: Axes, row: int, values: np.ndarray, arm: Arm) -> None:
    if not len(values):
        axes.annotate("no result", (0.02, row), xycoords=("axes fraction", "data"), va="center", color=FAINT)
        return
    mean, sd = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
    axes.plot([values.min(), values.max()], [row, row], color=INK, linewidth=0.9, zorder=1, marker="|", markersize=6)
    corner, size = (mean - sd, row - 0.28), (2 * sd, 0.56)
    axes.add_patch(Rectangle(corner, *size, facecolor=colour_of(arm.method), alpha=0.45, edgecolor="none", zorder=2))
    line = "--" if arm.ceiling else "-"
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=INK, linewidth=0.7, linestyle=line, zorder=3))
    axes.plot([mean, mean], [row - 0.28, row + 0.28], color=INK, linewidth=1.6, zorder=4, solid_capstyle="butt")
    jitter = numpy_generator(0, "jitter", len(values)).uniform(-0.15, 0.15, len(values))
    axes.plot(values, row + jitter, "o", color=INK, mfc="white", markersize=2.8, mew=0.7, zorder=5)


def _row_normalised(counts: pd.DataFrame, num_labels: int) -> dict[str, np.ndarray]:
    """Return per cent of each row by arm, (L, 2), averaged over repeats; NaN for a label without pixels."""
    array = CountArray.of(counts, num_labels)
    pooled = array.counts.sum(axis=2).astype(float)  # (A, R, L, 2)
    totals = pooled.sum(axis=-1, keepdims=True)
    shares = 100 * pooled / np.where(totals > 0, totals, np.nan)
    return {arm: shares[a, array.present[a]].mean(axis=0) for a, arm in enumerate(array.arms)}


def _heat(axes: Axes, table: np.ndarray, form: Callable[[float, int], str], **colours: Any) -> None:
    axes.imshow(table, aspect="auto", **colours)
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

    ``losses`` has the columns stage (``diffusion``, ``segmenter subtype #0``), step, name and value. Stages with the
    same first word share a panel; curves of more than 150 points are drawn as means over equal numbers of steps.
    """
    if losses.empty:
        return empty("no training curves")
    of_stage = {stage: _method_of(stage.partition(FOLD)[0], arms) for stage in losses["stage"].astype(str).unique()}
    table = losses.assign(family=losses["stage"].astype(str).str.partition(FOLD)[0].str.partition(" ")[0])
    panels = [panel for panel in table.groupby(["family", "name"], sort=False) if np.ptp(panel[1]["step"]) > 0]
    rows = max(-(-len(panels) // COLUMNS), 1)
    figure = new_figure(0.4 + 1.55 * rows)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, ((family, name), part) in zip(grid, panels, strict=False):
        axes.set_title(wrapped(f"{family}: {name}", 32), fontsize=8.5)
        lines = list(part.groupby("stage", sort=False))
        for stage, line in lines:
            steps, values = (line[column].to_numpy(float) for column in ("step", "value"))
            _curve(axes, steps, values, colour_of(of_stage[str(stage)]), width=0.9 if len(lines) <= MANY else 0.45)
        known = part["value"][np.isfinite(part["value"])]
        if len(known) and known.min() > 0 and known.max() / known.min() > 50:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # without the mathematics of matplotlib's own
            axes.yaxis.set_minor_formatter(NullFormatter())
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


def _method_key(figure: Figure, of_stage: dict[str, str | None]) -> None:
    methods = dict.fromkeys(method for stage, method in of_stage.items() if " " in stage)
    ceilings = {name for name, method in METHODS.items() if method.ceiling}
    labels = {method: f"{method} (ceiling)" if method in ceilings else method or "baselines" for method in methods}
    keys = [Line2D([], [], color=colour_of(method), linewidth=1.6, label=label) for method, label in labels.items()]
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), title="segmenters trained with")


@styled
def headroom_figure(found: Headroom) -> Figure:
    """Draw learning curves: Dice with its 95 % interval, recalls, every repeat as a dot, the power law dashed.

    Several arms are drawn side by side, a panel for Dice and for each subtype.
    """
    if len({curve.arm for curve in found.curves}) > 1:
        return _curves_of_arms(found)
    figure = new_figure(3.2)
    left, right = figure.subplots(1, 2)
    colours = {subtype.name: subtype.colour for subtype in found.taxonomy.subtypes}
    for curve, marker in zip(found.curves, cycle(MARKERS)):
        axes = left if curve.subtype is None else right
        _learning_curve(axes, found.sizes, curve, INK if curve.subtype is None else colours[curve.subtype], marker)
    left.set_title(wrapped(f"{found.taxonomy.tissue_class.capitalize()} Dice", 32))
    right.set_title("Recall by subtype")
    for axes in (left, right):
        _by_patients(axes, found)
    if right.lines:
        right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _by_patients(axes: Axes, found: Headroom) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.sizes, [str(size) for size in found.sizes])
    axes.minorticks_off()
    axes.set_xlabel("training patients")
    axes.set_ylabel(f"on the {PARTS[found.split]}")
    light_grid(axes, "y")


def _curves_of_arms(found: Headroom) -> Figure:
    panels = list(dict.fromkeys(curve.subtype for curve in found.curves))
    rows = -(-len(panels) // COLUMNS)
    figure = new_figure(2.3 * rows + 0.4)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    arms = list(dict.fromkeys(curve.arm for curve in found.curves))
    for axes, subtype in zip(grid, panels, strict=False):
        for curve in (curve for curve in found.curves if curve.subtype == subtype):
            marker, dashed = MARKERS[arms.index(curve.arm) % len(MARKERS)], "--" if curve.arm.only else "-"
            colour, mean = colour_of(curve.arm.method), curve.scores.mean(axis=1)
            look = {"color": colour, "linestyle": dashed, "marker": marker, "markersize": 5, "mec": INK, "mew": 0.5}
            axes.plot(found.sizes, mean, label=wrapped(curve.arm.label, 30), **look)
            axes.plot(np.repeat(found.sizes, curve.scores.shape[1]), curve.scores.ravel(), ".", color=colour, ms=3)
        name = f"{found.taxonomy.tissue_class.capitalize()} Dice" if subtype is None else f"Recall of {subtype}"
        axes.set_title(wrapped(name, 26))
        _by_patients(axes, found)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(arms)))
    return figure


def _learning_curve(axes: Axes, sizes: Sequence[int], curve: Curve, colour: str, marker: str) -> None:
    mean = curve.scores.mean(axis=1)
    label = curve.subtype and wrapped(curve.subtype, 24)
    axes.plot(sizes, mean, color=colour, label=label, marker=marker, markersize=5, mec=INK, mew=0.5)
    if curve.subtype is None:
        axes.fill_between(sizes, *curve.band, color=colour, alpha=0.12, linewidth=0)
        axes.plot(np.repeat(sizes, curve.scores.shape[1]), curve.scores.ravel(), ".", color=colour, markersize=3)
    n = np.geomspace(sizes[0], 2 * sizes[-1], 60)
    if (fitted := curve.fitted(sizes, n)) is not None:
        axes.plot(n, fitted, color=colour, linestyle="--", linewidth=0.8)
