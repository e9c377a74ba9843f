"""The masks of a synthetic set: cut out of training regions and relabelled, block by block.

Masks do not depend on the method, so the methods are compared on the same masks, and a larger set begins with the
smaller one of the same seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from counterstain.config import Config
from counterstain.data.patch_set import SHARD_PATCHES
from counterstain.data.patches import Patch
from counterstain.data.relabel import Instance, RelabelConfig, redrawn_pixels, relabel
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.generators.diffusion_config import StyleChoice


class SynthesisConfig(Config):
    """Which masks are drawn from, how they are relabelled and which images are refused."""

    sampling: SamplingConfig = SamplingConfig()
    """Which patches give their masks."""
    relabel: RelabelConfig = RelabelConfig()
    """Which subtypes their instances get."""
    reject: Literal["none", "near_white"] = "none"
    """Images to draw again: ``near_white`` = brighter than ``white_level`` although the mask shows tissue."""
    white_level: Annotated[float, Field(gt=0, le=255)] = 235.0
    """Mean grey level (0..255) inside the instances above which an image counts as near white."""
    style: StyleChoice = StyleChoice()
    """Whose style images are drawn in."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 5
    """Images drawn at most for one patch; the last one is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A relabelled mask."""

    number: int
    """Of the patch, from which all its random numbers derive."""
    patch: Patch
    """The real patch with its new subtypes; the image is the real one."""
    before: dict[int, int]
    """The subtypes that it had."""
    redraw: np.ndarray  # (H, W) bool: pixels of instances that got a new label


def draw_layouts(sampler: PatchSampler, config: SynthesisConfig, seed: int, block: int) -> list[Layout]:
    """Cut masks out and relabel them: patches ``block * SHARD_PATCHES`` and the following."""
    first = block * SHARD_PATCHES
    real = [sampler[first + i] for i in range(SHARD_PATCHES)]
    taxonomy = sampler.cohort.taxonomy
    instances = [
        Instance(patch=i, instance=instance, subtype=patch.subtypes[instance], area_px=area)
        for i, patch in enumerate(real)
        for instance, area in patch.areas_px.items()
    ]
    labels = relabel(instances, config.relabel, taxonomy, seed, block)
    kept = config.relabel.kept(taxonomy)
    return [
        Layout(
            number=first + i,
            patch=patch.relabelled({instance: labels[i, instance] for instance in patch.subtypes}),
            before=patch.subtypes,
            redraw=redrawn_pixels(patch.instances, patch.subtypes, kept),
        )
        for i, patch in enumerate(real)
    ]
