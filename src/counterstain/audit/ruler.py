"""Measure patches of one kind: how like real ones they are, and what their instances look like."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import Field

from counterstain.audit.copies import CopiesFound
from counterstain.audit.distances import coverage, frechet_distance, kernel_distance, nearest
from counterstain.audit.features import features_of
from counterstain.audit.findings import Findings
from counterstain.audit.intervals import Sample, groups_of, jackknife
from counterstain.audit.judge import Device, Judge
from counterstain.audit.opinions import instance_probabilities
from counterstain.audit.redrawn import REAL
from counterstain.audit.stain import Stain, seam, stain_table
from counterstain.config import Config
from counterstain.data.patches import Patch
from counterstain.taxonomy import Taxonomy

FEWEST_PATCHES = 50


class AuditConfig(Config):
    """How much is compared, and how."""

    patches: Annotated[int, Field(ge=FEWEST_PATCHES)] = 2000
    """Patches of each kind at most; the set's length where it is shorter."""
    features: str = "judge"
    """What distances and coverage are measured in: ``judge``, or ``timm:NAME`` with a file of weights."""
    weights: Path | None = None
    """State dict of the timm network; nothing is downloaded."""
    stain: Stain = "dab"
    """The stain beside haematoxylin."""
    min_area_px: Annotated[int, Field(ge=1)] = 64
    """Instances that show fewer pixels are not judged."""
    neighbours: Annotated[int, Field(ge=1)] = 5
    """k of precision, recall, density and coverage."""
    copies: Annotated[int, Field(ge=0)] = 300
    """Patches of each kind at most that are searched for in the training tissue; 0 = none."""
    device: Device = "auto"
    """Where the networks run; auto is the GPU where there is one."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Patches that go through the networks at once."""
    seed: int = 0
    """Of the real patches."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real patches that others are compared with, and their features (n, d)."""

    patches: Sequence[Patch]
    features: np.ndarray


class Ruler:
    """Measures patches against real ones.

    Parameters
    ----------
    judge : Judge
    taxonomy : Taxonomy
    config : AuditConfig
    """

    def __init__(self, judge: Judge, taxonomy: Taxonomy, config: AuditConfig) -> None:
        self._judge, self._taxonomy, self._config = judge, taxonomy, config
        self._features = features_of(config.features, config.weights, judge, config.batch_size)

    def reference(self, patches: Sequence[Patch]) -> Reference:
        """Look at real patches that others are to be measured against."""
        return Reference(patches=patches, features=self._features(patches))

    def measure(
        self,
        name: str,
        patches: Sequence[Patch],
        reference: Reference,
        *,
        kept: Collection[int] = REAL,
        copies: CopiesFound | None = None,
    ) -> Findings:
        """Measure patches.

        Parameters
        ----------
        kept : collection of int
            Subtypes whose instances are left out of what is said about instances.
        copies : CopiesFound, optional
            What a search for copies found.
        """
        config, features = self._config, self._features(patches)
        groups = groups_of(reference.patches, patches)
        real, drawn = (
            Sample(features=values, groups=names)
            for values, names in zip((reference.features, features), groups, strict=True)
        )
        around = coverage(real.features, drawn.features, config.neighbours)
        opinions = instance_probabilities(
            self._judge, patches, kept=kept, min_area_px=config.min_area_px, batch_size=config.batch_size
        )
        seams = np.array([seam(patch, kept) for patch in patches])
        return Findings(
            name=name,
            patches=len(patches),
            frechet=jackknife(frechet_distance, real, drawn, least=0),
            kernel=jackknife(kernel_distance, real, drawn),
            precision=around.precision,
            recall=around.recall,
            density=around.density,
            coverage=around.coverage,
            confusion=self._confusion(opinions),
            seen_as_tissue=float((opinions["tissue"] > 0.5).mean()) if len(opinions) else float("nan"),
            stain=self._stain(patches, kept),
            seam=float(np.nanmean(seams)) if np.isfinite(seams).any() else float("nan"),
            copies=copies or CopiesFound.none(),
            nearest=_by_distance(real.features, drawn.features),
        )

    def _confusion(self, opinions: pd.DataFrame) -> pd.DataFrame:
        ids, names = [subtype.id for subtype in self._taxonomy.subtypes], list(self._taxonomy.names)
        counts = pd.crosstab(opinions["asked"], opinions["seen"]).reindex(index=ids, columns=ids, fill_value=0)
        return pd.DataFrame(counts.to_numpy(np.int64), index=names, columns=names)

    def _stain(self, patches: Sequence[Patch], kept: Collection[int]) -> pd.Series:
        table = stain_table(patches, self._config.stain, self._config.min_area_px, kept)
        means = table.groupby("subtype")["density"].mean()
        return pd.Series({s.name: float(means.get(s.id, float("nan"))) for s in self._taxonomy.subtypes})


def _by_distance(real: np.ndarray, drawn: np.ndarray) -> pd.DataFrame:
    distances, found = nearest(drawn, real)
    order = np.argsort(distances, kind="stable")
    return pd.DataFrame({"image": order, "training_patch": found[order], "distance": distances[order]})
