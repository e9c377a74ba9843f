"""Audit a synthetic set: fidelity, adherence to the asked subtypes, and copies of training patches.

Every figure stands beside the same figure of real patches of the validation part. These come from other patients, with
styles of their own, so a generator that keeps to the training patients' styles may come nearer than they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field

from counterstain.audit.distances import Interval, bootstrap, coverage, frechet_distance, kernel_distance, nearest
from counterstain.audit.judge import Judge, describe, instance_opinions, load_judge
from counterstain.audit.stain import Stain, seam, stain_table
from counterstain.checkpoints import CheckpointHeader, require_taxonomy
from counterstain.config import Config
from counterstain.data.batches import PatchSource
from counterstain.data.cohort import Cohort
from counterstain.data.leakage import check_no_leak
from counterstain.data.patch_set import PatchSet
from counterstain.data.patches import Patch
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.errors import InputError, MismatchError
from counterstain.seeding import derive
from counterstain.taxonomy import Taxonomy

COPY_QUANTILE = 0.01
HELD_OUT = "held out"


class AuditConfig(Config):
    """How much is compared, and how."""

    patches: Annotated[int, Field(ge=50)] = 2000
    """Patches of each kind at most; the set's length where it is shorter."""
    stain: Stain = "dab"
    """The stain beside haematoxylin."""
    min_area_px: Annotated[int, Field(ge=1)] = 64
    """Instances that show fewer pixels are not judged."""
    neighbours: Annotated[int, Field(ge=1)] = 5
    """k of precision, recall, density and coverage."""
    repeats: Annotated[int, Field(ge=10)] = 50
    """Resamplings behind each interval."""
    seed: int = 0
    """Of the real patches and of the resampling."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an audit says of one kind of images."""

    name: str
    patches: int
    frechet: Interval
    kernel: Interval
    precision: float
    recall: float
    density: float
    coverage: float
    confusion: pd.DataFrame
    """Instances by asked subtype (rows) and by what the judge sees (columns)."""
    seen_as_tissue: float
    """Share of instances of which most pixels look like any subtype."""
    stain: pd.Series
    """Mean optical density of the stain inside instances, by subtype."""
    seam: float
    """Mean step of the grey level across the borders of instances."""
    near_copies: float
    """Share of images nearer to a training patch than 99 % of the held-out ones are. Training patches are a random
    sample, so a copy of tissue that the sample shows otherwise cut is missed: a low share proves nothing."""
    nearest: pd.DataFrame
    """A row per image: ``image``, ``training_patch`` (numbers), ``distance``; the nearest first."""

    @property
    def adherence(self) -> pd.Series:
        """Share of the instances of each asked subtype that look like it; NaN where there are none."""
        counts = self.confusion.to_numpy()
        return pd.Series(np.diag(counts) / np.where(counts.sum(1) == 0, np.nan, counts.sum(1)), self.confusion.index)

    def row(self) -> dict[str, Any]:
        """Return the figures as one row of a table."""
        figures: dict[str, Any] = {"images": self.name, "patches": self.patches}
        for name, interval in (("frechet", self.frechet), ("kernel", self.kernel)):
            figures |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
        figures |= {name: getattr(self, name) for name in ("precision", "recall", "density", "coverage")}
        figures |= {f"adherence_{subtype}": share for subtype, share in self.adherence.items()}
        figures |= {"adherence_mean": float(self.adherence.mean()), "seen_as_tissue": self.seen_as_tissue}
        figures |= {f"stain_{subtype}": value for subtype, value in self.stain.items()}
        return figures | {"seam": self.seam, "near_copies": self.near_copies}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Held-out real patches and synthetic sets against the same real training patches."""

    findings: tuple[Findings, ...]
    """The held-out real patches first."""
    training_patches: Sequence[Patch]

    def table(self) -> pd.DataFrame:
        """Return a row per kind of images."""
        return pd.DataFrame([findings.row() for findings in self.findings])


def audit_sets(
    sets: dict[str, PatchSet],
    cohort: Cohort,
    judge_folder: Path,
    config: AuditConfig,
    advance: Callable[[int], None] = lambda _: None,
) -> Audit:
    """Audit synthetic sets of one cohort side by side.

    Parameters
    ----------
    sets : dict
        Name -> set.
    cohort : Cohort
        Where the sets' masks come from; its training part is what they are compared with.
    judge_folder : Path
        Checkpoint of a judge that was trained on this cohort.
    advance : callable
        Called with 1 when the held-out patches or a set are done.

    Raises
    ------
    MismatchError
        The judge or a set is of another taxonomy, size or resolution.
    LeakageError
        The judge saw a validation or test patient.
    InputError
        A set has fewer than 50 patches.
    """
    judge, header = load_judge(judge_folder)
    for name, patch_set in sets.items():
        _check(name, patch_set, cohort, judge_folder, header)
    count = min([config.patches, *(len(patch_set) for patch_set in sets.values())])
    if count < 50:
        raise InputError(f"a set of {count} patches is too small to audit; 50 are the least")
    ruler = _Ruler(judge, cohort.taxonomy, config, _real(cohort, "train", header.size_px, count, config.seed))
    held_out = _real(cohort, "val", header.size_px, count, config.seed)
    findings = [ruler.measure(HELD_OUT, held_out, limit=None)]
    advance(1)
    limit = float(np.quantile(findings[0].nearest["distance"], COPY_QUANTILE))
    for name, patch_set in sets.items():
        findings.append(ruler.measure(name, _First(patch_set, count), limit=limit))
        advance(1)
    return Audit(findings=tuple(findings), training_patches=ruler.training)


class _Ruler:
    """Real training patches, and everything that is measured against them."""

    def __init__(self, judge: Judge, taxonomy: Taxonomy, config: AuditConfig, training: Sequence[Patch]) -> None:
        self._judge, self._taxonomy, self._config = judge, taxonomy, config
        self.training = training
        self._features = describe(judge, training)

    def measure(self, name: str, patches: Sequence[Patch], limit: float | None) -> Findings:
        config, features = self._config, describe(self._judge, patches)
        distances, found = nearest(features, self._features)
        order = np.argsort(distances, kind="stable")
        by_distance = pd.DataFrame({"image": order, "training_patch": found[order], "distance": distances[order]})
        around = coverage(self._features, features, config.neighbours)
        opinions = instance_opinions(self._judge, patches, config.min_area_px)
        seams = np.array([seam(patch) for patch in patches])
        return Findings(
            name=name,
            patches=len(patches),
            frechet=bootstrap(frechet_distance, self._features, features, repeats=config.repeats, seed=config.seed),
            kernel=bootstrap(kernel_distance, self._features, features, repeats=config.repeats, seed=config.seed),
            precision=around.precision,
            recall=around.recall,
            density=around.density,
            coverage=around.coverage,
            confusion=self._confusion(opinions),
            seen_as_tissue=float(opinions[:, 2].mean()) if len(opinions) else float("nan"),
            stain=self._stain(patches),
            seam=float(np.nanmean(seams)) if np.isfinite(seams).any() else float("nan"),
            near_copies=COPY_QUANTILE if limit is None else float((distances < limit).mean()),
            nearest=by_distance,
        )

    def _confusion(self, opinions: np.ndarray) -> pd.DataFrame:
        names = list(self._taxonomy.names)
        counts = np.zeros((len(names), len(names)), np.int64)
        position = {subtype.id: i for i, subtype in enumerate(self._taxonomy.subtypes)}
        for asked, seen, _ in opinions.tolist():
            counts[position[asked], position[seen]] += 1
        return pd.DataFrame(counts, index=names, columns=names)

    def _stain(self, patches: Sequence[Patch]) -> pd.Series:
        table = stain_table(patches, self._config.stain, self._config.min_area_px)
        means = table.groupby("subtype")["density"].mean()
        return pd.Series({s.name: float(means.get(s.id, float("nan"))) for s in self._taxonomy.subtypes})


class _First(Sequence[Patch]):
    """The first patches of an endless or long source, read when they are asked for."""

    def __init__(self, source: PatchSource, count: int) -> None:
        self._source, self._count = source, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._source[index]


def _real(cohort: Cohort, part: str, size_px: int, count: int, seed: int) -> _First:
    """Cut real patches as masks for synthetic ones are cut by default: subtypes equally often."""
    return _First(PatchSampler(cohort, part, size_px, SamplingConfig(), derive(seed, "audit", part)), count)


def _check(name: str, patch_set: PatchSet, cohort: Cohort, judge_folder: Path, judge: CheckpointHeader) -> None:
    require_taxonomy(judge_folder, judge, cohort.taxonomy)
    if patch_set.header.taxonomy != cohort.taxonomy:
        raise MismatchError(f"{name}: has other subtypes than {cohort.folder}; give the cohort that it was made from")
    if patch_set.header.size_px != judge.size_px:
        raise MismatchError(
            f"{name}: has patches of {patch_set.header.size_px} px, the judge {judge_folder} learnt from "
            f"{judge.size_px} px; train one at that size"
        )
    if abs(patch_set.header.mpp - judge.mpp) > 0.05 * judge.mpp:
        raise MismatchError(f"{name}: is at {patch_set.header.mpp:g} um/px, the judge at {judge.mpp:g} um/px")
    held_out = {part: cohort.patients(part) for part in ("val", "test")}
    check_no_leak(judge.patients_seen, held_out, f"the judge {judge_folder}")
