"""Pairs of images that differ in style alone: the material for the question whether a style changes the subtype.

Draw the same masks from the same noise in the style of their own slides and in that of others, let a classifier of
subtypes judge both, and compare: where style and subtype are independent, both agree with the masks equally often.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import SHARD_PATCHES
from counterstain.data.patches import Patch
from counterstain.data.sampling import PatchSampler
from counterstain.generators.interface import ImageGenerator
from counterstain.generators.layouts import SynthesisConfig, draw_layouts
from counterstain.generators.style import references_of
from counterstain.generators.style_config import StyleChoice
from counterstain.generators.style_drawing import Mix, StyleDrawer
from counterstain.seeding import derive


@dataclass(frozen=True, kw_only=True)
class StyleSwap:
    """Relabelled masks, each drawn twice from the same noise."""

    layouts: list[Patch]
    """Real patches with their new subtypes: instances and labels of both images."""
    own: np.ndarray  # (n, H, W, 3) uint8, in the style of the mask's slide
    swapped: np.ndarray  # (n, H, W, 3) uint8, in the style of another training slide
    own_mixes: list[Mix]
    swapped_mixes: list[Mix]


def style_swap(
    generator: ImageGenerator, cohort: Cohort, config: SynthesisConfig, *, count: int, size_px: int, seed: int
) -> StyleSwap:
    """Draw ``count`` relabelled masks in their own and in another style.

    Parameters
    ----------
    generator : ImageGenerator
        One that takes styles.
    config : SynthesisConfig
        How masks are cut out and relabelled; its ``style`` is not used.

    Raises
    ------
    ConfigError
        The generator takes no styles.
    InputError
        The cohort has one training slide only.
    """
    references = references_of(cohort, size_px, seed)
    drawers = [StyleDrawer(generator, references, StyleChoice(source=source)) for source in ("own", "other")]
    sampler = PatchSampler(cohort, "train", size_px, config.sampling, derive(seed, "masks"))
    drawn: list[list[np.ndarray]] = [[], []]
    mixes: list[list[Mix]] = [[], []]
    layouts: list[Patch] = []
    for block in range(-(-count // SHARD_PATCHES)):
        found = draw_layouts(sampler, config, seed, block)
        numbers = range(found.first, min(found.first + SHARD_PATCHES, count))
        patches = found.patches[: len(numbers)]
        layouts += patches
        for which, drawer in enumerate(drawers):
            styles = drawer([patch.source.slide for patch in patches], numbers)
            mixes[which] += styles.mixes
            drawn[which].append(
                generator.generate(
                    np.stack([patch.label_mask for patch in patches]),
                    [derive(seed, "image", number, 0) for number in numbers],
                    np.stack([patch.image for patch in patches]),
                    found.redraw[: len(numbers)],
                    instances=np.stack([patch.instances for patch in patches]),
                    slides=[patch.source.slide for patch in patches],
                    styles=styles.codes,
                )
            )
    return StyleSwap(
        layouts=layouts,
        own=np.concatenate(drawn[0]),
        swapped=np.concatenate(drawn[1]),
        own_mixes=mixes[0],
        swapped_mixes=mixes[1],
    )
