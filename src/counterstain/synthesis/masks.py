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


@dataclass(frozen=True)
class Layouts:
    """The relabelled masks of a block of patches."""

    first: int
    """Number of the block's first patch."""
    patches: list[Patch]
    """Real patches with their new subtypes; their images are the real ones."""
    before: list[dict[int, int]]
    """The subtypes that they had."""
    redraw: np.ndarray  # (n, H, W) bool: pixels of instances that got a new label


def draw_layouts(sampler: PatchSampler, config: SynthesisConfig, seed: int, block: int) -> Layouts:
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
    patches, redraw = [], []
    for i, patch in enumerate(real):
        patches.append(patch.relabelled({instance: labels[i, instance] for instance in patch.subtypes}))
        redraw.append(redrawn_pixels(patch.instances, patch.subtypes, kept))
    return Layouts(first, patches, [patch.subtypes for patch in real], np.stack(redraw))
