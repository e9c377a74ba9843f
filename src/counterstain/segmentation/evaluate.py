"""Evaluate a segmenter on whole regions: the probability of every pixel, then a table of pixel counts per slide."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from counterstain.checkpoints import CheckpointHeader, require_taxonomy
from counterstain.data.cohort import PARTS, Cohort
from counterstain.data.patches import label_mask
from counterstain.data.split import check_no_leak, image_key
from counterstain.devices import choose_device, fast_arithmetic, place
from counterstain.errors import InputError, LeakageError, MismatchError
from counterstain.progress import bar
from counterstain.segmentation.counts import add_by_slide, count
from counterstain.segmentation.inference import read_ahead, sliding_window_inference
from counterstain.segmentation.model import load_segmenter

ALL = "all"


def evaluate(
    segmenter: str | Path,
    cohort: Cohort,
    split: str = "test",
    *,
    device: str = "auto",
    label: str = "evaluating",  # of the progress bar
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
    folder = Path(segmenter)
    model, header = load_segmenter(folder)
    check_evaluable(folder, header, cohort, split)
    regions = regions_of(cohort, split)
    positions: list[int] = regions.index.tolist()
    windows = model.config.inference.windows(header.size_px)
    seen = set() if split == "train" else set(header.tissue_seen)
    masks: deque[np.ndarray] = deque()

    def read(position: int) -> tuple[np.ndarray, np.ndarray]:
        image, instances = _unseen(cohort, position, seen, folder)
        return image, label_mask(instances, cohort.subtypes(position))

    def images() -> Iterator[np.ndarray]:
        for image, mask in read_ahead(partial(read, position) for position in positions):
            masks.append(mask)
            yield image

    counts, where = [], choose_device(device)
    with fast_arithmetic(where), bar(label, len(positions)) as advance:
        for probability in sliding_window_inference(place(model, where), images(), windows):
            counts.append(count(masks.popleft(), probability > 0.5, cohort.taxonomy.num_labels))
            advance(1)
    return add_by_slide(regions, np.stack(counts))


def regions_of(cohort: Cohort, split: str) -> pd.DataFrame:
    """Return the rows of :attr:`Cohort.regions` that a split has, ``all`` included; their index is their position."""
    regions = cohort.regions.reset_index(drop=True)
    return regions if split == ALL else regions.iloc[cohort.positions(split)]


def _unseen(cohort: Cohort, position: int, seen: set[str], folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a region; raise LeakageError where the segmenter was trained on its image under any name."""
    image, instances = cohort.read(position)
    if seen and image_key(image) in seen:
        region, patient = cohort.regions[["region", "patient"]].iloc[position]
        raise LeakageError(
            f"{folder}: was trained on the image of region {region} (patient {patient}) of {cohort.folder}, under "
            "another name; evaluate it on tissue that it has not seen"
        )
    return image, instances


def check_evaluable(folder: Path, header: CheckpointHeader, cohort: Cohort, split: str) -> None:
    """Check that a segmenter may be evaluated on a split of a cohort; raises what :func:`evaluate` does."""
    if split not in {*PARTS, ALL}:
        raise InputError(f"split {split!r}: expected one of {', '.join((*PARTS, ALL))}")
    require_taxonomy(folder, header, cohort.taxonomy)
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
