"""Findings: what an audit measures of images of one kind, beside real training patches.

Shapes: H, W = rows and columns in pixels, n = images, d = features.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from counterstain.audit.copies import CopiesFound, CopySearch
from counterstain.audit.fidelity import (
    Interval,
    Sample,
    coverage,
    features_of,
    frechet_distance,
    groups_of,
    jackknife,
    kernel_distance,
    nearest,
)
from counterstain.audit.judge import Device, Judge, instance_probabilities
from counterstain.config import Config
from counterstain.data.patches import Patch
from counterstain.data.relabel import redrawn_pixels
from counterstain.data.stains import unmixing
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy

REAL = frozenset({IGNORE})  # of real patches every instance counts that has a subtype
HALVES, HELD_OUT = "training halves", "held out"
REFERENCES = (HALVES, HELD_OUT)
FEWEST_PATCHES = 50
RECOGNISED = 0.5  # of a subtype's held-out instances: below, a judge mistakes it more often than not
LESS = 0.1  # what a share must be lower by to be called lower
COPIED = 0.05  # share of near copies that is worth a look; of held-out tissue it is 0.01 by definition

Stain = Literal["dab", "eosin"]


class AuditConfig(Config):
    """How much is compared, and how."""

    patches: Annotated[int, Field(ge=FEWEST_PATCHES)] = 2000
    """Patches of each kind at most; the set's length where it is shorter."""
    features: str = "judge"
    """What distances and coverage are measured in: ``judge``, or ``timm:`` and a network of timm with a file of
    weights, a folder as timm saves it, or ``hf-hub:OWNER/NAME``."""
    weights: Path | None = None
    """State dict of the timm network; nothing is downloaded."""
    stain: Stain = "dab"
    """The stain beside haematoxylin."""
    min_area_px: Annotated[int, Field(ge=1)] = 64
    """Instances that show fewer pixels are not judged."""
    copies: Annotated[int, Field(ge=0)] = 300
    """Patches of each kind at most that are searched for in the training tissue; 0 = none."""
    device: Device = "auto"
    """Where the networks run; auto is the GPU where there is one."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Patches that go through the networks at once."""
    seed: int = 0
    """Of the real patches."""


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
    """Redrawn instances by asked subtype (rows) and by what the judge sees (columns); of real ones all."""
    seen_as_tissue: float  # share of these instances of which most pixels look like any subtype
    stain: pd.Series  # mean optical density of the stain inside them, by subtype
    seam: float  # mean step of the grey level across their borders
    copies: CopiesFound  # how similar the images are to the training tissue that they resemble most
    nearest: pd.DataFrame
    """A row per image: ``image``, ``training_patch`` (numbers among those sampled), ``distance`` of the features; the
    nearest first. It shows what an image resembles; it does not find copies, which may come from any place."""

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
        return figures | {"seam": self.seam, "near_copies": self.copies.share}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Real patches and synthetic sets, all measured against the same real training patches."""

    findings: tuple[Findings, ...]
    """Two halves of the training patients against each other, then held-out real patches, then the sets."""
    training_patches: Sequence[Patch]
    search: CopySearch  # the training tissue in which copies were looked for

    judge_features: bool = True  # whether distances are measured in the judge's own features

    def table(self) -> pd.DataFrame:
        """Return a row per kind of images."""
        return pd.DataFrame([findings.row() for findings in self.findings])

    def in_words(self) -> list[str]:
        """Say what the judge is worth, and then of each set what the figures mean."""
        halves, held_out, *sets = self.findings
        worth = held_out.adherence
        known = [name for name in worth.index if worth[name] >= RECOGNISED]
        return [*self._on_judge(held_out, known), *(_on_set(found, halves, held_out, known) for found in sets)]

    def _on_judge(self, held_out: Findings, known: Sequence[str]) -> list[str]:
        """Say how well the judge knows the subtypes of real tissue that it has not seen."""
        instances, worth = held_out.confusion.sum(axis=1), held_out.adherence
        shares = ", ".join(f"{s} {worth[s]:.2f} of {instances[s]}" for s in worth.index if instances[s])
        begin = "The judge, on held-out real tissue, takes these shares of the instances for what they are:"
        lines = [f"{begin} {shares}; guessing would be right for {1 / len(worth):.2f}."]
        mistaken = [name for name in worth.index if worth[name] < RECOGNISED]
        if mistaken:
            lines.append(
                f"It does not know {', '.join(mistaken)}: what it says of these in a set means nothing, good or bad."
            )
        if unseen := [name for name in worth.index if not instances[name]]:
            lines.append(
                f"No held-out instance of {', '.join(unseen)} was judged: its word on these cannot be checked."
            )
        if not known:
            features = " Distances are measured in its features, and say as little." if self.judge_features else ""
            lines.append(
                f"This judge cannot tell whether a set shows what was asked.{features} Train it on more patients or "
                "for more steps (judge.training.steps), and audit again."
            )
        return lines


def _on_set(found: Findings, halves: Findings, held_out: Findings, known: Sequence[str]) -> str:
    """Say of one set whether it shows what was asked, looks like tissue, and is no copy of it."""
    asked, real, frechet = found.adherence, held_out.adherence, found.frechet
    judged = [name for name in known if not np.isnan(asked[name])]
    less = [f"{name} {asked[name]:.2f} against {real[name]:.2f}" for name in judged if asked[name] < real[name] - LESS]
    apart = max(halves.frechet.value, held_out.frechet.value)
    figures = f"(Fréchet distance {frechet.value:.2f}; patients {apart:.2f})"
    coverages = f"(coverage {found.coverage:.2f} against {held_out.coverage:.2f})"
    good, bad = [], []
    if less:
        bad.append(f"fewer instances than in real tissue look as asked ({', '.join(less)})")
    elif judged:
        good.append(f"instances look as asked about as often as in real tissue ({', '.join(judged)})")
    if frechet.low > apart:
        bad.append(f"its images differ from real ones more than patients do from each other {figures}")
    elif not np.isnan(frechet.low):
        good.append(f"its images are not measurably further from real ones than patients from each other {figures}")
    if found.coverage < held_out.coverage - LESS:
        bad.append(f"they show less of the variety of real tissue {coverages}")
    if found.copies.share > COPIED:
        closer = "resemble training tissue more closely than 99 % of held-out patches do"
        bad.append(f"{found.copies.share:.0%} {closer}: see {found.name}-copies.png for copies of patients")
    unjudged = "nobody could say whether it shows what was asked" if not judged else "nothing speaks against it"
    verdict = "look into this before you use it" if bad else unjudged
    return f"{found.name}: {'; '.join([*bad, *good])}. In short: {verdict}."


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real patches that others are compared with, and their features (n, d)."""

    patches: Sequence[Patch]
    features: np.ndarray


class Evaluator:
    """Measures patches against real ones."""

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
        """Measure patches; instances of the subtypes ``kept`` are left out of what is said about instances."""
        config = self._config
        groups = groups_of(reference.patches, patches)
        real = Sample(features=reference.features, groups=groups[0])
        drawn = Sample(features=self._features(patches), groups=groups[1])
        judged = instance_probabilities(
            self._judge, patches, kept=kept, min_area_px=config.min_area_px, batch_size=config.batch_size
        )
        stains = stain_table(patches, config.stain, config.min_area_px, kept).groupby("subtype")["density"].mean()
        seams = np.array([seam(patch, kept) for patch in patches])
        return Findings(
            name=name,
            patches=len(patches),
            frechet=jackknife(frechet_distance, real, drawn, least=0),
            kernel=jackknife(kernel_distance, real, drawn),
            **asdict(coverage(real.features, drawn.features)),
            confusion=self._confusion(judged),
            seen_as_tissue=float((judged["tissue"] > 0.5).mean()) if len(judged) else float("nan"),
            stain=pd.Series({s.name: float(stains.get(s.id, float("nan"))) for s in self._taxonomy.subtypes}),
            seam=float(np.nanmean(seams)) if np.isfinite(seams).any() else float("nan"),
            copies=copies or CopiesFound(),
            nearest=nearest(drawn.features, real.features),
        )

    def _confusion(self, judged: pd.DataFrame) -> pd.DataFrame:
        ids, names = [subtype.id for subtype in self._taxonomy.subtypes], list(self._taxonomy.names)
        counts = pd.crosstab(judged["asked"], judged["seen"]).reindex(index=ids, columns=ids, fill_value=0)
        return pd.DataFrame(counts.to_numpy(np.int64), index=names, columns=names)


# Stain and seams of instances, measured in the image itself, without a network.


def stain_density(image: np.ndarray, stain: Stain) -> np.ndarray:
    """Separate one stain of an image, (H, W, 3) uint8, from haematoxylin.

    It is returned as optical density (natural logarithm) along the stain's unit vector, (H, W) float; negative where
    the colour lies outside.
    """
    density = -np.log((image.astype(np.float64) + 1) / 256)
    return np.asarray((density @ unmixing(stain))[..., 1])


def stain_table(patches: Iterable[Patch], stain: Stain, min_area_px: int, kept: Collection[int] = REAL) -> pd.DataFrame:
    """Return a row per instance: ``subtype`` (id), ``density`` (mean optical density of the stain inside it).

    Instances of the subtypes ``kept`` and those that show fewer than ``min_area_px`` pixels are left out.
    """
    rows = []
    for patch in patches:
        density = stain_density(patch.image, stain)
        for instance, area in patch.areas_px.items():
            if area >= min_area_px and patch.subtypes[instance] not in kept:
                rows.append((patch.subtypes[instance], float(density[patch.instances == instance].mean())))
    return pd.DataFrame(rows, columns=["subtype", "density"])


def seam(patch: Patch, kept: Collection[int] = REAL) -> float:
    """Mean step of the grey level (0..255) from a pixel inside an instance to its neighbour in the background.

    Instances of the subtypes ``kept`` do not count; NaN where the patch has no such pair of neighbours.
    """
    grey = patch.image.astype(np.float64).mean(2)
    inside, outside = redrawn_pixels(patch.instances, patch.subtypes, kept), patch.instances == BACKGROUND
    found = np.concatenate([_steps(grey, inside, outside), _steps(grey.T, inside.T, outside.T)])
    return float(found.mean()) if len(found) else float("nan")


def _steps(grey: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    across = (inside[:, 1:] & outside[:, :-1]) | (outside[:, 1:] & inside[:, :-1])
    return np.asarray(np.abs(np.diff(grey, axis=1))[across])
