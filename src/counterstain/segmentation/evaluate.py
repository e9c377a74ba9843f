"""Evaluate a segmenter on whole regions: sliding-window inference, then one table of pixel counts per slide.

Shapes: H, W = rows and columns of a region in pixels, S = edge of a window, B = windows in a batch, K = number of
subtypes. Windows of several regions share batches of one size, so that many small regions cost no more than few large
ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from counterstain.checkpoints import CheckpointHeader, require_taxonomy
from counterstain.data.cohort import PARTS, Cohort
from counterstain.data.patches import label_mask
from counterstain.data.split import check_no_leak, image_key
from counterstain.devices import choose_device
from counterstain.errors import InputError, LeakageError, MismatchError
from counterstain.progress import bar
from counterstain.segmentation.counts import add_by_slide, count
from counterstain.segmentation.model import Segmenter, load_segmenter
from counterstain.segmentation.segmenter_config import Windows

ALL = "all"


def evaluate(
    segmenter: str | Path,
    cohort: Cohort,
    part: str = "test",
    *,
    device: str = "auto",
    label: str = "evaluating",  # of the progress bar
) -> pd.DataFrame:
    """Segment every region of a part of a cohort (``train``, ``val``, ``test`` or ``all``) and count its pixels.

    Returns
    -------
    DataFrame
        Counts by slide, for :func:`counterstain.segmentation.counts.measures`.

    Raises
    ------
    MismatchError
        The segmenter was trained on other subtypes, or at an mpp that differs by more than 5 %.
    LeakageError
        The part is not the training part and contains a patient, or an image, that the segmenter saw.
    InputError
        There is no such part or it is empty, or there is no finished segmenter.
    """
    folder = Path(segmenter)
    model, header = load_segmenter(folder)
    check_evaluable(folder, header, cohort, part)
    regions = regions_of(cohort, part)
    positions: list[int] = regions.index.tolist()
    windows = model.config.inference.windows(header.size_px)
    seen = set() if part == "train" else set(header.tissue_seen)
    images = (_unseen(cohort, position, seen, folder) for position in positions)
    probabilities = sliding_window_inference(model.to(choose_device(device)), images, windows)
    counts = []
    with bar(label, len(positions)) as advance:
        for position, probability in zip(positions, probabilities, strict=True):
            mask = label_mask(cohort.read(position)[1], cohort.subtypes(position))
            counts.append(count(mask, probability > 0.5, cohort.taxonomy.num_labels))
            advance(1)
    return add_by_slide(regions, np.stack(counts))


def regions_of(cohort: Cohort, part: str) -> pd.DataFrame:
    """Return the rows of :attr:`Cohort.regions` that a part has, ``all`` included; their index is their position."""
    regions = cohort.regions.reset_index(drop=True)
    return regions if part == ALL else regions.iloc[cohort.part(part)]


def _unseen(cohort: Cohort, position: int, seen: set[str], folder: Path) -> np.ndarray:
    """Return the image of a region; raise LeakageError where the segmenter was trained on it under any name."""
    image = cohort.read(position)[0]
    if seen and image_key(image) in seen:
        region, patient = cohort.regions[["region", "patient"]].iloc[position]
        raise LeakageError(
            f"{folder}: was trained on the image of region {region} (patient {patient}) of {cohort.folder}, under "
            "another name; evaluate it on tissue that it has not seen"
        )
    return image


def check_evaluable(folder: Path, header: CheckpointHeader, cohort: Cohort, part: str) -> None:
    """Check that a segmenter may be evaluated on a part of a cohort; raises what :func:`evaluate` does."""
    if part not in {*PARTS, ALL}:
        raise InputError(f"part {part!r}: expected one of {', '.join((*PARTS, ALL))}")
    require_taxonomy(folder, header, cohort.taxonomy)
    require_mpp(folder, header, cohort)
    if part != "train":
        remedy = "evaluate it on patients that it has not seen"
        check_no_leak(header.patients_seen, cohort, str(folder), parts=[part], remedy=remedy)


def require_mpp(folder: Path, header: CheckpointHeader, cohort: Cohort) -> None:
    """Raise MismatchError unless a cohort has the resolution that a segmenter was trained at."""
    if not cohort.is_at(header.mpp):
        raise MismatchError(
            f"{folder}: was trained at {header.mpp:g} um/px, {cohort.folder} is at {cohort.mpp:g} um/px; "
            f"import the cohort at {header.mpp:g} um/px"
        )


def sliding_window_inference(
    segmenter: Segmenter, images: Iterable[np.ndarray], windows: Windows
) -> Iterator[np.ndarray]:
    """Yield the tumour probability, (H, W) float32, of every region, (H, W, 3) uint8, in their order.

    Regions may have any sizes, and are read one at a time, as their windows are needed. The result of a region does not
    depend on the others: every batch is full, the last one padded with blank windows. A region smaller than a window is
    padded by reflection. Logits of overlapping windows are averaged with a Hann window as weight.
    """
    waiting: deque[_Canvas] = deque()

    def placed() -> Iterator[tuple[_Canvas, int, int]]:
        for image in images:
            canvas = _Canvas(image, windows)
            waiting.append(canvas)
            for y, x in canvas.corners:
                yield canvas, y, x

    remaining = placed()
    while group := list(islice(remaining, windows.batch_size)):
        logits = _logits(segmenter, [canvas.window(y, x) for canvas, y, x in group], windows.batch_size)
        for (canvas, y, x), of_window in zip(group, logits, strict=True):
            canvas.add(y, x, of_window)
        while waiting and waiting[0].missing == 0:
            yield waiting.popleft().probability()


class _Canvas:
    """A region whose logits are collected window by window."""

    def __init__(self, image: np.ndarray, windows: Windows) -> None:
        self._height, self._width = image.shape[:2]
        size = self._size_px = windows.size_px
        padding = [(0, max(size - length, 0)) for length in (self._height, self._width)]
        self._image = np.pad(image, [*padding, (0, 0)], mode="reflect") if np.any(padding) else image
        shape = self._image.shape[:2]
        rows, columns = (_starts(length, size, windows.overlap_px) for length in shape)
        self.corners = [(y, x) for y in rows for x in columns]
        self.missing = len(self.corners)
        weight = np.sin(np.pi * (np.arange(size, dtype=np.float32) + 0.5) / size) ** 2  # Hann, never zero
        self._weight = np.outer(weight, weight)
        self._total = np.outer(_total_weight(rows, weight, shape[0]), _total_weight(columns, weight, shape[1]))
        self._sum = np.zeros(shape, np.float32)

    def window(self, y: int, x: int) -> np.ndarray:
        return self._image[y : y + self._size_px, x : x + self._size_px]

    def add(self, y: int, x: int, logits: np.ndarray) -> None:
        self._sum[y : y + self._size_px, x : x + self._size_px] += self._weight * logits
        self.missing -= 1

    def probability(self) -> np.ndarray:
        logits = torch.from_numpy(self._sum / self._total)
        probability: np.ndarray = torch.sigmoid(logits)[: self._height, : self._width].numpy()
        return probability


def _logits(segmenter: Segmenter, windows: list[np.ndarray], batch_size: int) -> np.ndarray:
    """Return (n, S, S) float32 for n windows, computed in a batch of ``batch_size``."""
    batch = np.zeros((batch_size, *windows[0].shape), np.uint8)
    batch[: len(windows)] = windows
    with torch.inference_mode():
        logits: np.ndarray = segmenter.tumour_logits(torch.from_numpy(batch)).float().cpu().numpy()
    return logits[: len(windows)]


def _starts(length: int, size_px: int, overlap_px: int) -> list[int]:
    """Return evenly spaced starts of windows that cover ``length`` and overlap by at least ``overlap_px``."""
    steps = -(-(length - size_px) // (size_px - overlap_px))
    starts: list[int] = np.linspace(0, length - size_px, steps + 1).astype(int).tolist()
    return starts


def _total_weight(starts: list[int], weight: np.ndarray, length: int) -> np.ndarray:
    total = np.zeros(length, np.float32)
    for start in starts:
        total[start : start + len(weight)] += weight
    return total
