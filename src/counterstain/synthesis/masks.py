"""The masks of a synthetic set: cut out of training regions and relabelled, block by block.

New layouts also hold instances of other slides, moved onto the background (outline, and nuclei where a generator keeps
them) and drawn there like the rest: copy-paste (Ghiasi et al., CVPR 2021) whose seams and stain are the generator's.

Masks do not depend on the method, so the methods are compared on the same masks, and a larger set begins with the
smaller one of the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field
from scipy import ndimage

from counterstain.config import Config
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import SHARD_PATCHES
from counterstain.data.patches import Patch, Source
from counterstain.data.relabel import Instance, RelabelConfig, redrawn_pixels, relabel
from counterstain.data.sampling import CopyPasteConfig, PastedPatches, PatchSampler, SamplingConfig
from counterstain.errors import ConfigError, InputError
from counterstain.generators.diffusion_config import StyleChoice
from counterstain.seeding import derive
from counterstain.taxonomy import BACKGROUND

MARGIN_UM = 4.0  # of background around a moved instance that is drawn with it, so that no seam shows


OFF = Field(exclude_if=lambda value: value is None)  # so that sets of versions without the setting keep their identity


class LayoutsConfig(CopyPasteConfig):
    """Which instances of other slides are moved into a patch and drawn there.

    All masks are then centred on background: the moved instances take the place of the masks that are otherwise centred
    on the tissue class, whose share of the pixels stays about the same.
    """

    relabel: bool = True
    """Whether a patch's own instances are relabelled and drawn as well; otherwise they keep their subtype and, with
    inpainting, their pixels."""


class SynthesisConfig(Config):
    """Which masks are drawn from, how they are relabelled and which images are refused."""

    sampling: SamplingConfig = SamplingConfig()
    """Which patches give their masks."""
    relabel: RelabelConfig = RelabelConfig()
    """Which subtypes their instances get."""
    reject: Literal["none", "near_white"] = "none"
    """Images to draw again: ``near_white`` = brighter than ``white_level`` although the mask shows tissue."""
    white_level: Annotated[float, Field(gt=0, le=255)] = 235.0
    """Mean grey level (0..255) inside the instances above which an image counts as near white."""
    style: StyleChoice = StyleChoice()
    """Whose style images are drawn in."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 5
    """Images drawn at most for one patch; the last one is kept."""
    layouts: Annotated[LayoutsConfig | None, OFF] = None
    """Move instances of other slides' training regions into the background and draw them there; null = off."""
    slides: Annotated[dict[str, Annotated[float, Field(ge=0)]] | None, OFF] = None
    """How often masks are cut out of each training slide, relative to the others (not named = never); null = equally
    often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A relabelled mask."""

    number: int  # of the patch, from which all its random numbers derive
    patch: Patch  # the real patch with its new subtypes; the image is the real one
    before: dict[int, int]  # the subtypes that it had
    redraw: np.ndarray  # (H, W) bool: pixels of instances that got a new label, or were moved
    moved: Mapping[int, Source] = field(default_factory=dict)  # where each moved instance was cut out


@dataclass(frozen=True, kw_only=True)
class Layouts:
    """The masks of a set, block by block; each follows from the seed and its number alone."""

    sampler: PatchSampler
    config: SynthesisConfig
    seed: int
    moves: PastedPatches | None

    @classmethod
    def of(cls, cohort: Cohort, config: SynthesisConfig, *, size_px: int, seed: int, part: str = "train") -> Self:
        """Cut the masks out of a part of the split.

        Raises InputError where the training part has no instance to be moved, besides what a sampler raises, and
        ConfigError where instances are to be moved into another part.
        """
        if part != "train" and config.layouts is not None:
            raise ConfigError(f"synthesis.layouts: new layouts are of training tissue, not of {part}; set it to null")
        sampling = config.sampling
        if config.layouts is not None:
            sampling = sampling.model_copy(update={"background_share": 1.0})
        sampler = PatchSampler(cohort, part, size_px, sampling, derive(seed, "masks"), slides=config.slides)
        if config.layouts is None:
            return cls(sampler=sampler, config=config, seed=seed, moves=None)
        if cohort.regions.loc[cohort.regions["split"] == "train", "slide"].nunique() < 2:
            raise InputError(f"{cohort.folder}: new layouts need two training slides, as instances change their slide")
        moves = PastedPatches(
            (),
            cohort,
            size_px=size_px,
            config=config.layouts,
            sampling=config.sampling,
            seed=derive(seed, "layouts"),
            apart="slide",
            without=config.relabel.kept(cohort.taxonomy),
        )
        return cls(sampler=sampler, config=config, seed=seed, moves=moves)

    def __call__(self, block: int) -> list[Layout]:
        """Cut masks out and relabel them: patches ``block * SHARD_PATCHES`` and the following."""
        first = block * SHARD_PATCHES
        real = [self.sampler[first + i] for i in range(SHARD_PATCHES)]
        taxonomy, relabelling = self.sampler.cohort.taxonomy, self.config.relabel
        kept = relabelling.kept(taxonomy)
        if self.config.layouts is not None and not self.config.layouts.relabel:
            kept = frozenset({*kept, *(subtype.id for subtype in taxonomy.subtypes)})
            labels = {(i, instance): old for i, patch in enumerate(real) for instance, old in patch.subtypes.items()}
        else:
            instances = [
                Instance(patch=i, instance=instance, subtype=patch.subtypes[instance], area_px=area)
                for i, patch in enumerate(real)
                for instance, area in patch.areas_px.items()
            ]
            labels = relabel(instances, relabelling, taxonomy, self.seed, block)
        layouts = [
            Layout(
                number=first + i,
                patch=patch.relabelled({instance: labels[i, instance] for instance in patch.subtypes}),
                before=patch.subtypes,
                redraw=redrawn_pixels(patch.instances, patch.subtypes, kept),
            )
            for i, patch in enumerate(real)
        ]
        return (
            layouts
            if self.moves is None
            else [_with_moved(layout, self.moves, self.sampler.cohort.mpp) for layout in layouts]
        )


def _with_moved(layout: Layout, moves: PastedPatches, mpp: float) -> Layout:
    """Move instances into a mask; with them their surroundings are drawn, as far as they are background."""
    patch, sources = moves.pasted(layout.patch, layout.number)
    moved = np.isin(patch.instances, list(sources))
    margin = max(1, round(MARGIN_UM / mpp))
    around = ndimage.binary_dilation(moved, np.ones((3, 3), bool), iterations=margin)
    return Layout(
        number=layout.number,
        patch=patch,
        before=layout.before | {instance: patch.subtypes[instance] for instance in sources},
        redraw=layout.redraw | (around & (moved | (patch.instances == BACKGROUND))),
        moved=sources,
    )
