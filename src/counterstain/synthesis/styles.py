"""Which style each image is drawn in: its own slide's, another's, a mixture of two, or a step beyond.

Shapes: S = length of a style vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from counterstain.data.cohort import Cohort
from counterstain.errors import ConfigError, InputError
from counterstain.generators.diffusion_config import StyleChoice
from counterstain.generators.interface import ImageGenerator, StyledGenerator
from counterstain.generators.style import StyleReferences, references_of
from counterstain.seeding import numpy_generator

Mix = tuple[tuple[str, float], ...]  # slides and their weights, which sum to 1
TWO_SLIDES = {"other", "mixture", "beyond"}


@dataclass(frozen=True, slots=True)
class DrawnStyle:
    """The style of an image, and where it is from."""

    code: np.ndarray  # (S,)
    mix: Mix


class StyleDrawer:
    """Draw styles; each depends on the seed, the image's number and its own slide alone.

    Raises ConfigError where the generator takes no styles, InputError where two training slides are needed.
    """

    def __init__(self, generator: ImageGenerator, references: StyleReferences, choice: StyleChoice) -> None:
        if not isinstance(generator, StyledGenerator):
            raise ConfigError(f"synthesis.style.source {choice.source}: this generator takes no styles; use none")
        if choice.source in TWO_SLIDES and len(references.slides) < 2:
            raise InputError(
                f"{references.cohort.folder}: synthesis.style.source {choice.source} needs two training slides; use own"
            )
        self._references, self._choice, self._count = references, choice, generator.references_per_style
        self._of_reference = cache(lambda reference: generator.style_codes([references[reference]])[0])

    def __call__(self, slide: str, number: int) -> DrawnStyle:
        """Return the style of the image ``number``, whose mask is from ``slide``."""
        mix = self.mix(slide, number)
        parts = [np.float32(weight) * self._style(name, number) for name, weight in mix]
        return DrawnStyle(np.stack(parts).sum(0), mix)

    def _style(self, slide: str, number: int) -> np.ndarray:
        """Return the mean style, (S,) float32, of the references of a slide that an image's number chooses."""
        chosen = self._references.choose(slide, self._count, "image", number)
        styles = np.stack([self._of_reference(reference) for reference in chosen])
        return np.asarray(styles.mean(0))

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
    generator: ImageGenerator, cohort: Cohort, choice: StyleChoice, *, size_px: int, seed: int
) -> StyleDrawer | None:
    """Return what draws the styles of images, or None where no style is asked for.

    ``size_px`` is the edge of the references where the generator was trained on none.
    """
    if choice.source == "none":
        return None
    edge = size_px if generator.header is None else generator.header.size_px
    return StyleDrawer(generator, references_of(cohort, edge, seed), choice)
