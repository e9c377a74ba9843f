"""Score a trained segmenter on a part of any cohort of the same subtypes: one count table per slide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from counterstain.checkpoints import CheckpointHeader, require_taxonomy
from counterstain.data.cohort import PARTS, Cohort
from counterstain.data.patches import label_mask
from counterstain.data.split import check_no_leak
from counterstain.devices import choose_device
from counterstain.errors import InputError, MismatchError
from counterstain.progress import bar
from counterstain.segmentation.counts import add_by_slide, count
from counterstain.segmentation.inference import predict_each
from counterstain.segmentation.model import load_segmenter
from counterstain.segmentation.segmenter_config import InferenceConfig

ALL = "all"


def evaluate(
    folder: Path,
    cohort: Cohort,
    part: str,
    *,
    inference: InferenceConfig | None = None,
    device: str = "auto",
    label: str = "evaluating",
) -> pd.DataFrame:
    """Segment every region of a part and count its pixels.

    Parameters
    ----------
    folder : Path
        Checkpoint of a segmenter.
    cohort : Cohort
    part : str
        ``train``, ``val``, ``test`` or ``all``.
    inference : InferenceConfig, optional
        Instead of what the segmenter was configured with.
    device : str
        ``auto``, ``cpu``, ``cuda``.
    label : str
        Of the progress bar.

    Returns
    -------
    DataFrame
        The long form of :mod:`counterstain.segmentation.counts`.

    Raises
    ------
    MismatchError
        The segmenter was trained on other subtypes, or at an mpp that differs by more than 5 %.
    LeakageError
        The part is not the training part and holds a patient that the segmenter saw.
    InputError
        There is no such part or it is empty, or there is no finished segmenter.
    """
    segmenter, header = load_segmenter(folder)
    check_evaluable(folder, header, cohort, part)
    positions: list[int] = list(range(len(cohort))) if part == ALL else cohort.part(part).tolist()
    segmenter.to(choose_device(device))
    settings = inference or segmenter.config.inference
    window_px, overlap_px = settings.edges(header.size_px)
    probabilities = predict_each(
        segmenter,
        (cohort.read(position)[0] for position in positions),
        size_px=window_px,
        overlap_px=overlap_px,
        batch_size=settings.batch_size,
    )
    with bar(label, len(positions)) as advance:
        counts = np.stack([_counts(cohort, *pair, advance) for pair in zip(positions, probabilities, strict=True)])
    return add_by_slide(cohort.regions.iloc[positions], counts)


def check_evaluable(folder: Path, header: CheckpointHeader, cohort: Cohort, part: str) -> None:
    """Check that a segmenter may be scored on a part of a cohort; raises what :func:`evaluate` does."""
    if part not in {*PARTS, ALL}:
        raise InputError(f"part {part!r}: expected one of {', '.join((*PARTS, ALL))}")
    require_taxonomy(folder, header, cohort.taxonomy)
    if not cohort.is_at(header.mpp):
        raise MismatchError(
            f"{folder}: was trained at {header.mpp:g} um/px, {cohort.folder} is at {cohort.mpp:g} um/px; "
            f"import the cohort at {header.mpp:g} um/px"
        )
    if part != "train":
        remedy = "evaluate it on patients that it has not seen"
        check_no_leak(header.patients_seen, cohort, str(folder), parts=[part], remedy=remedy)


def _counts(cohort: Cohort, position: int, probability: np.ndarray, advance: Callable[[int], None]) -> np.ndarray:
    """Return the (K + 1, 2) table of a region."""
    mask = label_mask(cohort.read(position)[1], cohort.subtypes(position))
    advance(1)
    return count(mask, probability > 0.5, cohort.taxonomy.num_labels)
