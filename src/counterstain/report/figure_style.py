"""The look that all figures share, how a figure becomes deterministic SVG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from counterstain.errors import InputError
from counterstain.generators.methods import METHODS
from counterstain.report.formatting import is_baseline, method_of
from counterstain.storage import replacing, write_text

WIDTH_IN = 7.2  # the two columns of a journal
PNG_DPI = 150
INK = "#1a1a1a"
FAINT = "#8a8a8a"
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
    "image.interpolation": "none",  # embedded pixel by pixel
}
_MORE_COLOURS = ("#cc79a7", "#e69f00", "#56b4e9")

styled = rc_context(STYLE)
"""Decorator of functions that draw: they see the style, the caller's settings are left alone."""


def new_figure(height_in: float, width_in: float = WIDTH_IN) -> Figure:
    """Return an empty figure; sizes in inches."""
    return Figure(figsize=(width_in, height_in), layout="constrained")


def colour_of(arm_or_method: str) -> str:
    """Return the colour of a method, the same in every figure; baselines are grey, the oracle nearly black."""
    method = method_of(arm_or_method)
    if method in METHODS:
        return METHODS[method].colour
    if is_baseline(method):
        return FAINT
    return _MORE_COLOURS[sum(method.encode()) % len(_MORE_COLOURS)]


def empty(message: str) -> Figure:
    """Return a figure that says why there is nothing to see."""
    figure = new_figure(1.0)
    figure.text(0.5, 0.5, message, ha="center", va="center", color=FAINT)
    return figure


def light_grid(axes: Axes, axis: str) -> None:
    """Draw faint lines to read values by, along ``x`` or ``y``."""
    axes.grid(axis="x" if axis == "x" else "y", color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)


def svg_text(figure: Figure) -> str:
    """Return a figure as SVG, the same text for the same figure."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "counterstain", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()


def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure as SVG in one step."""
    write_text(path, svg_text(figure))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in one step, as the ending of its name says; the same bytes for the same figure, but as PDF."""
    kind = figure_kind(path)
    if kind == "svg":
        save_svg(figure, path)
        return
    with replacing(path) as partial:
        figure.savefig(partial, format=kind, dpi=PNG_DPI, metadata={"Software": None} if kind == "png" else None)


def figure_kind(path: Path) -> str:
    """Return ``svg``, ``png`` or ``pdf``, the ending of a figure's name.

    Raises
    ------
    InputError
        It ends otherwise, or is the name of a folder.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in {"svg", "png", "pdf"}:
        raise InputError(f"{path}: unknown kind of figure {path.suffix!r}; expected .svg, .png or .pdf")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")
    return kind
