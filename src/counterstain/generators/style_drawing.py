"""Which style each image is drawn in: its own slide's, another's, a mixture of two, or a step beyond.

Shapes: n = images, S = length of a style vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.errors import ConfigError, InputError
from counterstain.generators.style import StyleReferences, references_of
from counterstain.generators.style_config import StyleChoice
from counterstain.seeding import numpy_generator

Mix = tuple[tuple[str, float], ...]  # slides and their weights, which sum to 1
TWO_SLIDES = {"other", "mixture", "beyond"}


@runtime_checkable
class StyledGenerator(Protocol):
    """A generator that can be given styles, as ``styles=`` of its ``generate``."""

    def style_codes(self, references: Sequence[Patch]) -> np.ndarray:
        """Return the styles of reference patches, (n, S)."""
        ...


@dataclass(frozen=True)
class DrawnStyles:
    """The styles of some images, and where they are from."""

    codes: np.ndarray  # (n, S)
    mixes: list[Mix]


class StyleDrawer:
    """Draw styles; each depends on the seed, the image's number and its own slide alone.

    Parameters
    ----------
    generator : StyledGenerator
    references : StyleReferences
    choice : StyleChoice

    Raises
    ------
    ConfigError
        The generator takes no styles.
    InputError
        The choice needs two training slides, and there is one.
    """

    def __init__(self, generator: object, references: StyleReferences, choice: StyleChoice) -> None:
        if not isinstance(generator, StyledGenerator):
            raise ConfigError(f"synthesis.style.source {choice.source}: this generator takes no styles; use none")
        if choice.source in TWO_SLIDES and len(references.slides) < 2:
            raise InputError(
                f"{references.cohort.folder}: synthesis.style.source {choice.source} needs two training slides; use own"
            )
        self._generator, self._references, self._choice = generator, references, choice

    def __call__(self, slides: Sequence[str], numbers: Sequence[int]) -> DrawnStyles:
        """Return the styles of the images ``numbers`` whose masks are from ``slides``."""
        mixes = [self.mix(slide, number) for slide, number in zip(slides, numbers, strict=True)]
        parts = [(i, slide, weight) for i, mix in enumerate(mixes) for slide, weight in mix]
        references = [self._references.draw(slide, "image", numbers[i]) for i, slide, _ in parts]
        each = self._generator.style_codes(references)
        codes = np.zeros((len(mixes), each.shape[1]), np.float32)
        for (i, _, weight), code in zip(parts, each, strict=True):
            codes[i] += np.float32(weight) * code
        return DrawnStyles(codes, mixes)

    def mix(self, slide: str, number: int) -> Mix:
        """Return the slides of an image's style with their weights."""
        if self._choice.source == "own":
            return ((slide, 1.0),)
        rng = numpy_generator(self._references.seed, "style", number)
        if self._choice.source == "other":
            others = [name for name in self._references.slides if name != slide]
            return ((others[rng.integers(len(others))], 1.0),)
        first, second = (self._references.slides[i] for i in rng.permutation(len(self._references.slides))[:2])
        weight = float(rng.random()) if self._choice.source == "mixture" else 1.0 + self._choice.step
        return ((first, 1.0 - weight), (second, weight))


def style_drawer(
    generator: object, cohort: Cohort, choice: StyleChoice, *, size_px: int, seed: int
) -> StyleDrawer | None:
    """Return what draws the styles of a synthetic set, or None where no style is asked for."""
    if choice.source == "none":
        return None
    return StyleDrawer(generator, references_of(cohort, size_px, seed), choice)
