"""An audit on disk: tables, and pictures of what the figures are about."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from PIL import Image

from counterstain.audit.copies import Match
from counterstain.audit.findings import REFERENCES, Audit, Findings
from counterstain.audit.pictures import sheet
from counterstain.audit.ruler import AuditConfig
from counterstain.data.patch_set import PatchSet
from counterstain.storage import replacing, write_csv, write_json

PAIRS, EXAMPLES = 12, 12


def write_audit(audit: Audit, sets: dict[str, PatchSet], config: AuditConfig, out: Path) -> None:
    """Write ``audit.csv`` (a row per kind of images), ``confusion.csv``, ``nearest.csv``, ``copies.csv``,
    ``audit.json`` (settings and sets), and for each set ``SET-nearest.png`` (drawn images above the sampled training
    patches nearest to them), ``SET-copies.png`` (above the training tissue that is likest) and ``SET-examples.png``
    (below the subtypes that were asked for).
    """
    write_csv(out / "audit.csv", audit.table())
    write_csv(out / "confusion.csv", pd.concat([_confusion_rows(f) for f in audit.findings], ignore_index=True))
    write_csv(out / "copies.csv", _joined({f.name: f.copies.table for f in audit.findings}))
    write_csv(out / "nearest.csv", _joined({f.name: f.nearest for f in audit.findings}))
    headers = {name: s.header.model_dump(mode="json", exclude={"taxonomy"}) for name, s in sets.items()}
    write_json(out / "audit.json", {"settings": config.model_dump(mode="json"), "sets": headers})
    for findings in audit.findings:
        if findings.name not in REFERENCES:
            _write_image(out / f"{findings.name}-nearest.png", _nearest(findings, sets[findings.name], audit))
            if len(findings.copies.table):
                _write_image(out / f"{findings.name}-copies.png", _likest(findings, sets[findings.name], audit))
            _write_image(out / f"{findings.name}-examples.png", _examples(sets[findings.name]))


def _joined(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Put tables of the same columns below each other, with the kind of images as their last column."""
    named = [table.assign(images=name) for name, table in tables.items()]
    return pd.concat([table for table in named if len(table)] or named[:1], ignore_index=True)


def _confusion_rows(findings: Findings) -> pd.DataFrame:
    long = findings.confusion.rename_axis("asked").reset_index().melt("asked", var_name="seen", value_name="instances")
    return long.assign(images=findings.name)


def _nearest(findings: Findings, patch_set: PatchSet, audit: Audit) -> Image.Image:
    """Draw images above the training patches that are nearest to them; captions are distances."""
    rows = findings.nearest.head(PAIRS)
    drawn = [patch_set[int(i)].image for i in rows["image"]]
    real = [audit.training_patches[int(i)].image for i in rows["training_patch"]]
    captions = [f"{distance:.2f}" for distance in rows["distance"]]
    return sheet({"drawn": drawn, "nearest training patch": real}, captions)


def _likest(findings: Findings, patch_set: PatchSet, audit: Audit) -> Image.Image:
    """Draw images above the training tissue that they resemble most; captions are correlations and regions."""
    rows = findings.copies.table.head(PAIRS).to_dict("records")
    matches = [Match(**{name: row[name] for name in Match.__dataclass_fields__}) for row in rows]
    drawn = [patch_set[int(row["image"])].image for row in rows]
    captions = [f"{match.similarity:.2f}\n{audit.search.name_of(match)}" for match in matches]
    return sheet({"drawn": drawn, "likest training tissue": [audit.search.crop(m) for m in matches]}, captions)


def _examples(patch_set: PatchSet) -> Image.Image:
    """Draw the first images below what was asked for."""
    patches = [patch_set[i] for i in range(min(EXAMPLES, len(patch_set)))]
    taxonomy = patch_set.header.taxonomy
    labels = [taxonomy.palette[patch.label_mask] for patch in patches]
    captions = ["\n".join(map(taxonomy.name_of, sorted(set(patch.subtypes.values())))) for patch in patches]
    return sheet({"asked": labels, "drawn": [patch.image for patch in patches]}, captions)


def _write_image(path: Path, picture: Image.Image) -> None:
    with replacing(path) as partial:
        picture.save(partial, format="PNG")
