"""Copy-paste: instances of training patches cut out by their masks and laid on the background of others.

Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation" (CVPR 2021), with
right angles instead of free turns and scales, so that pixels are copied and never blended or resampled.

Shapes: H, W = rows and columns of a patch in pixels; h, w = those of a cut-out, at most H and W.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from counterstain.config import Config
from counterstain.data.cohort import Cohort
from counterstain.data.patches import Box, Patch
from counterstain.data.sampling import PatchSource, SamplingConfig, vary
from counterstain.data.split import check_no_leak
from counterstain.errors import InputError
from counterstain.seeding import numpy_generator
from counterstain.taxonomy import BACKGROUND

TRIES = 8  # instances of another region, and places for one, that are drawn before one is left out


class CopyPasteConfig(Config):
    """Which instances are pasted, and how many."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the real patches that get instances of other regions."""
    instances: Annotated[int, Field(ge=1)] = 3
    """Most instances that a patch gets; their number is drawn from 1 to this."""
    target: Literal["inverse", "uniform"] | dict[str, Annotated[float, Field(ge=0)]] = "inverse"
    """How often each subtype is pasted: in inverse proportion to the training part's instances of it, equally often,
    or shares by name; names that are left out are not pasted."""
    min_visible: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a cut-out that must find background under it; if not, other places are tried, 8 in all."""


@dataclass(frozen=True, slots=True)
class _Donor:
    """An instance that may be cut out."""

    position: int  # of its region in the cohort
    instance: int
    box: Box


class PastedPatches:
    """Real patches, some with instances of other training regions on their background; ``[i]`` follows from the seed.

    Pasted instances never cover others: outside the background that they fall on, every byte and label is kept. They
    are cut out of the training part, stained as patches are, and always mirrored and turned at random.

    Attributes
    ----------
    shares : dict
        Subtype (id) -> how often it is drawn.

    Raises
    ------
    InputError
        The training part has no instance of what is to be pasted.
    TaxonomyError
        ``config.target`` names a subtype that the taxonomy does not have.
    LeakageError
        A training region is of a validation or test patient.
    """

    def __init__(
        self,
        real: PatchSource,
        cohort: Cohort,
        *,
        size_px: int,
        config: CopyPasteConfig,
        sampling: SamplingConfig,
        seed: int,
    ) -> None:
        self._real, self._cohort, self._size_px, self._seed = real, cohort, size_px, seed
        self._config = config
        self._sampling = sampling.model_copy(update={"flip": True, "quarter_turns": True})
        regions = cohort.regions.iloc[cohort.part("train")].assign(position=cohort.part("train"))
        check_no_leak(regions["patient"], cohort, f"{cohort.folder}: its training part")
        instances = cohort.instances.merge(regions[["region", "slide", "position"]], on="region")
        self.shares = _shares(instances, config, cohort)
        self._donors = {subtype: _by_slide(instances[instances["subtype"] == subtype]) for subtype in self.shares}

    def __getitem__(self, index: int) -> Patch:
        """Return the patch number ``index`` (0, 1, 2, … without end)."""
        patch = self._real[index]
        rng = numpy_generator(self._seed, "copy-paste", index)
        if rng.random() >= self._config.share:
            return patch
        for _ in range(int(rng.integers(1, self._config.instances + 1))):
            cut_out = self.cut_out(patch.source.region, rng)
            if cut_out is not None:
                patch = pasted(patch, cut_out, self._config.min_visible, rng)
        return patch

    def cut_out(self, region: str, rng: np.random.Generator) -> Patch | None:
        """Draw an instance of another region: its box, with the instance alone in its map."""
        subtype = int(rng.choice(list(self.shares), p=list(self.shares.values())))
        slides = self._donors[subtype]
        for _ in range(TRIES):
            donors = slides[int(rng.integers(len(slides)))]
            donor = donors[int(rng.integers(len(donors)))]
            if str(self._cohort.regions["region"].iloc[donor.position]) == region:
                continue
            patch = self._crop(donor, rng)
            alone = np.where(patch.instances == donor.instance, patch.instances, BACKGROUND)
            return vary(replace(patch, instances=alone, subtypes={donor.instance: subtype}), self._sampling, rng)
        return None

    def _crop(self, donor: _Donor, rng: np.random.Generator) -> Patch:
        """Cut the box of an instance out of its region; of a large one, a window inside its box."""
        y0, x0, y1, x1 = donor.box
        height, width = min(y1 - y0, self._size_px), min(x1 - x0, self._size_px)
        y = y0 + int(rng.integers(y1 - y0 - height + 1))
        x = x0 + int(rng.integers(x1 - x0 - width + 1))
        square = self._cohort.patch(donor.position, y, x, max(height, width))
        return replace(square, image=square.image[:height, :width], instances=square.instances[:height, :width])


def pasted(patch: Patch, cut_out: Patch, min_visible: float, rng: np.random.Generator) -> Patch:
    """Lay the one instance of a cut-out, (h, w), on the background of a patch, (H, W).

    At least the share ``min_visible`` of the instance must fall on background; the same patch is returned where no
    place was found. The patch's source is kept, its arrays are not written into.
    """
    mask = cut_out.instances != BACKGROUND
    height, width = mask.shape
    for _ in range(TRIES):
        y = int(rng.integers(patch.image.shape[0] - height + 1))
        x = int(rng.integers(patch.image.shape[1] - width + 1))
        window = np.s_[y : y + height, x : x + width]
        visible = mask & (patch.instances[window] == BACKGROUND)
        if visible.any() and visible.sum() >= min_visible * mask.sum():
            new = max(patch.subtypes, default=BACKGROUND) + 1
            image, instances = patch.image.copy(), patch.instances.copy()
            image[window][visible] = cut_out.image[visible]
            instances[window][visible] = new
            (subtype,) = cut_out.subtypes.values()
            return replace(patch, image=image, instances=instances, subtypes=patch.subtypes | {new: subtype})
    return patch


def _shares(instances: pd.DataFrame, config: CopyPasteConfig, cohort: Cohort) -> dict[int, float]:
    """Return how often each subtype is drawn; those without a training instance are left out."""
    taxonomy = cohort.taxonomy
    counts = instances["subtype"].value_counts()
    known = [s.id for s in taxonomy.subtypes if counts.get(s.id, 0)]
    if isinstance(config.target, dict):
        wanted = {taxonomy.id_of(name): share for name, share in config.target.items() if share > 0}
    else:
        wanted = {i: 1 / float(counts[i]) if config.target == "inverse" else 1.0 for i in known}
    found = {subtype: share for subtype, share in wanted.items() if subtype in known}
    if not found:
        names = ", ".join(taxonomy.name_of(i) for i in wanted) or "any subtype"
        raise InputError(f"{cohort.folder}: the training part has no instance of {names} to paste; choose others")
    total = sum(found.values())
    return {subtype: share / total for subtype, share in found.items()}


def _by_slide(instances: pd.DataFrame) -> list[list[_Donor]]:
    columns = ["position", "instance", "y0", "x0", "y1", "x1"]
    return [
        [
            _Donor(position, instance, (y0, x0, y1, x1))
            for position, instance, y0, x0, y1, x1 in zip(*(slide[name].tolist() for name in columns), strict=True)
        ]
        for _, slide in instances.groupby("slide", sort=True)
    ]
