"""A picture of tissue for any label mask."""

from __future__ import annotations

import numpy as np

from counterstain.data.phantom.artefacts import draw_artefacts
from counterstain.data.phantom.benign import draw_benign
from counterstain.data.phantom.camera import photograph
from counterstain.data.phantom.ground import Ground
from counterstain.data.phantom.layout import DUCT
from counterstain.data.phantom.nests import draw_nests
from counterstain.data.phantom.stroma import draw_fibres, draw_stroma_cells
from counterstain.data.phantom.styles import SlideStyle
from counterstain.errors import InputError
from counterstain.taxonomy import BACKGROUND, IGNORE


def render(label_mask: np.ndarray, instances: np.ndarray, style: SlideStyle, seed: int, *, mpp: float) -> np.ndarray:
    """Draw tissue for a mask, which may be relabelled, cropped or not drawn by the phantom at all.

    The picture depends on the arguments only. The same seed and instances with other labels keep the cells where they
    are; only their stain changes, and the inside of what is or was a duct.

    Parameters
    ----------
    label_mask : (H, W) integer array
        0 = background, 1..4 = HER2 0..3+, 5 = LCIS/DCIS; 255 (ignore) is drawn as background.
    instances : (H, W) integer array
        0 = background. Nests of the same id share the hidden score of a duct.
    style : SlideStyle
    seed : int
    mpp : float
        Micrometres per pixel; all sizes follow from it.

    Returns
    -------
    (H, W, 3) uint8 array

    Raises
    ------
    InputError
        The arrays differ in shape or hold a label that the phantom cannot draw.
    """
    if label_mask.shape != instances.shape or label_mask.ndim != 2:
        raise InputError(f"label mask of shape {label_mask.shape}, instances of {instances.shape}: expected one (H, W)")
    labels = np.where(label_mask == IGNORE, BACKGROUND, label_mask)
    if labels.size == 0 or labels.min() < BACKGROUND or labels.max() > DUCT:
        raise InputError(
            f"label mask: found labels {np.unique(labels).tolist()}; the phantom draws 0..{DUCT} of the taxonomy her2"
        )
    ground = Ground(labels=labels.astype(np.uint8), instances=instances, style=style, seed=seed, mpp=mpp)
    stains, across_um = draw_fibres(ground)
    free = draw_benign(ground, stains)
    free &= draw_nests(ground, stains)
    draw_stroma_cells(ground, stains, across_um, free)
    draw_artefacts(ground, stains)
    return photograph(ground, stains)
