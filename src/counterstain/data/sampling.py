"""Patches drawn from a part of a cohort: an endless stream with random access.

Half of the patches (``background_share``) are centred on background. The others are centred on the tissue class:
``tumor`` draws a slide, then one of its tumour pixels; ``subtype`` draws a subtype first, then a slide that has it,
then one of that subtype's pixels there. Every choice is uniform. No list of pixels is held: an instance is drawn by
its area, then a pixel of it by rejection inside its bounding box. The patch is shifted to lie inside its region.

Shapes: B = batch, H, W = rows and columns of a patch in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import numpy as np
import pandas as pd
from pydantic import Field

from counterstain.config import Config
from counterstain.data.cohort import Cohort
from counterstain.data.patches import Box, Patch, turn
from counterstain.data.stains import Stains, jitter_stains
from counterstain.errors import InputError, StorageError
from counterstain.seeding import numpy_generator
from counterstain.taxonomy import BACKGROUND

if TYPE_CHECKING:
    from torch import Tensor


TRIES = 32  # positions drawn at once; nearly every instance fills more than a tenth of its box


class SamplingConfig(Config):
    """Where patches are centred and how they are varied.

    Examples
    --------
    >>> SamplingConfig(mode="tumor", stain_jitter=0.05).quarter_turns
    True
    """

    mode: Literal["tumor", "subtype"] = "subtype"
    """``tumor``: without regard to subtype; ``subtype``: the subtype is drawn first, uniformly."""
    background_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of patches that are centred on a background pixel."""
    flip: bool = True
    """Mirror every second patch, at random."""
    quarter_turns: bool = True
    """Turn patches by 0, 90, 180 or 270 degrees, at random."""
    stain_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Standard deviation of a factor (around 1) and an offset (around 0) of the optical density (natural logarithm)
    of what ``stains`` names; one draw for a patch. 0.05 is mild, 0.2 strong, 0 is off."""
    stains: Stains = "channels"
    """What is jittered: each colour channel, haematoxylin with ``dab`` or ``eosin``, or two stains whose colours are
    read off each patch (``macenko``)."""
    subtypes: tuple[str, ...] | None = None
    """Names of the subtypes that patches are centred on; all of the taxonomy where not given."""


class PatchSampler:
    """Draw patches from one part of a cohort; ``sampler[i]`` depends on the seed and on ``i`` alone.

    Attributes
    ----------
    missing_subtypes : tuple of str
        Subtypes that should be drawn but that the part does not contain.

    Raises
    ------
    InputError
        The part is empty, has no pixel to centre on, or has a region smaller than a patch.
    TaxonomyError
        ``config.subtypes`` names a subtype that the taxonomy does not have.

    Examples
    --------
    >>> sampler = PatchSampler(Cohort.open("cohort"), "train", size_px=48, config=SamplingConfig(), seed=0)
    >>> sampler[1000]
    Patch(48 x 48 px of region p1-1: 1 HER2 0, 1 HER2 2+, 2 LCIS/DCIS)
    >>> import itertools
    >>> first_three = list(itertools.islice(sampler.stream(), 3))
    """

    def __init__(self, cohort: Cohort, part: str, size_px: int, config: SamplingConfig, seed: int) -> None:
        self.cohort, self.part, self.size_px, self.config, self.seed = cohort, part, size_px, config, seed
        regions = cohort.regions.iloc[cohort.part(part)].assign(position=cohort.part(part))
        check_patch_size(cohort, regions, size_px)
        wanted = cohort.taxonomy.names if config.subtypes is None else config.subtypes
        ids = [cohort.taxonomy.id_of(name) for name in wanted]
        instances = cohort.instances.merge(regions[["region", "slide", "position"]], on="region")
        tumour = instances[instances["subtype"].isin(ids)]
        by_subtype = [_pool(tumour[tumour["subtype"] == subtype]) for subtype in ids]
        self.missing_subtypes = tuple(name for name, pool in zip(wanted, by_subtype, strict=True) if not pool)
        pools = [_pool(tumour)] if config.mode == "tumor" else by_subtype
        self._tumour = [pool for pool in pools if pool]
        self._background = _pool(_background(regions, instances))
        self._check_pixels()
        self._heights = cohort.regions["height_px"].tolist()
        self._widths = cohort.regions["width_px"].tolist()

    def __getitem__(self, index: int) -> Patch:
        """Draw the patch of a number, 0, 1, 2, … without end."""
        if index < 0:
            raise IndexError(f"patch {index}: patches are numbered 0, 1, 2, …")
        rng = numpy_generator(self.seed, "patch", index)
        return vary(self._cut(rng), self.config, rng)

    def __iter__(self) -> Iterator[Patch]:
        raise TypeError(
            "a PatchSampler has no end, so it cannot be iterated over: take sampler[i], or the first n patches with "
            "itertools.islice(sampler.stream(), n)"
        )

    def stream(self, start: int = 0) -> Iterator[Patch]:
        """Yield the patches from number ``start`` on, without end."""
        return map(self.__getitem__, itertools.count(start))

    def _cut(self, rng: np.random.Generator) -> Patch:
        if rng.random() < self.config.background_share:
            pool = self._background
        else:
            pool = self._tumour[rng.integers(len(self._tumour))]
        position, instance, box = pool[rng.integers(len(pool))].draw(rng)
        y, x = _pixel(self.cohort.read(position)[1], instance, box, rng)
        return self.cohort.patch(
            position,
            _shifted(y, self.size_px, self._heights[position]),
            _shifted(x, self.size_px, self._widths[position]),
            self.size_px,
        )

    def _check_pixels(self) -> None:
        where = f"{self.cohort.folder}: part {self.part!r}"
        if self.config.background_share < 1 and not self._tumour:
            wanted = ", ".join(self.missing_subtypes)
            raise InputError(f"{where} has no pixel of {wanted}; choose other subtypes or split the cohort anew")
        if self.config.background_share > 0 and not self._background:
            raise InputError(f"{where} has no background pixel; set background_share to 0")


def vary(patch: Patch, config: SamplingConfig, rng: np.random.Generator) -> Patch:
    """Mirror, turn and stain a patch at random; its source keeps how it lies in its region."""
    flipped = config.flip and rng.random() < 0.5
    quarter_turns = int(rng.integers(4)) if config.quarter_turns else 0
    image = turn(patch.image, flipped=flipped, quarter_turns=quarter_turns)
    # mirroring reverses the turns before it
    turned_before = -patch.source.quarter_turns if flipped else patch.source.quarter_turns
    return replace(
        patch,
        image=jitter_stains(image, config.stains, config.stain_jitter, rng) if config.stain_jitter else image,
        instances=turn(patch.instances, flipped=flipped, quarter_turns=quarter_turns),
        source=replace(
            patch.source,
            flipped=flipped != patch.source.flipped,
            quarter_turns=(turned_before + quarter_turns) % 4,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _SlidePlaces:
    """The instances of one slide that a patch can be centred on; its arrays have one entry each."""

    positions: list[int]  # of the region in the cohort
    instances: list[int]
    boxes: list[Box]
    area_until_px: np.ndarray  # (n,) int64, sum of the areas up to and with this one

    def draw(self, rng: np.random.Generator) -> tuple[int, int, Box]:
        pixel = int(rng.integers(self.area_until_px[-1]))
        i = int(np.searchsorted(self.area_until_px, pixel, side="right"))
        return self.positions[i], self.instances[i], self.boxes[i]


def _pool(places: pd.DataFrame) -> list[_SlidePlaces]:
    return [
        _SlidePlaces(
            positions=slide["position"].tolist(),
            instances=slide["instance"].tolist(),
            boxes=list(slide[["y0", "x0", "y1", "x1"]].itertuples(index=False, name=None)),
            area_until_px=slide["area_px"].to_numpy(np.int64).cumsum(),
        )
        for _, slide in places.groupby("slide", sort=True)
    ]


def _background(regions: pd.DataFrame, instances: pd.DataFrame) -> pd.DataFrame:
    """Return the uncovered rest of every region as if it were an instance: id 0, box = the whole region."""
    covered = instances.groupby("region")["area_px"].sum().reindex(regions["region"], fill_value=0).to_numpy()
    height, width = regions["height_px"], regions["width_px"]
    rest = regions.assign(
        instance=BACKGROUND, area_px=height * width - covered, y0=0, x0=0, y1=height, x1=width
    )  # fmt: skip
    return rest[rest["area_px"] > 0]


def _pixel(instances: np.ndarray, instance: int, box: Box, rng: np.random.Generator) -> tuple[int, int]:
    """Draw a pixel of one instance of an (H, W) map, uniformly."""
    y0, x0, y1, x1 = box
    y, x = rng.random((2, TRIES))
    y, x = y0 + (y * (y1 - y0)).astype(np.intp), x0 + (x * (x1 - x0)).astype(np.intp)
    hits = instances[y, x] == instance
    first = int(hits.argmax())
    if hits[first]:
        return int(y[first]), int(x[first])
    rows, columns = np.nonzero(instances[y0:y1, x0:x1] == instance)
    if not len(rows):
        raise StorageError(f"instance {instance} is in the table but not in its region; import the cohort again")
    chosen = int(rng.integers(len(rows)))
    return y0 + int(rows[chosen]), x0 + int(columns[chosen])


def _shifted(centre: int, size: int, length: int) -> int:
    return min(max(centre - size // 2, 0), length - size)


def check_patch_size(cohort: Cohort, regions: pd.DataFrame, size_px: int) -> None:
    """Raise InputError where regions of a cohort are smaller than a patch."""
    smallest = regions[["height_px", "width_px"]].min(axis=1)
    small = regions[smallest < size_px]
    if len(small):
        row = small.iloc[0]
        more = f" (and {len(small) - 1} more)" if len(small) > 1 else ""
        raise InputError(
            f"{cohort.folder}: region {row['region']} is {row['height_px']} x {row['width_px']} px{more}, "
            f"smaller than a patch of {size_px} px; set the patch size to {smallest.min()} px or less"
        )


class PatchSource(Protocol):
    """Gives the patch of a number: a sampler, a synthetic set, a mixture."""

    def __getitem__(self, index: int, /) -> Patch: ...


def stack(patches: Sequence[Patch]) -> dict[str, Tensor]:
    """Stack patches to ``images`` (B, H, W, 3) uint8, ``labels`` (B, H, W) uint8, ``instances`` (B, H, W) int32."""
    import torch

    return {
        "images": torch.from_numpy(np.stack([p.image for p in patches])),
        "labels": torch.from_numpy(np.stack([p.label_mask for p in patches])),
        "instances": torch.from_numpy(np.stack([p.instances for p in patches])),
    }


@dataclass(frozen=True, slots=True)
class PatchBatches:
    """The function step -> batch, where step s has the patches s·B … (s+1)·B - 1 of the source."""

    source: PatchSource
    batch_size: int

    def __call__(self, step: int) -> dict[str, Tensor]:
        """Return the whole batch of a step."""
        return self.part(step, 0, self.batch_size)

    def part(self, step: int, start: int, stop: int) -> dict[str, Tensor]:
        """Return only the patches at the places start … stop - 1 of a step's batch."""
        first = step * self.batch_size
        return stack([self.source[i] for i in range(first + start, first + stop)])
