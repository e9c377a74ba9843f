"""Style: how the tissue around tumour looks on a slide, as a vector that a generator can be given.

A style is taken from a reference patch of a training slide, and from its background alone (label 0). Tumour is left
out on purpose: its stain is what tells the subtypes apart, so a reference that showed tumour would tell the generator
which subtype its slide has, and the generator would listen to the style instead of the mask. Stain statistics are taken
over background pixels; the learned encoder sees the reference with tumour filled by the background's mean. For the same
reason references are other patches of the slide, chosen for much background, never the patch that is drawn. The styles
of several references are averaged: a small patch has few nuclei.

Shapes: B = batch, n = references, H, W = rows and columns in pixels, S = length of a style vector, s = edge of what is
encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.data.sampling import stack
from counterstain.errors import LeakageError
from counterstain.generators.diffusion_config import REFERENCES_OF_A_SLIDE
from counterstain.seeding import derive, numpy_generator
from counterstain.taxonomy import BACKGROUND

SEEN_PX = 64  # edge of what the encoder sees of a reference
CANDIDATES = 4  # places that the one with the most background is chosen from
REMEMBERED = 4096  # references whose descriptions are kept, 25 kB each


class StyleReferences:
    """Reference patches of the training slides of a cohort, 64 of each; which they are depends on the seed alone.

    Parameters
    ----------
    cohort : Cohort
        With a split: only slides of its training part give styles.
    size_px : int
        Edge of the references; less where a region is smaller.
    seed : int
    """

    def __init__(self, cohort: Cohort, size_px: int, seed: int) -> None:
        self.cohort, self.size_px, self.seed = cohort, size_px, seed
        self._sizes = cohort.regions[["height_px", "width_px"]].to_numpy().tolist()
        self._positions: dict[str, list[int]] = {}
        for position in cohort.part("train").tolist():
            slide = str(cohort.regions["slide"].iloc[position])
            self._positions.setdefault(slide, []).append(position)
        self.slides = sorted(self._positions)
        """The slides that give styles."""
        self._described = lru_cache(REMEMBERED)(self._describe)

    def choose(self, slide: str, count: int, *keys: int | str) -> list[int]:
        """Choose references of a slide, by the seed and the keys; return their numbers.

        Raises
        ------
        LeakageError
            The slide is not of the training part.
        """
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
        return max((self._cut(slide, rng) for _ in range(CANDIDATES)), key=_background_pixels)

    def choose_for(self, patches: Sequence[Patch], numbers: Sequence[int], count: int) -> Tensor:
        """Choose references of each patch's slide, by the patches' numbers; return the references' numbers, (B, n)."""
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


def styled_batches(
    source: Any, references: StyleReferences, count: int, batch_size: int
) -> Callable[[int], dict[str, Tensor]]:
    """Return the function step -> batch as :func:`counterstain.data.sampling.PatchBatches` with references."""

    def batch(step: int) -> dict[str, Tensor]:
        numbers = range(step * batch_size, (step + 1) * batch_size)
        patches = [source[i] for i in numbers]
        return stack(patches) | references.described(references.choose_for(patches, numbers, count))

    return batch


def references_of(cohort: Cohort, size_px: int, seed: int) -> StyleReferences:
    """Return the references of a training or a drawing with this seed."""
    return StyleReferences(cohort, size_px, derive(seed, "styles"))


def describe(references: Sequence[Patch], size_px: int) -> tuple[Tensor, Tensor]:
    """Return the background of references as optical density, (n, 3, s, s) float, and its statistics, (n, 6).

    They are brought to one size, that of references of ``size_px``, and at most 64 pixels.
    """
    edge = min(SEEN_PX, size_px)
    seen, stain = zip(*(_described(patch.image, patch.label_mask, edge) for patch in references), strict=True)
    return torch.stack(seen), torch.stack(stain)


def stain_statistics(image: np.ndarray, label_mask: np.ndarray) -> np.ndarray:
    """Return mean and standard deviation of the background's optical density in each colour channel.

    Parameters
    ----------
    image : (H, W, 3) uint8
    label_mask : (H, W) uint8
        Only pixels of label 0 count: see the module's description.

    Returns
    -------
    (6,) float array
        Natural logarithms; 0 where there is no background.
    """
    density = optical_density(image[label_mask == BACKGROUND])
    if not len(density):
        return np.zeros(6)
    return np.concatenate([density.mean(0), density.std(0)])


def optical_density(image: np.ndarray) -> np.ndarray:
    """Turn (…, 3) uint8 into natural optical density, 0 = white."""
    return np.asarray(-np.log(np.maximum(image, 1) / 255.0))


def without_tumour(image: np.ndarray, label_mask: np.ndarray) -> np.ndarray:
    """Fill all pixels of (H, W, 3) uint8 that are no background with the background's mean (white without any)."""
    background = label_mask == BACKGROUND
    fill = image[background].mean(0) if background.any() else np.full(3, 255.0)
    return np.where(background[..., None], image, fill.round().astype(np.uint8)).astype(np.uint8)


def _described(image: np.ndarray, label_mask: np.ndarray, edge: int) -> tuple[Tensor, Tensor]:
    density = torch.from_numpy(optical_density(without_tumour(image, label_mask))).float().movedim(-1, 0)
    seen = functional.adaptive_avg_pool2d(density, edge)
    return seen, torch.from_numpy(stain_statistics(image, label_mask)).float()


def _background_pixels(patch: Patch) -> int:
    return int((patch.instances == BACKGROUND).sum())
