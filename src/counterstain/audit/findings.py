"""What an audit found out: a record for each kind of images, and the table of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from counterstain.audit.copies import CopiesFound, CopySearch
from counterstain.audit.intervals import Interval
from counterstain.data.patches import Patch

HALVES, HELD_OUT = "training halves", "held out"
REFERENCES = (HALVES, HELD_OUT)


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
    seen_as_tissue: float
    """Share of these instances of which most pixels look like any subtype."""
    stain: pd.Series
    """Mean optical density of the stain inside them, by subtype."""
    seam: float
    """Mean step of the grey level across their borders."""
    copies: CopiesFound
    """How like the images are to training tissue at its likest place."""
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
    search: CopySearch
    """The training tissue in which copies were looked for."""

    def table(self) -> pd.DataFrame:
        """Return a row per kind of images."""
        return pd.DataFrame([findings.row() for findings in self.findings])
