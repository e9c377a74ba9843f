"""New subtypes for instances: the idea of the paper, as a change of one table.

Labels are assigned block by block, a block being a fixed run of consecutive patches: so the labels of a patch follow
from the seed and its number alone, and the shares of the subtypes inside each block match the target as closely as
whole instances allow. Every instance is as likely to get a subtype as the target says (Öttl et al., ISBI 2023:
uniform); stratified drawing only reduces the variance.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from counterstain.config import Config
from counterstain.errors import ConfigError
from counterstain.seeding import numpy_generator
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy


class RelabelConfig(Config):
    """Which subtypes instances get.

    Examples
    --------
    >>> RelabelConfig(keep=("LCIS/DCIS",)).shares(Taxonomy.named("her2")).tolist()
    [0.25, 0.25, 0.25, 0.25, 0.0]
    """

    target: Literal["uniform"] | dict[str, Annotated[float, Field(ge=0)]] = "uniform"
    """Share of each subtype among the relabelled instances; names that are left out get none."""
    keep: tuple[str, ...] = ()
    """Subtypes whose instances keep their label and which no other instance gets (for example LCIS/DCIS)."""
    balance: Literal["count", "area"] = "count"
    """What the target is a share of: the number of instances or their area."""

    @model_validator(mode="after")
    def _some_target(self) -> Self:
        if isinstance(self.target, dict):
            if sum(self.target.values()) <= 0:
                raise ValueError("target: at least one share must be above 0")
            both = sorted(set(self.target) & set(self.keep))
            if both:
                raise ValueError(f"{', '.join(both)} cannot be both in target and in keep")
        return self

    def kept(self, taxonomy: Taxonomy) -> frozenset[int]:
        """Return the labels, 255 among them, whose instances are left alone."""
        return frozenset({IGNORE, *(taxonomy.id_of(name) for name in self.keep)})

    def asks_for(self, name: str) -> bool:
        """Whether instances may become a subtype."""
        return name not in self.keep and (self.target == "uniform" or self.target.get(name, 0) > 0)

    def without(self, names: Collection[str], taxonomy: Taxonomy) -> Self:
        """Return the same with no share for some subtypes; the others keep their proportions.

        Raises ConfigError where no subtype is left to draw.
        """
        if not any(self.asks_for(name) for name in names):
            return self
        shares = zip(taxonomy.names, self.shares(taxonomy).tolist(), strict=True)
        target = {name: share for name, share in shares if share and name not in names}
        if not target:
            raise ConfigError(f"relabel: nothing is left to draw, as training showed no {', '.join(names)}")
        return self.model_copy(update={"target": target})

    def shares(self, taxonomy: Taxonomy) -> np.ndarray:
        """Resolve the target to a share per subtype id, (K,) float, summing to 1.

        Raises TaxonomyError for an unknown name and ConfigError where no subtype is left to draw.
        """
        target = dict.fromkeys(taxonomy.names, 1.0) if self.target == "uniform" else self.target
        shares = np.zeros(len(taxonomy.subtypes))
        for name, share in (target | dict.fromkeys(self.keep, 0.0)).items():
            shares[taxonomy.id_of(name) - 1] = share
        if shares.sum() == 0:
            raise ConfigError(f"relabel: keep holds every subtype of {taxonomy.name}, nothing is left to draw from")
        normalised: np.ndarray = shares / shares.sum()
        return normalised


def redrawn_pixels(instances: np.ndarray, subtypes: Mapping[int, int], kept: Collection[int]) -> np.ndarray:
    """Return which pixels of an instance map, (H, W), lie in instances whose label is not kept, (H, W) bool."""
    fixed = [instance for instance, subtype in subtypes.items() if subtype in kept]
    return np.asarray((instances != BACKGROUND) & ~np.isin(instances, fixed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One instance that may be relabelled."""

    patch: int  # number of its patch
    instance: int
    subtype: int
    area_px: int


def relabel(
    instances: Sequence[Instance], config: RelabelConfig, taxonomy: Taxonomy, seed: int, block: int
) -> dict[tuple[int, int], int]:
    """Give the instances of a block new subtypes: (patch, instance) -> new subtype, for every instance given.

    All instances of the block must be given, in any order; the draw depends on the seed and the block alone.
    """
    kept, shares, rng = config.kept(taxonomy), config.shares(taxonomy), numpy_generator(seed, "relabel", block)
    free = sorted((i for i in instances if i.subtype not in kept), key=lambda i: (i.patch, i.instance))
    balanced = _balanced_by_count if config.balance == "count" else _balanced_by_area
    drawn = balanced(np.array([i.area_px for i in free], float), shares, rng).tolist()
    labels = {(i.patch, i.instance): i.subtype for i in instances}
    return labels | {(i.patch, i.instance): new for i, new in zip(free, drawn, strict=True)}


def _balanced_by_count(areas: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Systematic sampling: n equidistant points with a random start on the cumulated shares, then shuffled. Each
    # subtype's count is its expectation rounded up or down, and each instance's own distribution is exactly `shares`.
    order = rng.permutation(len(shares))
    points = (np.arange(len(areas)) + rng.random()) / max(len(areas), 1)
    drawn = order[np.searchsorted(np.cumsum(shares[order])[:-1], points, side="right")] + 1
    return rng.permutation(drawn)


def _balanced_by_area(areas: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Largest instances first, each to a subtype drawn in proportion to the area that it still lacks.
    drawn = np.zeros(len(areas), np.int64)
    lacking = shares * areas.sum()
    for i in np.argsort(-(areas + rng.random(len(areas)) * 0.5), kind="stable"):
        weights = np.maximum(lacking, 0.0)
        weights = weights / weights.sum() if weights.sum() > 0 else shares
        drawn[i] = rng.choice(len(shares), p=weights) + 1
        lacking[drawn[i] - 1] -= areas[i]
    return drawn
