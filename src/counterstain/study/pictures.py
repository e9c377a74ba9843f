"""Pictures of a study's results: examples for a figure, and the report's gallery.

An example shows a real patch, its mask, the new mask, and what every method drew for it. The gallery shows patches of
every synthetic set and the real ones that gave their masks. Nothing is chosen by its looks: of each set the first
patches that show an instance. ``gallery.parquet`` has a row per picture: number, method (``real`` or the set's name),
image (WebP), mask (PNG), source (number of the real patch), region, slide, patient, y_px, x_px, index (in its set),
attempts, before and after (labels of its instances), area_px.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from counterstain.config import build
from counterstain.data.cohort import Cohort
from counterstain.data.overlays import cut_again
from counterstain.data.patch_set import SHARD_PATCHES, PatchSet
from counterstain.data.patches import Patch, Source
from counterstain.storage import write_json, write_parquet
from counterstain.synthesis.masks import Layout, Layouts, SynthesisConfig
from counterstain.taxonomy import BACKGROUND

EXAMPLES = 8
LEAST_SHARE, MOST_SHARE = 0.15, 0.85  # of tissue-class pixels: there is something to draw, and something around it


def write_examples(folder: Path, cohort: Cohort, sets: dict[str, PatchSet]) -> None:
    """Write examples.json and its PNG files; empty where there is no synthetic set."""
    folder.mkdir(parents=True)
    rows = []
    if sets:
        layouts = _layouts(cohort, next(iter(sets.values())))
        palette = cohort.taxonomy.palette
        count = min(SHARD_PATCHES, *(len(found) for found in sets.values()))
        for number, i in enumerate(_chosen([layout.patch for layout in layouts[:count]])):
            real, before = layouts[i].patch, layouts[i].before
            masks = {"mask": palette[real.relabelled(before).label_mask], "new_mask": palette[real.label_mask]}
            drawn = {f"image-{method}": found[i].image for method, found in sets.items()}
            files = {}
            for name, picture in ({"real": real.image} | masks | drawn).items():
                files[name] = f"{number:02d}-{name}.png"
                Image.fromarray(picture).save(folder / files[name])
            images = {"images": {method: files.pop(f"image-{method}") for method in sets}}
            rows.append(files | images | {"old": _names(cohort, before), "new": _names(cohort, real.subtypes)})
    write_json(folder / "examples.json", rows)


def _chosen(patches: list[Patch]) -> list[int]:
    """Return the places of patches that show every new subtype about equally often, mixed with background."""
    masks = [patch.label_mask for patch in patches]
    shares = np.array([(mask != BACKGROUND).mean() for mask in masks])
    mixed = [i for i in np.argsort(np.abs(shares - 0.5)).tolist() if LEAST_SHARE <= shares[i] <= MOST_SHARE]
    candidates = mixed or [i for i in range(len(patches)) if shares[i] > 0]
    main = {i: int(np.bincount(masks[i][masks[i] != BACKGROUND]).argmax()) for i in candidates}
    shown = Counter[int]()
    chosen: list[int] = []
    while candidates and len(chosen) < EXAMPLES:
        best = min(candidates, key=lambda i: shown[main[i]])
        candidates.remove(best)
        shown[main[best]] += 1
        chosen.append(best)
    return sorted(chosen, key=main.__getitem__)


def _layouts(cohort: Cohort, found: PatchSet) -> list[Layout]:
    header = found.header
    config = build(SynthesisConfig, header.settings["synthesis"], found.folder)
    return Layouts.of(cohort, config, size_px=header.size_px, seed=header.seed)(0)


def _names(cohort: Cohort, subtypes: dict[int, int]) -> list[str]:
    return [cohort.taxonomy.name_of(subtype) for subtype in subtypes.values()]


REAL = "real"
EDGE_PX = 192  # longest edge of a picture: enough to see texture, small enough to mail hundreds
QUALITY = 78  # of WebP
COLUMNS = (
    "number", "method", "image", "mask", "source", "region", "slide", "patient", "y_px", "x_px", "index", "attempts",
    "before", "after", "area_px",
)  # fmt: skip


def write_gallery(file: Path, cohort: Cohort, sets: Mapping[tuple[str, int], PatchSet], number: int) -> None:
    """Write gallery.parquet with about ``number`` patches of each method, shared out over its sets, one a fold."""
    gallery, of_name = _Gallery(cohort), Counter(name for name, _ in sets)
    for (name, fold), found in sets.items():
        for index in np.unique(found.instances["index"])[: -(-number // of_name[name])].tolist():
            gallery.add(name, fold, found, index)
    table = pd.DataFrame(gallery.rows, columns=[*COLUMNS, "fold"])
    write_parquet(file, table if table["fold"].any() else table[list(COLUMNS)])


@dataclass
class _Gallery:
    cohort: Cohort
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    _real: dict[Source, int] = field(default_factory=dict)

    def add(self, name: str, fold: int, found: PatchSet, index: int) -> None:
        patch = found[index]
        source = self._source(patch.source, found.header.size_px)
        instances = found.instances[found.instances["index"] == index]
        labels = [instances[column].tolist() for column in ("subtype_before", "subtype", "area_px")]
        row = found.patches.loc[found.patches["index"] == index].iloc[0]
        self._append(name, patch, source, labels, index=index, attempts=int(row["attempts"]), fold=fold)

    def _source(self, source: Source, size_px: int) -> int:
        """Return the number of the real patch that a mask comes from; it is shown once, whatever came of it."""
        if source not in self._real:
            self._real[source] = len(self.rows)
            patch = cut_again(self.cohort, source, size_px)
            own = [patch.subtypes[instance] for instance in patch.areas_px]
            labels = [own, own, list(patch.areas_px.values())]
            self._append(REAL, patch, len(self.rows), labels, index=-1, attempts=0)
        return self._real[source]

    def _append(
        self,
        method: str,
        patch: Patch,
        source: int,
        labels: list[list[int]],
        *,
        index: int,
        attempts: int,
        fold: int = 0,
    ) -> None:
        image, mask = _webp(patch.image), _png(patch.label_mask, self.cohort.taxonomy.palette)
        where = [getattr(patch.source, name) for name in ("region", "slide", "patient", "y_px", "x_px")]
        row = (len(self.rows), method, image, mask, source, *where, index, attempts, *labels, fold)
        self.rows.append(row)


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
