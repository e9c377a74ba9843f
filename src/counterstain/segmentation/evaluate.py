"""Evaluate a segmenter on whole regions: the probability of every pixel, then a table of pixel counts per slide.

A region is read, seen by the network and counted one row of windows at a time: memory does not grow with its height.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from counterstain.checkpoints import CheckpointHeader, require_taxonomy
from counterstain.data.cohort import PARTS, Cohort
from counterstain.data.patches import ImageKey, label_mask
from counterstain.data.split import check_no_leak
from counterstain.devices import choose_device, fast_arithmetic, place
from counterstain.errors import InputError, LeakageError, MismatchError
from counterstain.progress import bar
from counterstain.segmentation.counts import add_by_slide, count
from counterstain.segmentation.inference import Band, Strip, bands, filled, read_ahead
from counterstain.segmentation.model import load_segmenter
from counterstain.segmentation.segmenter_config import Windows
from counterstain.taxonomy import Merge

ALL = "all"


def evaluate(
    segmenter: str | Path,
    cohort: Cohort,
    split: str = "test",
    *,
    device: str = "auto",
    label: str = "evaluating",  # of the progress bar
    merge: Merge | None = None,  # of the cohort's subtypes, that the segmenter was trained on
) -> pd.DataFrame:
    """Segment every region of a split of a cohort (``train``, ``val``, ``test`` or ``all``) and count its pixels.

    Raises MismatchError where the segmenter was trained on other subtypes, or at an mpp that differs by more than 5 %;
    LeakageError where the split is not the training split and contains a patient, or an image, that the segmenter saw;
    InputError where there is no such split or it is empty, or there is no finished segmenter.

    Returns
    -------
    DataFrame
        Counts by slide, for :func:`counterstain.segmentation.counts.measures`.
    """
    regions, num_labels = regions_of(cohort, split), cohort.taxonomy.num_labels
    counts = {position: np.zeros((num_labels, 2), np.int64) for position in regions.index.tolist()}
    with bar(label, len(counts)) as advance:
        for strip in predicted_strips(segmenter, cohort, split, device=device, merge=merge):
            counts[strip.position] += count(strip.mask, strip.tumour, num_labels)
            advance(int(strip.is_last))
    return add_by_slide(regions, np.stack([*counts.values()]))


class PredictedStrip(NamedTuple):
    """Some rows of a region: their labels, and what a segmenter makes of them."""

    position: int  # of the region in the cohort
    mask: np.ndarray  # (h, W) uint8, labels
    tumour: np.ndarray  # (h, W) bool
    is_last: bool  # of its region


def predicted_strips(
    segmenter: str | Path, cohort: Cohort, split: str, *, device: str = "auto", merge: Merge | None = None
) -> Iterator[PredictedStrip]:
    """Segment every region of a split, and yield its rows from top to bottom; raises what :func:`evaluate` does."""
    folder = Path(segmenter)
    model, header = load_segmenter(folder)
    check_evaluable(folder, header, cohort, split, merge)
    positions: list[int] = regions_of(cohort, split).index.tolist()
    windows = model.config.inference.windows(header.size_px)
    seen = set() if split == "train" else set(header.tissue_seen)
    where = choose_device(device)
    pieces = (piece for position in positions for piece in _pieces(cohort, position, windows, seen, folder))
    with fast_arithmetic(where):
        for strip in filled(place(model, where), _strips(read_ahead(pieces), windows), windows.batch_size):
            yield PredictedStrip(strip.position, strip.mask, strip.probability() > 0.5, strip.is_last)


class _Piece(NamedTuple):
    """A row of windows of a region, as it was read."""

    position: int
    image: np.ndarray  # (S, W, 3) uint8
    mask: np.ndarray  # (own_px, W) uint8, labels
    band: Band
    height_px: int  # of the region


class _Strip(Strip):
    """A row of windows with the labels that its prediction is compared with."""

    def __init__(self, piece: _Piece, windows: Windows, above: Strip | None) -> None:
        super().__init__(piece.image, windows, piece.band, piece.height_px, above)
        self.position, self.mask = piece.position, piece.mask
        self.is_last = piece.band.top_px + piece.band.own_px == piece.height_px


def _strips(pieces: Iterable[_Piece], windows: Windows) -> Iterator[_Strip]:
    above = None
    for piece in pieces:
        strip = _Strip(piece, windows, above)
        yield strip
        above = None if strip.is_last else strip


def _pieces(
    cohort: Cohort, position: int, windows: Windows, seen: set[str], folder: Path
) -> Iterator[Callable[[], _Piece]]:
    """Yield functions that read a region row of windows by row of windows, to be called in their order.

    The last one raises LeakageError where the segmenter was trained on the image of the region under any name.
    """
    height, width = (int(cohort.regions[edge].iloc[position]) for edge in ("height_px", "width_px"))
    key, subtypes = ImageKey(height, width), cohort.subtypes(position)

    def read(band: Band) -> _Piece:
        patch = cohort.cut(position, band.top_px, 0, band.height_px, width)
        if seen:
            key.add(patch.image[: band.own_px])
            if band.top_px + band.own_px == height and key.value in seen:
                raise _leak(cohort, position, folder)
        mask = label_mask(patch.instances[: band.own_px], subtypes)
        return _Piece(position, patch.image, mask, band, height)

    return (partial(read, band) for band in bands(height, windows))


def regions_of(cohort: Cohort, split: str) -> pd.DataFrame:
    """Return the rows of :attr:`Cohort.regions` that a split has, ``all`` included; their index is their position."""
    if split not in {*PARTS, ALL}:
        raise InputError(f"split {split!r}: expected one of {', '.join((*PARTS, ALL))}")
    regions = cohort.regions.reset_index(drop=True)
    return regions if split == ALL else regions.iloc[cohort.positions(split)]


def _leak(cohort: Cohort, position: int, folder: Path) -> LeakageError:
    region, patient = cohort.regions[["region", "patient"]].iloc[position]
    return LeakageError(
        f"{folder}: was trained on the image of region {region} (patient {patient}) of {cohort.folder}, under "
        "another name; evaluate it on tissue that it has not seen"
    )


def check_evaluable(
    folder: Path, header: CheckpointHeader, cohort: Cohort, split: str, merge: Merge | None = None
) -> None:
    """Check that a segmenter may be evaluated on a split of a cohort; raises what :func:`evaluate` does."""
    regions_of(cohort, split)
    require_taxonomy(folder, header, cohort.taxonomy if merge is None else cohort.taxonomy.merged(merge))
    require_mpp(folder, header, cohort)
    if split != "train":
        remedy = "evaluate it on patients that it has not seen"
        check_no_leak(header.patients_seen, cohort, str(folder), splits=[split], remedy=remedy)


def require_mpp(folder: Path, header: CheckpointHeader, cohort: Cohort) -> None:
    """Raise MismatchError unless a cohort has the resolution that a segmenter was trained at."""
    if not cohort.is_at(header.mpp):
        raise MismatchError(
            f"{folder}: was trained at {header.mpp:g} um/px, {cohort.folder} is at {cohort.mpp:g} um/px; "
            f"import the cohort at {header.mpp:g} um/px"
        )
