"""The phantom as a generator: it renders relabelled masks itself, in the style of the slide that they come from or in
those that ``synthesis.style`` asks for, mixed of the true styles of training slides.

A perfect generator, which exists on the phantom only: the ceiling of what relabelling can give. Whatever is drawn with
it is labelled ``oracle`` everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from counterstain.config import build_stored
from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.data.phantom import render
from counterstain.data.phantom.styles import PhantomConfig, index_of, slide_style, style_from_vector, style_vector
from counterstain.errors import InputError
from counterstain.generators.interface import DrawRequest


class OracleGenerator:
    """Render masks as the phantom renders its slides.

    Raises
    ------
    InputError
        The cohort was not made by ``counterstain phantom``.
    """

    method = "oracle"
    header = None
    references_per_style = 1

    def __init__(self, cohort: Cohort) -> None:
        if cohort.source.get("kind") != "phantom":
            raise InputError(
                f"{cohort.folder}: the oracle renders phantoms only; use spade, diffusion or inpainting on real tissue"
            )
        self._config = build_stored(PhantomConfig, cohort.source["config"], cohort.folder)
        self._mpp = cohort.mpp
        self.settings: Mapping[str, Any] = {}

    def draw(self, requests: Sequence[DrawRequest]) -> list[np.ndarray]:
        """Render masks; each needs its instances and its slide."""
        return [self._drawn(request) for request in requests]

    def _drawn(self, request: DrawRequest) -> np.ndarray:
        if request.instances is None or not request.slide:
            raise InputError("the oracle needs the instance maps and the slides of the masks")
        style = (
            slide_style(self._config, index_of(request.slide))
            if request.style is None
            else style_from_vector(request.style)
        )
        return render(request.mask, request.instances, style, request.seed, mpp=self._mpp)

    def style_codes(self, references: Sequence[Patch]) -> np.ndarray:
        """Return the true styles of the slides of reference patches, (n, S) float32."""
        known = [slide_style(self._config, index_of(patch.source.slide)) for patch in references]
        return np.stack([style_vector(style) for style in known]).astype(np.float32)


def open_oracle(_: Path | None, cohort: Cohort, __: Mapping[str, Any]) -> OracleGenerator:
    """Open the oracle of a phantom."""
    return OracleGenerator(cohort)
