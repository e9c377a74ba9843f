"""Figure of generated tissue: real, new labels, what every method made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch as Key
from PIL import Image

from counterstain.report.arms import is_oracle
from counterstain.report.figure_style import FAINT, INK, WIDTH_IN, empty, new_figure, styled
from counterstain.report.results import Example
from counterstain.taxonomy import Taxonomy

_SHOWN_PX = 256  # of a patch; sharper than a screen shows it in a row of five
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
    side = WIDTH_IN / len(titles)
    figure = new_figure(side * len(shown) + 0.75)
    grid = figure.subplots(len(shown), len(titles), squeeze=False)
    for axes_row, patch in zip(grid, shown, strict=True):
        images = [patch.images.get(method) for method in methods]
        for axes, image in zip(axes_row, [patch.real, patch.mask, patch.new_mask, *images], strict=True):
            _show(axes, image, is_mask=image is patch.mask or image is patch.new_mask)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, loc="center", fontsize=8.5)
    if mpp:
        _scale_bar(grid[-1, 0], shown[-1].real.shape[1], mpp)
    _key(figure, taxonomy)
    return figure


def _show(axes: Axes, image: np.ndarray | None, *, is_mask: bool) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#c8c8c8")
    if image is None:
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes, color=FAINT)
        axes.set_box_aspect(1)
        return
    axes.imshow(_shrunk(image, Image.Resampling.NEAREST if is_mask else Image.Resampling.LANCZOS))


def _shrunk(image: np.ndarray, how: Image.Resampling) -> np.ndarray:
    longest = max(image.shape[:2])
    if longest <= _SHOWN_PX:
        return image
    height, width = (max(1, round(n * _SHOWN_PX / longest)) for n in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), how))


def _scale_bar(axes: Axes, width_px: int, mpp: float) -> None:
    """Draw a bar of a round length under an image, about a third of its width."""
    width_um = width_px * mpp
    length = max((um for um in _BARS_UM if um <= 0.6 * width_um), default=_BARS_UM[0])
    axes.plot(
        [0, min(length / width_um, 1)], [-0.06, -0.06],
        color=INK, linewidth=2, clip_on=False, transform=axes.transAxes, solid_capstyle="butt",
    )  # fmt: skip
    axes.text(0, -0.1, f"{length} µm", ha="left", va="top", transform=axes.transAxes)


def _key(figure: Figure, taxonomy: Taxonomy) -> None:
    keys = [Key(facecolor="white", edgecolor=INK, linewidth=0.6, label="background")]
    keys += [Key(facecolor=s.colour, edgecolor=INK, linewidth=0.6, label=s.name) for s in taxonomy.subtypes]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 6))
