"""The phantom as a generator: it renders relabelled masks itself, in the style of the slide that they come from or in
those that ``synthesis.style`` asks for, mixed of the true styles of training slides.

A perfect generator, to be had on the phantom only: the ceiling of what relabelling can give. Whatever is drawn with it
is labelled ``oracle`` everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from counterstain.config import build
from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.data.phantom import render
from counterstain.data.phantom.styles import PhantomConfig, index_of, slide_style, style_from_vector, style_vector
from counterstain.errors import InputError
from counterstain.generators.methods import Method


class OracleGenerator:
    """Render masks as the phantom renders its slides.

    Raises
    ------
    InputError
        The cohort was not made by ``counterstain phantom``.
    """

    method: Method = "oracle"
    references_per_style = 1

    def __init__(self, cohort: Cohort) -> None:
        if cohort.source.get("kind") != "phantom":
            raise InputError(
                f"{cohort.folder}: the oracle renders phantoms only; use spade, diffusion or inpainting on real tissue"
            )
        self._config = build(PhantomConfig, cohort.source["config"], cohort.folder)
        self._mpp = cohort.mpp

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
        """Render masks; needs ``instances`` and ``slides``."""
        del images, redraw
        if instances is None or slides is None:
            raise InputError("the oracle needs the instance maps and the slides of the masks")
        own = [slide_style(self._config, index_of(slide)) for slide in slides]
        rendered_as = own if styles is None else [style_from_vector(vector) for vector in styles]
        drawn = [
            render(mask, shown, style, seed, mpp=self._mpp)
            for mask, shown, style, seed in zip(label_masks, instances, rendered_as, seeds, strict=True)
        ]
        return np.stack(drawn)

    def style_codes(self, references: Sequence[Patch]) -> np.ndarray:
        """Return the true styles of the slides of reference patches, (n, S) float32."""
        known = [slide_style(self._config, index_of(patch.source.slide)) for patch in references]
        return np.stack([style_vector(style) for style in known]).astype(np.float32)
