"""An audit on disk: tables, and pictures of what the figures are about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from counterstain.audit.copies import Match
from counterstain.audit.findings import REFERENCES, Audit, Findings
from counterstain.audit.ruler import AuditConfig
from counterstain.data.patch_set import PatchSet
from counterstain.storage import replacing, write_csv, write_json

PAIRS, EXAMPLES, GAP_PX = 12, 16, 4


def write_audit(audit: Audit, sets: dict[str, PatchSet], config: AuditConfig, out: Path) -> None:
    """Write ``audit.csv`` (a row per kind of images), ``confusion.csv``, ``nearest.csv``, ``copies.csv``,
    ``audit.json`` (settings and sets), and for each set ``SET-nearest.png`` (drawn images above the sampled training
    patches nearest to them), ``SET-copies.png`` (above the training tissue that is likest) and ``SET-examples.png``.
    """
    write_csv(out / "audit.csv", audit.table())
    write_csv(out / "confusion.csv", pd.concat([_confusion_rows(f) for f in audit.findings], ignore_index=True))
    write_csv(out / "copies.csv", _joined({f.name: f.copies.table for f in audit.findings}))
    write_csv(out / "nearest.csv", _joined({f.name: f.nearest for f in audit.findings}))
    headers = {name: s.header.model_dump(mode="json", exclude={"taxonomy"}) for name, s in sets.items()}
    write_json(out / "audit.json", {"settings": config.model_dump(mode="json"), "sets": headers})
    for findings in audit.findings:
        if findings.name not in REFERENCES:
            _write_image(out / f"{findings.name}-nearest.png", _pairs(findings, sets[findings.name], audit))
            if len(findings.copies.table):
                _write_image(out / f"{findings.name}-copies.png", _likest(findings, sets[findings.name], audit))
            drawn = [sets[findings.name][i].image for i in range(EXAMPLES)]
            _write_image(out / f"{findings.name}-examples.png", _tiled(drawn, columns=8))


def _joined(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Put tables of the same columns below each other, with the kind of images as their last column."""
    named = [table.assign(images=name) for name, table in tables.items()]
    return pd.concat([table for table in named if len(table)] or named[:1], ignore_index=True)


def _confusion_rows(findings: Findings) -> pd.DataFrame:
    long = findings.confusion.rename_axis("asked").reset_index().melt("asked", var_name="seen", value_name="instances")
    return long.assign(images=findings.name)


def _pairs(findings: Findings, patch_set: PatchSet, audit: Audit) -> np.ndarray:
    nearest = findings.nearest.head(PAIRS)
    drawn = [patch_set[int(i)].image for i in nearest["image"]]
    real = [audit.training_patches[int(i)].image for i in nearest["training_patch"]]
    return _tiled([*drawn, *real], columns=len(drawn))


def _likest(findings: Findings, patch_set: PatchSet, audit: Audit) -> np.ndarray:
    rows = findings.copies.table.head(PAIRS).to_dict("records")
    matches = [Match(**{name: row[name] for name in Match.__dataclass_fields__}) for row in rows]
    drawn = [patch_set[int(row["image"])].image for row in rows]
    return _tiled([*drawn, *(audit.search.crop(match) for match in matches)], columns=len(drawn))


def _tiled(images: list[np.ndarray], columns: int) -> np.ndarray:
    """Lay images (H, W, 3) out in rows of so many columns, white between them."""
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    shape = (rows * (height + GAP_PX) - GAP_PX, columns * (width + GAP_PX) - GAP_PX, 3)
    canvas = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + GAP_PX), (i % columns) * (width + GAP_PX)
        canvas[y : y + height, x : x + width] = image
    return canvas


def _write_image(path: Path, pixels: np.ndarray) -> None:
    with replacing(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")
