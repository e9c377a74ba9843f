"""Figures of generated tissue: the image every method drew for new labels, and one patch as every subtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from counterstain.report.figure_style import FAINT, INK, WIDTH_IN, empty, new_figure, styled, subtype_key
from counterstain.report.results import Example
from counterstain.taxonomy import Taxonomy

if TYPE_CHECKING:
    from counterstain.synthesis.redraw import Redrawn

SHOWN_PX = 256  # of a patch; sharper than a screen shows it in a row of five
GAP = 0.03  # around a picture, as a share of its width
BARS_UM = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@styled
def examples(patches: Sequence[Example], taxonomy: Taxonomy, *, mpp: float | None = None, rows: int = 6) -> Figure:
    """Draw patches beside the image that each method drew for their new labels (the paper's figure 4).

    Parameters
    ----------
    patches : sequence of Example
        Images and coloured masks, (H, W, 3) uint8.
    taxonomy : Taxonomy
        For the key.
    mpp : float, optional
        Micrometres per pixel of the patches; draws a scale bar.
    rows : int
        Maximum number of patches.
    """
    shown = patches[:rows]
    if not shown:
        return empty("no examples")
    methods = list(dict.fromkeys(method for patch in shown for method in patch.images))
    titles = ["real", "its labels", "new labels", *(method.replace(" (", "\n(") for method in methods)]
    figure = new_figure(WIDTH_IN / len(titles) * len(shown) + 0.75)
    axes = figure.subplots()  # one for all pictures: an axes for each takes seconds to draw
    for row, patch in enumerate(shown):
        images = [patch.real, patch.mask, patch.new_mask, *(patch.images.get(method) for method in methods)]
        for column, image in enumerate(images):
            _show(axes, image, row, column, is_mask=column in {1, 2})
    for column, title in enumerate(titles):
        axes.text(column + 0.5, -GAP, title, ha="center", va="bottom", weight="bold")
    if mpp:
        _scale_bar(axes, len(shown), shown[-1].real.shape[1], mpp)
    axes.set(xlim=(0, len(titles)), ylim=(len(shown) + (0.16 if mpp else 0), -GAP), aspect="equal")
    axes.axis("off")
    subtype_key(figure, taxonomy, background=True)
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
    axes.text(0.5, -GAP, "real", ha="center", va="bottom", weight="bold")
    for column, subtype in enumerate(asked, start=1):
        axes.text(column + 0.5, -GAP, of_id[subtype].name, ha="center", va="bottom", weight="bold")
    for number, row in enumerate(rows):
        real = of_id[row.subtype]
        axes.text(-GAP, number + 0.5, real.name, ha="right", va="center", rotation=90)
        _show(axes, row.patch.image, number, 0, is_mask=False, frame=real.colour)
        for column, subtype in enumerate(asked, start=1):
            _show(axes, row.drawn[subtype], number, column, is_mask=False)
    _scale_bar(axes, len(rows), rows[0].patch.image.shape[1], mpp)
    axes.set(xlim=(-0.16, len(asked) + 1), ylim=(len(rows) + 0.16, -GAP), aspect="equal")
    axes.axis("off")
    return figure


def _show(
    axes: Axes, image: np.ndarray | None, row: int, column: int, *, is_mask: bool, frame: str | None = None
) -> None:
    left, right, top, bottom = column + GAP, column + 1 - GAP, row + GAP, row + 1 - GAP
    edge: dict[str, Any] = {"edgecolor": frame or "#c8c8c8", "linewidth": 3.0 if frame else 0.8}
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **edge))
    if image is None:
        axes.text(column + 0.5, row + 0.5, "none", ha="center", va="center", color=FAINT)
        return
    shown = _shrunk(image, Image.Resampling.NEAREST if is_mask else Image.Resampling.LANCZOS)
    axes.imshow(shown, extent=(left, right, bottom, top))


def _shrunk(image: np.ndarray, how: Image.Resampling) -> np.ndarray:
    longest = max(image.shape[:2])
    if longest <= SHOWN_PX:
        return image
    height, width = (max(1, round(n * SHOWN_PX / longest)) for n in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), how))


def _scale_bar(axes: Axes, row: int, width_px: int, mpp: float) -> None:
    """Draw a bar of a round length under the first picture of the last row, at most 0.6 of its width."""
    width_um = width_px * mpp
    length = max((um for um in BARS_UM if um <= 0.6 * width_um), default=BARS_UM[0])
    share = min(length / width_um, 1) * (1 - 2 * GAP)
    axes.plot([GAP, GAP + share], [row, row], color=INK, linewidth=2, solid_capstyle="butt")
    axes.text(GAP, row + 0.03, f"{length} µm", ha="left", va="top")
