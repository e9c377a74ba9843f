"""Two arms of a study compared region by region: where their segmenters differ, and which of them is right there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import ndimage

from counterstain.data.cohort import Cohort
from counterstain.errors import InputError
from counterstain.progress import bar
from counterstain.segmentation.evaluate import predicted_strips, regions_of
from counterstain.study.cells import CELLS, REFERENCE
from counterstain.study.records import record_look
from counterstain.study.stages import open_cohort
from counterstain.study.status import CellRow, is_done, read_plan
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy

SHOWN_PX = 1024  # longest edge of a picture of a region; of larger ones, every second, third, … pixel is shown
GREY, PALE = np.array([0.299, 0.587, 0.114]), 0.45  # of the image under a difference map
BETTER, WORSE = (0, 114, 178), (213, 94, 0)  # blue and vermilion of Okabe & Ito 2008, told apart by all readers
LINE_PX = 2


@dataclass(frozen=True, kw_only=True, repr=False)
class ComparedRegion:
    """A region with the reference and what two segmenters make of it; shapes are those of the picture, (h, w)."""

    region: str
    slide: str
    patient: str
    fold: int  # of a cross-validation, otherwise 0
    arms: tuple[str, str]  # baseline and arm
    mpp: float  # of the picture, micrometres per pixel
    taxonomy: Taxonomy
    counted_px: int  # of the whole region, without those to be ignored
    better_px: int  # pixels of which the arm alone is right
    worse_px: int  # pixels of which the baseline alone is right
    image: np.ndarray  # (h, w, 3) uint8
    labels: np.ndarray  # (h, w) uint8: subtypes, 0 = background, 255 = to be ignored
    baseline: np.ndarray  # (h, w) bool
    arm: np.ndarray  # (h, w) bool

    def __repr__(self) -> str:
        differ = f"{self.arms[1]} and {self.arms[0]} differ in {100 * self.disagreement:.1f} % of the pixels"
        return f"ComparedRegion({self.region} of slide {self.slide}: {differ})"

    @property
    def colours(self) -> dict[str, tuple[tuple[int, int, int], float]]:
        """Each arm with the colour in :meth:`difference` of pixels of which it alone is right, and their share."""
        total = max(self.counted_px, 1)
        return {self.arms[1]: (BETTER, self.better_px / total), self.arms[0]: (WORSE, self.worse_px / total)}

    @property
    def disagreement(self) -> float:
        """Share of the counted pixels of the region on which the segmenters differ: exactly one of them is right."""
        return (self.better_px + self.worse_px) / self.counted_px if self.counted_px else 0.0

    def reference(self) -> np.ndarray:
        """Return the image with the outlines of the reference in the colours of the subtypes, (h, w, 3) uint8."""
        drawn = self.image.copy()
        for subtype in self.taxonomy.subtypes:
            drawn[_outline(self.labels == subtype.id)] = self.taxonomy.palette[subtype.id]
        return drawn

    def outlined(self, which: str) -> np.ndarray:
        """Return the image with the outlines that ``baseline`` or ``arm`` predicts in blue, (h, w, 3) uint8."""
        drawn = self.image.copy()
        drawn[_outline(self.baseline if which == "baseline" else self.arm)] = BETTER
        return drawn

    def difference(self) -> np.ndarray:
        """Return the pale image, blue where the arm alone is right, orange where the baseline alone is."""
        pale = 255 - PALE * (255 - self.image @ GREY)
        drawn = np.repeat(pale[..., None], 3, axis=2).astype(np.uint8)
        differ = (self.baseline != self.arm) & (self.labels != IGNORE)
        right = self.arm == (self.labels != BACKGROUND)
        drawn[differ & right], drawn[differ & ~right] = BETTER, WORSE
        return drawn


def compare_regions(
    run: Path,
    arm: str,
    *,
    baseline: str = REFERENCE,
    repeat: int = 0,
    split: str = "test",
    most: int = 24,
    device: str = "auto",
) -> list[ComparedRegion]:
    """Compare the segmenters of two arms of a study on all regions of a split, those first where they differ most.

    They are sorted by :attr:`ComparedRegion.disagreement`: every pixel counts the same, whichever arm is right; the
    ``most`` first ones are returned. With folds, each fold's test part is compared with its own segmenters. Looking at
    them is put on record, as results are.

    Raises InputError where the study has no such arm or repeat, or has not trained it, besides what ``evaluate`` does.
    """
    pairs = _segmenters(run, (baseline, arm), repeat)
    record_look(run, "compare", (split,))
    shown: list[ComparedRegion] = []
    for rows in pairs:
        cohort = open_cohort(run / CELLS / next(need for need in rows[0].needs if need.startswith("cohort-")))
        for region in _compared(run / CELLS, rows, cohort, split, device):
            shown = sorted([*shown, region], key=lambda one: (-one.disagreement, one.region))[:most]
    return shown


def arms_of(run: Path) -> list[str]:
    """Return the arms of a study that was started, in their order."""
    return list(dict.fromkeys(row.arm for row in read_plan(run) if row.stage == "segmenter" and row.arm))


def table_of(regions: list[ComparedRegion]) -> pd.DataFrame:
    """Return a row per region: region, slide, patient, disagreement (share), better_px, worse_px, counted_px."""
    columns = ("region", "slide", "patient", "disagreement", "better_px", "worse_px", "counted_px")
    return pd.DataFrame([[getattr(one, name) for name in columns] for one in regions], columns=list(columns))


def _segmenters(run: Path, arms: tuple[str, str], repeat: int) -> list[tuple[CellRow, CellRow]]:
    """Return the segmenters of two arms, fold by fold."""
    rows = [row for row in read_plan(run) if row.stage == "segmenter" and row.arm]
    known = arms_of(run)
    if arms[0] == arms[1]:
        raise InputError(f"{run}: an arm is compared with another one; {arms[0]} was given twice")
    found = []
    for arm in arms:
        if arm not in known:
            raise InputError(f"{run}: arm {arm!r}: expected one of {', '.join(known)}")
        of_arm = {row.fold: row for row in rows if row.arm == arm and row.repeat == repeat}
        if not of_arm:
            last = max(row.repeat for row in rows if row.arm == arm)
            raise InputError(f"{run}: repeat {repeat}: arm {arm} has the repeats 0 to {last}")
        for row in of_arm.values():
            if not is_done(row, run / CELLS):
                raise InputError(f"{run}: {row.name} is not trained yet; run the study again, finished work is kept")
        found.append(of_arm)
    return [(found[0][fold], found[1][fold]) for fold in sorted(found[0].keys() & found[1].keys())]


@dataclass
class _Rows:
    """What is kept of the rows of a region that were compared so far: counts, and every ``step``-th pixel."""

    step: int
    top_px: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))  # counted, better, worse
    kept: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def add(self, labels: np.ndarray, baseline: np.ndarray, arm: np.ndarray) -> None:
        counted, tumour = labels != IGNORE, labels != BACKGROUND
        differ = counted & (baseline != arm)
        right = int((differ & (arm == tumour)).sum())
        self.counts += (int(counted.sum()), right, int(differ.sum()) - right)
        first = -self.top_px % self.step
        self.kept.append(tuple(part[first :: self.step, :: self.step] for part in (labels, baseline, arm)))
        self.top_px += len(labels)

    def joined(self) -> Iterator[np.ndarray]:
        return (np.concatenate(parts) for parts in zip(*self.kept, strict=True))


def _compared(
    root: Path, rows: tuple[CellRow, CellRow], cohort: Cohort, split: str, device: str
) -> Iterator[ComparedRegion]:
    regions = regions_of(cohort, split)
    strips = [predicted_strips(root / row.folder, cohort, split, device=device) for row in rows]
    kept: _Rows | None = None
    with bar(f"comparing {rows[1].arm} with {rows[0].arm}", len(regions)) as advance:
        for one, other in zip(*strips, strict=True):  # of one recipe, so with the same windows
            region: Any = regions.loc[one.position]
            step = -(-max(region["height_px"], region["width_px"]) // SHOWN_PX)
            kept = kept or _Rows(step)
            kept.add(one.mask, one.tumour, other.tumour)
            if not one.is_last:
                continue
            labels, baseline, arm = kept.joined()
            counted, better, worse = kept.counts.tolist()
            yield ComparedRegion(
                region=str(region["region"]),
                slide=str(region["slide"]),
                patient=str(region["patient"]),
                fold=rows[0].fold,
                arms=(rows[0].arm, rows[1].arm),
                mpp=cohort.mpp * step,
                taxonomy=cohort.taxonomy,
                counted_px=counted,
                better_px=better,
                worse_px=worse,
                image=_shrunk(cohort, one.position, kept.top_px, int(region["width_px"]), step),
                labels=labels,
                baseline=baseline,
                arm=arm,
            )
            kept = None
            advance(1)


def _shrunk(cohort: Cohort, position: int, height_px: int, width_px: int, step: int) -> np.ndarray:
    """Read every ``step``-th pixel of a region, (h, w, 3) uint8, some rows at a time."""
    rows = SHOWN_PX // step * step
    cuts = (cohort.cut(position, top, 0, min(rows, height_px - top), width_px) for top in range(0, height_px, rows))
    return np.concatenate([cut.image[::step, ::step] for cut in cuts])


def _outline(mask: np.ndarray) -> np.ndarray:
    """Return the rim of a mask (h, w) bool, inside of it."""
    inside = ndimage.binary_erosion(mask, np.ones((3, 3), bool), iterations=LINE_PX, border_value=1)
    return np.asarray(mask & ~inside)
