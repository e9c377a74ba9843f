"""What every generator does: draw images for label masks.

Shapes: n = images asked for, H, W = rows and columns in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from counterstain.checkpoints import CheckpointHeader, read_header
from counterstain.data.cohort import Cohort
from counterstain.errors import InputError, MismatchError
from counterstain.generators.methods import Method


class ImageGenerator(Protocol):
    """A trained generator. Each image depends on its own mask, seed and inputs, never on its neighbours in a batch."""

    method: Method

    def generate(
        self,
        label_masks: np.ndarray,
        seeds: Sequence[int],
        images: np.ndarray | None = None,
        redraw: np.ndarray | None = None,
        *,
        instances: np.ndarray | None = None,
        slides: Sequence[str] | None = None,
        styles: np.ndarray | None = None,
    ) -> np.ndarray:
        """Draw one image for each mask.

        Parameters
        ----------
        label_masks : (n, H, W) uint8
        seeds : n integers
        images : (n, H, W, 3) uint8, optional
            What is kept outside ``redraw``; needed for inpainting.
        redraw : (n, H, W) bool, optional
            Pixels to draw anew; needed for inpainting.
        instances : (n, H, W) int32, optional
            Instance maps, for generators that see instance edges.
        slides : n names, optional
            Slides of the masks, for generators that draw in a slide's style.
        styles : (n, S) float, optional
            Styles out of the generator's own ``style_codes``, for generators that have it.

        Returns
        -------
        (n, H, W, 3) uint8
        """
        ...


def fixed_batches(
    draw: Callable[..., np.ndarray], size: int, seeds: Sequence[int], *arrays: np.ndarray | None
) -> Iterator[np.ndarray]:
    """Call ``draw(seeds, *arrays)`` on batches of always the same size, the last one filled up by repetition.

    Kernels are chosen by the shape of a batch, and round differently; with one shape an image is the same byte for
    byte whether it is drawn alone or among others.
    """
    for first in range(0, len(seeds), size):
        members = [min(i, len(seeds) - 1) for i in range(first, first + size)]
        parts = [None if array is None else array[members] for array in arrays]
        drawn = draw([seeds[i] for i in members], *parts)
        yield drawn[: min(size, len(seeds) - first)]


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a numpy array to a device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def evaluation_device(choice: Any = "auto") -> torch.device:
    """Return the device to draw on: the given one, or the GPU where there is one."""
    if choice != "auto":
        return torch.device(str(choice))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Open a trained generator by the method it is asked to draw with.

KIND_OF_METHOD = {"spade": "spade", "diffusion": "diffusion", "inpainting": "diffusion"}


def load_generator(
    method: Method, checkpoint: Path | None, cohort: Cohort
) -> tuple[ImageGenerator, CheckpointHeader | None]:
    """Open the generator of a method.

    Parameters
    ----------
    method : str
        ``spade``, ``diffusion``, ``inpainting`` (needs a diffusion checkpoint) or ``oracle`` (needs none).
    checkpoint : Path or None
    cohort : Cohort
        The phantom cohort, for the oracle.

    Raises
    ------
    InputError
        A checkpoint is needed and was not given.
    MismatchError
        The checkpoint is of a kind that does not draw with this method.
    """
    if method == "oracle":
        from counterstain.generators.oracle import OracleGenerator

        return OracleGenerator(cohort), None
    if checkpoint is None:
        raise InputError(f"method {method}: give the folder of a {KIND_OF_METHOD[method]} checkpoint")
    kind = read_header(checkpoint).kind
    if kind != KIND_OF_METHOD[method]:
        raise MismatchError(f"{checkpoint}: is a {kind} checkpoint; {method} needs a {KIND_OF_METHOD[method]} one")
    if method == "spade":
        from counterstain.generators.spade import SpadeGenerator

        return SpadeGenerator.load(checkpoint)
    from counterstain.generators.drawing import DiffusionGenerator

    return DiffusionGenerator.load(checkpoint, method)
