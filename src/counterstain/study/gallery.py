"""Pictures for the report's gallery: patches of every synthetic set, and the real ones that gave their masks.

Nothing is chosen by its looks: of each set the first patches that show an instance. ``gallery.parquet`` has a row per
picture: number, method (``real`` or the set's name), image (WebP), mask (PNG), source (number of the real patch),
region, slide, patient, y_px, x_px, index (in its set), attempts, before and after (labels of its instances), area_px.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet
from counterstain.data.patches import Patch, Source, turn
from counterstain.storage import write_parquet

REAL = "real"
EDGE_PX = 192  # longest edge of a picture: enough to see texture, small enough to mail hundreds
QUALITY = 78  # of WebP
COLUMNS = (
    "number", "method", "image", "mask", "source", "region", "slide", "patient", "y_px", "x_px", "index", "attempts",
    "before", "after", "area_px",
)  # fmt: skip


def write_gallery(file: Path, cohort: Cohort, sets: Mapping[str, PatchSet], number: int) -> None:
    """Write gallery.parquet with at most ``number`` patches of each set."""
    gallery = _Gallery(cohort)
    for name, found in sets.items():
        for index in _shown(found, number):
            gallery.add(name, found, index)
    write_parquet(file, pd.DataFrame(gallery.rows, columns=list(COLUMNS)))


def _shown(found: PatchSet, number: int) -> list[int]:
    return [int(index) for index in np.unique(found.instances["index"])[:number]]


@dataclass
class _Gallery:
    cohort: Cohort
    rows: list[dict[str, Any]] = field(default_factory=list)
    _real: dict[Source, int] = field(default_factory=dict)

    def add(self, name: str, found: PatchSet, index: int) -> None:
        patch = found[index]
        source = self._source(patch.source, found.header.size_px)
        instances = found.instances[found.instances["index"] == index]
        labels = {column: instances[column].tolist() for column in ("area_px", "subtype_before", "subtype")}
        row = found.patches.loc[found.patches["index"] == index].iloc[0]
        self._append(name, patch, source, labels, index=index, attempts=int(row["attempts"]))

    def _source(self, source: Source, size_px: int) -> int:
        """Return the number of the real patch that a mask comes from; it is shown once, whatever came of it."""
        if source not in self._real:
            self._real[source] = len(self.rows)
            patch = _cut(self.cohort, source, size_px)
            own = [patch.subtypes[instance] for instance in patch.areas_px]
            labels = {"area_px": list(patch.areas_px.values()), "subtype_before": own, "subtype": own}
            self._append(REAL, patch, len(self.rows), labels, index=-1, attempts=0)
        return self._real[source]

    def _append(
        self, method: str, patch: Patch, source: int, labels: Mapping[str, list[int]], *, index: int, attempts: int
    ) -> None:
        where = {name: getattr(patch.source, name) for name in ("region", "slide", "patient", "y_px", "x_px")}
        pictures = {"image": _webp(patch.image), "mask": _png(patch.label_mask, self.cohort.taxonomy.palette)}
        before, after, areas = labels["subtype_before"], labels["subtype"], labels["area_px"]
        about = {"number": len(self.rows), "method": method, "source": source, "index": index, "attempts": attempts}
        self.rows.append(about | pictures | where | {"before": before, "after": after, "area_px": areas})


def _cut(cohort: Cohort, source: Source, size_px: int) -> Patch:
    position = int(np.flatnonzero(cohort.regions["region"] == source.region)[0])
    patch = cohort.patch(position, source.y_px, source.x_px, size_px)
    image, instances = (
        turn(array, flipped=source.flipped, quarter_turns=source.quarter_turns)
        for array in (patch.image, patch.instances)
    )
    return Patch(image=image, instances=instances, subtypes=patch.subtypes, source=source)


def _webp(image: np.ndarray) -> bytes:
    return _encoded(_shrunk(Image.fromarray(image), Image.Resampling.LANCZOS), "WEBP", quality=QUALITY, method=4)


def _png(labels: np.ndarray, palette: np.ndarray) -> bytes:
    picture = _shrunk(Image.fromarray(labels), Image.Resampling.NEAREST)
    picture.putpalette(palette.ravel().tolist())
    return _encoded(picture, "PNG", optimize=True)


def _shrunk(picture: Image.Image, how: Image.Resampling) -> Image.Image:
    longest = max(picture.size)
    if longest <= EDGE_PX:
        return picture
    width, height = (max(1, round(n * EDGE_PX / longest)) for n in picture.size)
    return picture.resize((width, height), how)


def _encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()
