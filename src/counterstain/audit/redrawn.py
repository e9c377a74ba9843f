"""Which instances of a synthetic set were drawn for a new subtype, and which relabelling kept."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from counterstain.data.patch_set import PatchSet
from counterstain.data.patches import Patch
from counterstain.taxonomy import BACKGROUND, IGNORE

REAL = frozenset({IGNORE})  # of real patches every instance counts that has a subtype


def kept_subtypes(patch_set: PatchSet) -> frozenset[int]:
    """Return the subtypes, 255 among them, whose instances relabelling left alone; inpainting does not draw these."""
    names = patch_set.header.settings["synthesis"]["relabel"]["keep"]
    return frozenset({IGNORE, *(patch_set.header.taxonomy.id_of(name) for name in names)})


def redrawn_pixels(patch: Patch, kept: Collection[int]) -> np.ndarray:
    """Return which pixels lie in instances of other subtypes than those kept, (H, W) bool."""
    fixed = [instance for instance, subtype in patch.subtypes.items() if subtype in kept]
    return np.asarray((patch.instances != BACKGROUND) & ~np.isin(patch.instances, fixed))
