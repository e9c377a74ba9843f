"""What the pixels of exported label images mean: every subtype by its id, or all of them as one class."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from counterstain.taxonomy import BACKGROUND, IGNORE, Subtype, Taxonomy, colours

LabelMode = Literal["subtypes", "tumour"]


class ExportedLabels(NamedTuple):
    """The labels of an export."""

    taxonomy: Taxonomy
    lookup: np.ndarray  # (256,) uint8, label in the cohort -> label in the export
    mode: LabelMode


def exported_labels(taxonomy: Taxonomy, mode: LabelMode) -> ExportedLabels:
    """Return the labels of an export: ``subtypes`` as they are, ``tumour`` with all subtypes as label 1."""
    lookup = np.arange(256, dtype=np.uint8)
    if mode == "subtypes":
        return ExportedLabels(taxonomy, lookup, mode)
    lookup[(lookup != BACKGROUND) & (lookup != IGNORE)] = 1
    whole = Subtype(id=1, name=taxonomy.tissue_class, colour=colours(1)[0])
    name = f"{taxonomy.name[:70]}:{mode}"
    return ExportedLabels(Taxonomy(name=name, tissue_class=taxonomy.tissue_class, subtypes=(whole,)), lookup, mode)
