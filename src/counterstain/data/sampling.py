"""Patches drawn from a split of a cohort: an endless stream with random access.

Half of the patches (``background_share``) are centred on background. The others are centred on the tissue class:
``tumor`` draws a slide, then one of its tumour pixels; ``subtype`` draws a subtype first, then a slide that has it,
then one of that subtype's pixels there. Every choice is uniform. No list of pixels is held: an instance is drawn by
its area, then a pixel of it by rejection inside its bounding box. The patch is shifted to lie inside its region.

Copy-paste lays instances of other regions on the background (Ghiasi et al., CVPR 2021), at right angles and unscaled,
so that pixels are copied and never blended or resampled.

Shapes: B = batch, H, W = rows and columns of a patch in pixels, h, w = those of a cut-out, at most H and W.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import numpy as np
import pandas as pd
from pydantic import Field

from counterstain.config import Config
from counterstain.data.cohort import Cohort
from counterstain.data.patches import Box, Patch, Source, turn
from counterstain.data.split import check_no_leak
from counterstain.data.stains import Stains, jitter_stains
from counterstain.errors import InputError, StorageError
from counterstain.seeding import numpy_generator
from counterstain.taxonomy import BACKGROUND

if TYPE_CHECKING:
    from torch import Tensor

NAMED = 5  # regions that a message names
TRIES = 32  # positions drawn at once; nearly every instance fills more than a tenth of its box
NETWORK_PX = 32  # networks take patches whose edge is a multiple of it
PASTE_TRIES = 8  # instances of another region, and places for one, that are drawn before one is left out


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
    """Draw patches from one split of a cohort; ``sampler[i]`` depends on the seed and on ``i`` alone.

    ``missing_subtypes`` are those that should be drawn but that the split does not contain. ``slides``: how often each
    slide is drawn, relative to the others (not named = never); all equally often where not given.

    Raises InputError where the split is empty, has no pixel to centre on, or has a region smaller than a patch, and
    TaxonomyError where ``config.subtypes`` names a subtype that the taxonomy does not have.

    Examples
    --------
    >>> sampler = PatchSampler(Cohort.open("cohort"), "train", size_px=48, config=SamplingConfig(), seed=0)
    >>> sampler[1000]
    Patch(48 x 48 px of region p1-1: 1 HER2 0, 1 HER2 2+, 2 LCIS/DCIS)
    >>> import itertools
    >>> first_three = list(itertools.islice(sampler.stream(), 3))
    """

    def __init__(
        self,
        cohort: Cohort | str | Path,
        split: str,
        size_px: int,
        config: SamplingConfig | None = None,
        seed: int = 0,
        *,
        slides: Mapping[str, float] | None = None,
    ) -> None:
        cohort = cohort if isinstance(cohort, Cohort) else Cohort.open(cohort)
        config = SamplingConfig() if config is None else config
        self.cohort, self.split, self.size_px, self.config, self.seed = cohort, split, size_px, config, seed
        regions, instances = _of_split(cohort, split)
        check_patch_size(cohort, regions, size_px)
        if slides is not None:
            regions, instances = (table[table["slide"].map(slides).fillna(0) > 0] for table in (regions, instances))
        wanted = cohort.taxonomy.names if config.subtypes is None else config.subtypes
        ids = [cohort.taxonomy.id_of(name) for name in wanted]
        tumour = instances[instances["subtype"].isin(ids)]
        by_subtype = [_pool(tumour[tumour["subtype"] == subtype]) for subtype in ids]
        self.missing_subtypes = tuple(name for name, pool in zip(wanted, by_subtype, strict=True) if not pool)
        self._tumour = [pool for pool in ([_pool(tumour)] if config.mode == "tumor" else by_subtype) if pool]
        self._slides = slides
        self._background = _pool(_background(regions, instances))
        where = f"{cohort.folder}: split {split!r}"
        if config.background_share < 1 and not self._tumour:
            names = ", ".join(self.missing_subtypes)
            raise InputError(f"{where} has no pixel of {names}; choose other subtypes or split the cohort anew")
        if config.background_share > 0 and not self._background:
            raise InputError(f"{where} has no background pixel; set background_share to 0")
        self._shapes = list(cohort.regions[["height_px", "width_px"]].itertuples(index=False, name=None))

    def __repr__(self) -> str:
        return f"PatchSampler({self.size_px} px of {self.split}, {self.cohort.folder}, seed {self.seed})"

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
        on_background = rng.random() < self.config.background_share
        pool = self._background if on_background else self._tumour[rng.integers(len(self._tumour))]
        position, instance, box = self._slide(pool, rng).draw(rng)
        centre = _pixel(self.cohort, position, instance, box, rng)
        size = self.size_px
        y, x = (min(max(c - size // 2, 0), n - size) for c, n in zip(centre, self._shapes[position], strict=True))
        return self.cohort.patch(position, y, x, size)

    def _slide(self, pool: list[_SlidePlaces], rng: np.random.Generator) -> _SlidePlaces:
        if self._slides is None:
            return pool[rng.integers(len(pool))]
        weights = np.array([self._slides[places.slide] for places in pool])
        return pool[rng.choice(len(pool), p=weights / weights.sum())]


def vary(patch: Patch, config: SamplingConfig, rng: np.random.Generator) -> Patch:
    """Mirror, turn and stain a patch at random; its source keeps how it lies in its region."""
    flipped = config.flip and rng.random() < 0.5
    quarter_turns = int(rng.integers(4)) if config.quarter_turns else 0
    image = turn(patch.image, flipped=flipped, quarter_turns=quarter_turns)
    before = -patch.source.quarter_turns if flipped else patch.source.quarter_turns  # mirroring reverses earlier turns
    return replace(
        patch,
        image=jitter_stains(image, config.stains, config.stain_jitter, rng) if config.stain_jitter else image,
        instances=turn(patch.instances, flipped=flipped, quarter_turns=quarter_turns),
        source=replace(
            patch.source, flipped=flipped != patch.source.flipped, quarter_turns=(before + quarter_turns) % 4
        ),
    )


@dataclass(frozen=True, slots=True)
class _SlidePlaces:
    """The instances of one slide that a patch can be centred on."""

    slide: str
    places: list[tuple[int, int, Box]]  # position of the region in the cohort, instance, box of the instance
    area_until_px: np.ndarray  # (n,) int64, sum of the areas up to and with this one

    def draw(self, rng: np.random.Generator) -> tuple[int, int, Box]:
        pixel = int(rng.integers(self.area_until_px[-1]))
        return self.places[int(np.searchsorted(self.area_until_px, pixel, side="right"))]


def _of_split(cohort: Cohort, split: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the regions of a split with their positions in the cohort, and their instances."""
    positions = cohort.positions(split)
    regions = cohort.regions.iloc[positions].assign(position=positions)
    return regions, cohort.instances.merge(regions[["region", "slide", "position"]], on="region")


def _pool(instances: pd.DataFrame) -> list[_SlidePlaces]:
    pool = []
    for name, slide in instances.groupby("slide", sort=True):
        boxes = slide[["y0", "x0", "y1", "x1"]].itertuples(index=False, name=None)
        places = list(zip(slide["position"].tolist(), slide["instance"].tolist(), boxes, strict=True))
        pool.append(_SlidePlaces(str(name), places, slide["area_px"].to_numpy(np.int64).cumsum()))
    return pool


def _background(regions: pd.DataFrame, instances: pd.DataFrame) -> pd.DataFrame:
    """Return the rest of every region as if it were an instance: id 0, box = the whole region."""
    covered = instances.groupby("region")["area_px"].sum().reindex(regions["region"], fill_value=0).to_numpy()
    height, width = regions["height_px"], regions["width_px"]
    rest = regions.assign(instance=BACKGROUND, area_px=height * width - covered, y0=0, x0=0, y1=height, x1=width)
    return rest[rest["area_px"] > 0]


def _pixel(cohort: Cohort, position: int, instance: int, box: Box, rng: np.random.Generator) -> tuple[int, int]:
    """Draw a pixel of one instance of a region, uniformly."""
    y0, x0, y1, x1 = box
    y, x = rng.random((2, TRIES))
    y, x = y0 + (y * (y1 - y0)).astype(np.intp), x0 + (x * (x1 - x0)).astype(np.intp)
    for row, column in zip(y.tolist(), x.tolist(), strict=True):
        if cohort.instance_map(position, row, column, 1, 1)[0, 0] == instance:
            return row, column
    rows, columns = np.nonzero(cohort.instance_map(position, y0, x0, y1 - y0, x1 - x0) == instance)
    if not len(rows):
        raise StorageError(f"instance {instance} is in the table but not in its region; import the cohort again")
    chosen = int(rng.integers(len(rows)))
    return y0 + int(rows[chosen]), x0 + int(columns[chosen])


def check_patch_size(cohort: Cohort, regions: pd.DataFrame, size_px: int) -> None:
    """Raise InputError where regions of a cohort are smaller than a patch, or a patch is no square of pixels."""
    if not isinstance(size_px, int | np.integer) or size_px < 1:
        raise InputError(f"size_px {size_px!r}: expected a whole number of pixels, 1 or more")
    smallest = regions[["height_px", "width_px"]].min(axis=1)
    small = regions[smallest < size_px]
    if len(small):
        named = [f"{row.region} ({row.height_px} x {row.width_px} px)" for row in small.head(NAMED).itertuples()]
        more = f" and {len(small) - NAMED} more" if len(small) > NAMED else ""
        fits = int(smallest.min()) // NETWORK_PX * NETWORK_PX
        leave_out = "import the cohort without them" if len(small) < len(regions) else ""
        smaller = (
            f"make patches {fits} px (--set size_px={fits}, in a study --set recipe.size_px={fits})" if fits else ""
        )
        raise InputError(
            f"{cohort.folder}: {len(small)} of {len(regions)} regions are smaller than a patch of {size_px} px: "
            f"{', '.join(named)}{more}; "
            f"{' or '.join(filter(None, (leave_out, smaller))) or f'networks need {NETWORK_PX} px at least'}"
        )


class PatchSource(Protocol):
    """Gives the patch of a number: a sampler, a synthetic set, a mixture."""

    def __getitem__(self, index: int, /) -> Patch: ...


STACKED = {"images": "image", "labels": "label_mask", "instances": "instances"}


def stack(patches: Sequence[Patch], parts: Iterable[str] = tuple(STACKED)) -> dict[str, Tensor]:
    """Stack patches to ``images`` (B, H, W, 3) uint8, ``labels`` (B, H, W) uint8, ``instances`` (B, H, W) int32."""
    import torch

    return {part: torch.from_numpy(np.stack([getattr(p, STACKED[part]) for p in patches])) for part in parts}


@dataclass(frozen=True, slots=True)
class PatchBatches:
    """The function step -> batch, where step s has the patches s·B … (s+1)·B - 1 of the source."""

    source: PatchSource
    batch_size: int
    parts: tuple[str, ...] = tuple(STACKED)
    """Of those of :func:`stack`, the ones that a network looks at; half of a patch's bytes are its ``instances``."""

    def __call__(self, step: int) -> dict[str, Tensor]:
        """Return the whole batch of a step."""
        return self.part(step, 0, self.batch_size)

    def part(self, step: int, start: int, stop: int) -> dict[str, Tensor]:
        """Return only the patches at the places start … stop - 1 of a step's batch."""
        first = step * self.batch_size
        return stack([self.source[i] for i in range(first + start, first + stop)], self.parts)


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


class PastedPatches:
    """Real patches, some with instances of other training regions on their background; ``[i]`` follows from the seed.

    Pasted instances never cover others: outside the background that they fall on, every byte and label is kept. They
    are cut out of the training part, stained as patches are, and always mirrored and turned at random.

    ``shares`` says how often each subtype (id) is drawn; ``apart`` what a patch and an instance must not share, and
    ``without`` which subtypes are not pasted. Raises InputError where the training part has no instance of what is to
    be pasted, TaxonomyError where ``config.target`` names an unknown subtype, and LeakageError where a training region
    is of a validation or test patient.
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
        apart: Literal["region", "slide"] = "region",
        without: Collection[int] = (),
    ) -> None:
        self._real, self._cohort, self._size_px, self._config, self._seed = real, cohort, size_px, config, seed
        self._sampling = sampling.model_copy(update={"flip": True, "quarter_turns": True})
        self._apart = apart
        regions, instances = _of_split(cohort, "train")
        check_no_leak(regions["patient"], cohort, f"{cohort.folder}: its training part")
        instances = instances[~instances["subtype"].isin(list(without))]
        self.shares = _shares(instances, config, cohort)
        self._donors = {subtype: _pool(instances[instances["subtype"] == subtype]) for subtype in self.shares}

    def __getitem__(self, index: int) -> Patch:
        """Return the patch of a number, 0, 1, 2, … without end."""
        return self.pasted(self._real[index], index)[0]

    def pasted(self, patch: Patch, number: int) -> tuple[Patch, dict[int, Source]]:
        """Return the patch of a number with what is pasted into it, and where each new instance was cut out."""
        rng = numpy_generator(self._seed, "copy-paste", number)
        sources: dict[int, Source] = {}
        if rng.random() >= self._config.share:
            return patch, sources
        for _ in range(int(rng.integers(1, self._config.instances + 1))):
            cut_out = self.cut_out(getattr(patch.source, self._apart), rng)
            if cut_out is not None:
                patch, new = _pasted(patch, cut_out, self._config.min_visible, rng)
                sources |= dict.fromkeys(new, cut_out.source)
        return patch, sources

    def cut_out(self, place: str, rng: np.random.Generator) -> Patch | None:
        """Draw an instance of another region, or slide: its box, with the instance alone in its map."""
        subtype = int(rng.choice(list(self.shares), p=list(self.shares.values())))
        slides = self._donors[subtype]
        for _ in range(PASTE_TRIES):
            donors = slides[int(rng.integers(len(slides)))].places
            position, instance, (y0, x0, y1, x1) = donors[int(rng.integers(len(donors)))]
            if str(self._cohort.regions[self._apart].iloc[position]) == place:
                continue
            height, width = min(y1 - y0, self._size_px), min(x1 - x0, self._size_px)  # of a large box, a window in it
            y = y0 + int(rng.integers(y1 - y0 - height + 1))
            x = x0 + int(rng.integers(x1 - x0 - width + 1))
            window = self._cohort.cut(position, y, x, height, width)
            alone = np.where(window.instances == instance, window.instances, BACKGROUND)
            patch = replace(window, instances=alone, subtypes={instance: subtype})
            return vary(patch, self._sampling, rng)
        return None


def _pasted(
    patch: Patch, cut_out: Patch, min_visible: float, rng: np.random.Generator
) -> tuple[Patch, tuple[int, ...]]:
    """Lay the one instance of a cut-out on the background of a patch; also return its new id if it finds a place."""
    mask = cut_out.instances != BACKGROUND
    height, width = mask.shape
    for _ in range(PASTE_TRIES):
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
            return replace(patch, image=image, instances=instances, subtypes=patch.subtypes | {new: subtype}), (new,)
    return patch, ()


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
