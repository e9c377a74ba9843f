"""The style that all figures share, and how a figure is written to a file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch as Key

from counterstain.errors import InputError
from counterstain.generators.methods import METHODS
from counterstain.storage import replacing, write_text
from counterstain.taxonomy import Taxonomy

WIDTH_IN = 7.2  # two columns of a journal
PNG_DPI = 150
INK = "#1a1a1a"
FAINT = "#8a8a8a"
UNKNOWN = "#cc79a7"
EDGE: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.6}
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


def light_grid(axes: Axes, axis: str) -> None:
    """Draw faint lines to read values by, along ``x`` or ``y``."""
    axes.grid(axis="x" if axis == "x" else "y", color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)


def subtype_key(figure: Figure, taxonomy: Taxonomy, *, background: bool = False) -> None:
    """Write the key of the subtypes' colours under a figure, in as many rows as the names need."""
    keys = [Key(facecolor="white", label="background", **EDGE)] if background else []
    keys += [Key(facecolor=s.colour, label=s.name, **EDGE) for s in taxonomy.subtypes]
    rows = -(-sum(len(str(key.get_label())) + 9 for key in keys) // 100)  # letters in a row
    figure.legend(handles=keys, loc="outside lower center", ncols=min(-(-len(keys) // rows), 6))


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
    """Return ``svg``, ``png`` or ``pdf``, the ending of a figure's name.

    Raises
    ------
    InputError
        It has another ending, or is the name of a folder.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in {"svg", "png", "pdf"}:
        raise InputError(f"{path}: unknown kind of figure {path.suffix!r}; expected .svg, .png or .pdf")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a file")
    return kind
