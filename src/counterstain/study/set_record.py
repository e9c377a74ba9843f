"""What is known about a synthetic set, for its data sheet."""

from __future__ import annotations

from typing import Any

import pandas as pd

from counterstain.data.patch_set import PatchSet


def set_record(name: str, found: PatchSet) -> dict[str, Any]:
    """Describe a set: its header, where its masks come from, what was relabelled to what, what was rejected.

    Parameters
    ----------
    name : str
        As the study calls it, mostly the method.
    found : PatchSet

    Returns
    -------
    dict
        Plain values. ``changes`` holds a row per old and new subtype (names): before, after, instances, area_px.
    """
    header = found.header
    patches = found.patches
    attempts = patches["attempts"]
    return {
        "name": name,
        "method": header.method,
        "patches": len(found),
        "size_px": header.size_px,
        "mpp": header.mpp,
        "seed": str(header.seed),  # of 64 bits: more than a number in JSON is sure to hold
        "cohort": header.cohort,
        "generator": header.generator,
        "patients_seen": list(header.patients_seen),
        "settings": header.settings,
        "version": header.version,
        "sources": {kind: int(patches[kind].nunique()) for kind in ("region", "slide", "patient")},
        "drawn": int(attempts.sum()),
        "rejected": int((attempts - 1).sum()),
        "background_only": len(found) - int(found.instances["index"].nunique()),
        "changes": _changes(found),
    }


def _changes(found: PatchSet) -> list[dict[str, Any]]:
    taxonomy = found.header.taxonomy
    known = found.instances[found.instances["subtype"].between(1, len(taxonomy.subtypes))]
    rows: pd.DataFrame = (
        known.groupby(["subtype_before", "subtype"])["area_px"].agg(["size", "sum"]).reset_index().astype("int64")
    )
    return [
        {"before": taxonomy.name_of(before), "after": taxonomy.name_of(after), "instances": count, "area_px": area}
        for before, after, count, area in rows.itertuples(index=False, name=None)
    ]
