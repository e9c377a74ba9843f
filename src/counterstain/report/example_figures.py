"""Figures of generated tissue: what every method made of new labels, what a generator makes of every subtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch as Key
from matplotlib.patches import Rectangle
from PIL import Image

from counterstain.report.figure_style import FAINT, INK, WIDTH_IN, empty, new_figure, styled
from counterstain.report.formatting import is_oracle
from counterstain.report.results import Example
from counterstain.taxonomy import Taxonomy

if TYPE_CHECKING:
    from counterstain.synthesis.preview import Redrawn
from itertools import cycle
from typing import TYPE_CHECKING

from counterstain.report.figure_style import light_grid
from counterstain.study.headroom import LEVELS, fit_power_law

if TYPE_CHECKING:
    from counterstain.study.headroom import Curve, Headroom


_SHOWN_PX = 256  # of a patch; sharper than a screen shows it in a row of five
_GAP = 0.03  # around a picture, as a share of its width
_BARS_UM = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@styled
def examples(patches: Sequence[Example], taxonomy: Taxonomy, *, mpp: float | None = None, rows: int = 6) -> Figure:
    """Draw patches side by side with what every method made of their new labels (the paper's figure 4).

    Parameters
    ----------
    patches : sequence of Example
        Images and coloured masks, (H, W, 3) uint8.
    taxonomy : Taxonomy
        For the key.
    mpp : float, optional
        Micrometres per pixel of the patches; draws a scale bar.
    rows : int
        Patches to show at most.

    Returns
    -------
    Figure
    """
    shown = patches[:rows]
    if not shown:
        return empty("no examples")
    methods = list(dict.fromkeys(method for patch in shown for method in patch.images))
    titles = ["real", "its labels", "new labels", *(f"{m}\n(ceiling)" if is_oracle(m) else m for m in methods)]
    figure = new_figure(WIDTH_IN / len(titles) * len(shown) + 0.75)
    axes = figure.subplots()  # one for all pictures: an axes for each takes seconds to draw
    for row, patch in enumerate(shown):
        images = [patch.real, patch.mask, patch.new_mask, *(patch.images.get(method) for method in methods)]
        for column, image in enumerate(images):
            _show(axes, image, row, column, is_mask=column in {1, 2})
    for column, title in enumerate(titles):
        axes.text(column + 0.5, -_GAP, title, ha="center", va="bottom", weight="bold")
    if mpp:
        _scale_bar(axes, len(shown), shown[-1].real.shape[1], mpp)
    axes.set(xlim=(0, len(titles)), ylim=(len(shown) + (0.16 if mpp else 0), -_GAP), aspect="equal")
    axes.axis("off")
    _key(figure, taxonomy)
    return figure


@styled
def redrawn_as_every_subtype(rows: Sequence[Redrawn], taxonomy: Taxonomy, *, mpp: float) -> Figure:
    """Draw real patches in frames of their subtypes' colours, each beside what it became as every subtype.

    Parameters
    ----------
    rows : sequence of Redrawn
        One at least.
    taxonomy : Taxonomy
    mpp : float
        Micrometres per pixel of the patches, for the scale bar.
    """
    of_id = {subtype.id: subtype for subtype in taxonomy.subtypes}
    asked = list(rows[0].drawn)
    figure = new_figure(WIDTH_IN / (len(asked) + 1) * len(rows) + 0.35)
    axes = figure.subplots()
    axes.text(0.5, -_GAP, "real", ha="center", va="bottom", weight="bold")
    for column, subtype in enumerate(asked, start=1):
        axes.text(column + 0.5, -_GAP, of_id[subtype].name, ha="center", va="bottom", weight="bold")
    for number, row in enumerate(rows):
        real = of_id[row.subtype]
        axes.text(-_GAP, number + 0.5, real.name, ha="right", va="center", rotation=90)
        _show(axes, row.patch.image, number, 0, is_mask=False, frame=real.colour)
        for column, subtype in enumerate(asked, start=1):
            _show(axes, row.drawn[subtype], number, column, is_mask=False)
    _scale_bar(axes, len(rows), rows[0].patch.image.shape[1], mpp)
    axes.set(xlim=(-0.16, len(asked) + 1), ylim=(len(rows) + 0.16, -_GAP), aspect="equal")
    axes.axis("off")
    return figure


def _show(
    axes: Axes, image: np.ndarray | None, row: int, column: int, *, is_mask: bool, frame: str | None = None
) -> None:
    left, right, top, bottom = column + _GAP, column + 1 - _GAP, row + _GAP, row + 1 - _GAP
    edge: dict[str, Any] = {"edgecolor": frame or "#c8c8c8", "linewidth": 3.0 if frame else 0.8}
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **edge))
    if image is None:
        axes.text(column + 0.5, row + 0.5, "none", ha="center", va="center", color=FAINT)
        return
    shown = _shrunk(image, Image.Resampling.NEAREST if is_mask else Image.Resampling.LANCZOS)
    axes.imshow(shown, extent=(left, right, bottom, top))


def _shrunk(image: np.ndarray, how: Image.Resampling) -> np.ndarray:
    longest = max(image.shape[:2])
    if longest <= _SHOWN_PX:
        return image
    height, width = (max(1, round(n * _SHOWN_PX / longest)) for n in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), how))


def _scale_bar(axes: Axes, row: int, width_px: int, mpp: float) -> None:
    """Draw a bar of a round length under the first picture of the last row, at most 0.6 of its width."""
    width_um = width_px * mpp
    length = max((um for um in _BARS_UM if um <= 0.6 * width_um), default=_BARS_UM[0])
    share = min(length / width_um, 1) * (1 - 2 * _GAP)
    axes.plot([_GAP, _GAP + share], [row, row], color=INK, linewidth=2, solid_capstyle="butt")
    axes.text(_GAP, row + 0.03, f"{length} µm", ha="left", va="top")


def _key(figure: Figure, taxonomy: Taxonomy) -> None:
    keys = [Key(facecolor="white", edgecolor=INK, linewidth=0.6, label="background")]
    keys += [Key(facecolor=s.colour, edgecolor=INK, linewidth=0.6, label=s.name) for s in taxonomy.subtypes]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 6))


# The learning curve as a figure: Dice and the recall of every subtype over the number of training patients.

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
    if not isinstance(curve.predicted, str):
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
