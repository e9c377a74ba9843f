"""Pictures for figure 4: a real patch, its mask, the new mask, and what every method drew for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from counterstain.config import build
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import SHARD_PATCHES, PatchSet
from counterstain.data.patches import Patch
from counterstain.data.sampling import PatchSampler
from counterstain.generators.layouts import Layouts, SynthesisConfig, draw_layouts
from counterstain.seeding import derive
from counterstain.storage import write_json
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
        for number, i in enumerate(choose(layouts.patches[:count])):
            real = layouts.patches[i]
            pictures = {
                "real": real.image,
                "mask": palette[real.relabelled(layouts.before[i]).label_mask],
                "new_mask": palette[real.label_mask],
            } | {f"image {method}": found[i].image for method, found in sets.items()}
            files = {name: f"{number:02d}-{name.replace(' ', '-')}.png" for name in pictures}
            for name, picture in pictures.items():
                Image.fromarray(picture).save(folder / files[name])
            rows.append(
                {name: files[name] for name in ("real", "mask", "new_mask")}
                | {"images": {method: files[f"image {method}"] for method in sets}}
                | {"old": _names(cohort, layouts.before[i]), "new": _names(cohort, real.subtypes)}
            )
    write_json(folder / "examples.json", rows)


def choose(patches: list[Patch], number: int = EXAMPLES) -> list[int]:
    """Pick patches that show every new subtype about equally often; prefer those where tissue and background mix."""
    masks = [patch.label_mask for patch in patches]
    shares = np.array([(mask != BACKGROUND).mean() for mask in masks])
    mixed = [i for i in np.argsort(np.abs(shares - 0.5)).tolist() if LEAST_SHARE <= shares[i] <= MOST_SHARE]
    candidates = mixed or [i for i in range(len(patches)) if shares[i] > 0]
    main = {i: int(np.bincount(masks[i][masks[i] != BACKGROUND]).argmax()) for i in candidates}
    shown: dict[int, int] = {}
    chosen: list[int] = []
    while candidates and len(chosen) < number:
        best = min(candidates, key=lambda i: (shown.get(main[i], 0), candidates.index(i)))
        candidates.remove(best)
        shown[main[best]] = shown.get(main[best], 0) + 1
        chosen.append(best)
    return sorted(chosen, key=lambda i: main[i])


def _layouts(cohort: Cohort, found: PatchSet) -> Layouts:
    header = found.header
    config = build(SynthesisConfig, header.settings["synthesis"], found.folder)
    sampler = PatchSampler(cohort, "train", header.size_px, config.sampling, derive(header.seed, "masks"))
    return draw_layouts(sampler, config, header.seed, 0)


def _names(cohort: Cohort, subtypes: dict[int, int]) -> list[str]:
    return [cohort.taxonomy.name_of(subtype) for subtype in subtypes.values()]
