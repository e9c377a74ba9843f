"""Which instances of a synthetic set were drawn for a new subtype, and which relabelling kept."""

from __future__ import annotations

from counterstain.data.patch_set import PatchSet
from counterstain.taxonomy import IGNORE

REAL = frozenset({IGNORE})  # of real patches every instance counts that has a subtype


def kept_subtypes(patch_set: PatchSet) -> frozenset[int]:
    """Return the subtypes, 255 among them, whose instances relabelling left alone; inpainting does not draw these."""
    names = patch_set.header.settings["synthesis"]["relabel"]["keep"]
    return frozenset({IGNORE, *(patch_set.header.taxonomy.id_of(name) for name in names)})
