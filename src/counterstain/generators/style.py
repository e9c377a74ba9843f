"""Style: how the tissue around tumour looks on a slide, as a vector that a generator can be given, and which is given.

A style is taken from a reference patch of a training slide, and from its background alone (label 0): the stain of
tumour tells its subtype, and a generator that saw it would follow the style instead of the mask. Stain statistics are
taken over background pixels; the learned encoder sees the reference with tumour filled by the background's mean. For
the same reason references are other patches of the slide, chosen for much background, never the patch that is drawn.
The styles of several references are averaged: a small patch has few nuclei.

Shapes: B = batch, n = references, H, W = rows and columns in pixels, S = length of a style vector, s = edge of what is
encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.errors import ConfigError, InputError, LeakageError
from counterstain.generators.diffusion_config import REFERENCES_OF_A_SLIDE, StyleChoice
from counterstain.generators.interface import ImageGenerator, StyledGenerator
from counterstain.generators.pipeline import described
from counterstain.seeding import derive, numpy_generator
from counterstain.taxonomy import BACKGROUND

CANDIDATES = 4  # places that the one with the most background is chosen from
REMEMBERED = 4096  # references whose descriptions are kept, 25 kB each
Mix = tuple[tuple[str, float], ...]  # slides and their weights, which sum to 1
TWO_SLIDES = {"other", "mixture", "beyond"}


class StyleReferences:
    """Reference patches of the training slides of a cohort, 64 of each; which they are depends on the seed alone.

    Their edge is ``size_px``, or less where a region is smaller. For masks of another ``part`` of the split, they are
    of its slides.
    """

    def __init__(self, cohort: Cohort, size_px: int, seed: int, part: str = "train") -> None:
        self.cohort, self.size_px, self.seed = cohort, size_px, seed
        self._sizes = cohort.regions[["height_px", "width_px"]].to_numpy().tolist()
        self._positions: dict[str, list[int]] = {}
        for position in cohort.positions(part).tolist():
            slide = str(cohort.regions["slide"].iloc[position])
            self._positions.setdefault(slide, []).append(position)
        self.slides = sorted(self._positions)
        self._described = lru_cache(REMEMBERED)(self._describe)

    def choose(self, slide: str, count: int, *keys: int | str) -> list[int]:
        """Choose references of a slide by the keys; return their numbers, or raise LeakageError outside training."""
        if slide not in self._positions:
            raise LeakageError(
                f"slide {slide}: is not of the training part of {self.cohort.folder}; styles come from training "
                "slides alone"
            )
        rng = numpy_generator(self.seed, "references of a style", slide, *keys)
        first = self.slides.index(slide) * REFERENCES_OF_A_SLIDE
        return [first + int(k) for k in rng.choice(REFERENCES_OF_A_SLIDE, count, replace=False)]

    def __getitem__(self, number: int) -> Patch:
        """Cut a reference out of its slide: of four random places the one with the most background."""
        slide = self.slides[number // REFERENCES_OF_A_SLIDE]
        rng = numpy_generator(self.seed, "style reference", slide, number % REFERENCES_OF_A_SLIDE)
        cuts = [self._cut(slide, rng) for _ in range(CANDIDATES)]
        return max(cuts, key=lambda patch: int((patch.instances == BACKGROUND).sum()))

    def choose_for(self, patches: Sequence[Patch], numbers: Sequence[int], count: int) -> Tensor:
        """Choose references of each patch's slide by the patches' numbers, (B, n)."""
        return torch.tensor([self.choose(p.source.slide, count, n) for p, n in zip(patches, numbers, strict=True)])

    def described(self, chosen: Tensor) -> dict[str, Tensor]:
        """Return what training sees of references (B, n): ``style_seen`` (B, n, 3, s, s), ``style_stain`` (B, n, 6)."""
        seen, stain = zip(*(self._described(number) for number in chosen.flatten().tolist()), strict=True)
        return {
            "style_seen": torch.cat(seen).reshape(*chosen.shape, *seen[0].shape[1:]),
            "style_stain": torch.cat(stain).reshape(*chosen.shape, -1),
        }

    def _describe(self, number: int) -> tuple[Tensor, Tensor]:
        seen, stain = describe([self[number]], self.size_px)
        return seen.half(), stain

    def _cut(self, slide: str, rng: np.random.Generator) -> Patch:
        positions = self._positions[slide]
        position = positions[rng.integers(len(positions))]
        size = min(self.size_px, *self._sizes[position])
        y, x = (int(rng.integers(length - size + 1)) for length in self._sizes[position])
        return self.cohort.patch(position, y, x, size)


def references_of(cohort: Cohort, size_px: int, seed: int, part: str = "train") -> StyleReferences:
    """Return the references of a training or a drawing with this seed."""
    return StyleReferences(cohort, size_px, derive(seed, "styles"), part)


def describe(references: Sequence[Patch], size_px: int) -> tuple[Tensor, Tensor]:
    """Return the background of references as optical density, (n, 3, s, s) float, and its statistics, (n, 6).

    They are brought to one size, that of references of ``size_px``, and at most 64 pixels.
    """
    seen, stain = zip(*(described(patch.image, patch.label_mask, size_px) for patch in references), strict=True)
    return torch.stack(seen), torch.stack(stain)


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

    @property
    def slides(self) -> tuple[str, ...]:
        """Slides that styles are taken from."""
        return tuple(self._references.slides)

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
    generator: ImageGenerator, cohort: Cohort, choice: StyleChoice, *, size_px: int, seed: int, part: str = "train"
) -> StyleDrawer | None:
    """Return what draws the styles of images, or None where no style is asked for.

    ``size_px`` is the edge of the references where the generator was trained on none.
    """
    if choice.source == "none":
        return None
    edge = size_px if generator.header is None else generator.header.size_px
    return StyleDrawer(generator, references_of(cohort, edge, seed, part), choice)
