"""What a generator makes of every subtype, to be looked at before a set is drawn or a study run.

Some training patches of each subtype, all of whose instances are redrawn as each subtype in turn, from the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.data.relabel import redrawn_pixels
from counterstain.data.sampling import PatchSampler
from counterstain.errors import InputError
from counterstain.generators.interface import DrawRequest, ImageGenerator
from counterstain.seeding import derive
from counterstain.synthesis.masks import SynthesisConfig
from counterstain.synthesis.styles import StyleDrawer, style_drawer
from counterstain.synthesis.synthesize import require_generator_fits

CANDIDATES = 8  # patches that the one with the most of its subtype is chosen from


@dataclass(frozen=True, kw_only=True)
class Redrawn:
    """A real patch, redrawn as each subtype."""

    patch: Patch
    """The real one."""
    subtype: int
    """What it was chosen for."""
    drawn: dict[int, np.ndarray]
    """Images (H, W, 3) uint8 by the subtype that was asked for."""


def preview(
    generator: ImageGenerator,
    cohort: Cohort,
    config: SynthesisConfig,
    *,
    size_px: int,
    seed: int,
    per_subtype: int = 2,
) -> list[Redrawn]:
    """Redraw training patches of every subtype as every subtype.

    Parameters
    ----------
    generator : ImageGenerator
    config : SynthesisConfig
        Its style and ``relabel.keep``: those subtypes are neither redrawn nor asked for.
    per_subtype : int
        Patches of each subtype.

    Raises
    ------
    InputError
        The training part has no instance that may be redrawn.
    LeakageError, MismatchError
        As :func:`counterstain.synthesis.synthesize.synthesize`.
    """
    require_generator_fits(generator, cohort, size_px)
    style = style_drawer(generator, cohort, config.style, size_px=size_px, seed=seed)
    chosen = _chosen(cohort, config, size_px, seed, per_subtype)
    if not chosen:
        raise InputError(f"{cohort.folder}: its training part has no instance that may be redrawn")
    kept = config.relabel.kept(cohort.taxonomy)
    asked = [s.id for s in cohort.taxonomy.subtypes if s.id not in kept]
    return [
        Redrawn(
            patch=patch,
            subtype=subtype,
            drawn=_drawn(generator, patch, asked, kept, style, number=number, seed=derive(seed, "image", number, 0)),
        )
        for number, (subtype, patch) in enumerate(chosen)
    ]


def _chosen(
    cohort: Cohort, config: SynthesisConfig, size_px: int, seed: int, per_subtype: int
) -> list[tuple[int, Patch]]:
    """Return patches and the subtype that each is chosen for: of some candidates the ones that show most of it."""
    found = []
    centred = config.sampling.model_copy(update={"mode": "subtype", "background_share": 0.0, "subtypes": None})
    missing = PatchSampler(cohort, "train", size_px, centred, seed).missing_subtypes
    for subtype in cohort.taxonomy.subtypes:
        if subtype.name in {*missing, *config.relabel.keep}:
            continue
        of_one = centred.model_copy(update={"subtypes": (subtype.name,)})
        sampler = PatchSampler(cohort, "train", size_px, of_one, derive(seed, "preview", subtype.name))
        for first in range(0, per_subtype * CANDIDATES, CANDIDATES):
            candidates = [sampler[i] for i in range(first, first + CANDIDATES)]
            found.append((subtype.id, max(candidates, key=lambda patch: int((patch.label_mask == subtype.id).sum()))))
    return found


def _drawn(
    generator: ImageGenerator,
    patch: Patch,
    asked: list[int],
    kept: frozenset[int],
    style: StyleDrawer | None,
    *,
    number: int,
    seed: int,
) -> dict[int, np.ndarray]:
    redraw = redrawn_pixels(patch.instances, patch.subtypes, kept)
    code = None if style is None else style(patch.source.slide, number).code
    real = DrawRequest.of(patch, seed, redraw, code)
    masks = [np.where(redraw, subtype, patch.label_mask).astype(np.uint8) for subtype in asked]
    return dict(zip(asked, generator.draw([replace(real, mask=mask) for mask in masks]), strict=True))
