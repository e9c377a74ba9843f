"""Areas: connected tissue of one subtype, annotated or predicted, with its nuclei and how sure a segmenter is of it.

Shapes: H, W = rows and columns of an image in pixels, K = number of subtypes, n = areas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from counterstain.checkpoints import CheckpointHeader
from counterstain.data.cohort import Cohort
from counterstain.data.patches import label_mask
from counterstain.data.region_store import PixelWindow
from counterstain.devices import choose_device, fast_arithmetic, place
from counterstain.errors import MismatchError
from counterstain.io.slides import IMAGE_SUFFIXES, Slide, list_slides
from counterstain.progress import Progress, bar
from counterstain.segmentation.evaluate import check_evaluable, regions_of
from counterstain.segmentation.inference import (
    Canvas,
    HasTissue,
    everywhere,
    filled,
    read_ahead,
    readers,
    tile_rows,
    tiles,
)
from counterstain.segmentation.model import Segmenter, load_segmenter
from counterstain.segmentation.predict import WHOLE, PredictConfig, Tissue, predicted_boxes
from counterstain.segmentation.predict_images import PREDICTED
from counterstain.taxonomy import IGNORE

TILE_UM, TILES = 500.0, 4  # edge of a tile; a region has this many along its longer edge at least
COARSEST_MPP = 1.0  # at which nuclei can be told apart
NUCLEUS_UM = 6.0  # least distance of two nuclei
PALEST_NUCLEUS = 0.001  # haematoxylin, by skimage's rgb2hed, above what surrounds it


class Areas(NamedTuple):
    """Connected pixels of one subtype in one tile of an image."""

    tile: np.ndarray  # (n,) int64
    subtype: np.ndarray  # (n,) int, 1..K
    area_px: np.ndarray  # (n,) int
    cells: np.ndarray  # (n,) float; NaN where nuclei cannot be counted
    shares: np.ndarray  # (n, K) float, mean probability of each subtype; 0 and 1 of annotations


class SlidePart(NamedTuple):
    """The areas of a region, or of a tile of a slide."""

    slide: str
    patient: str
    region: str
    mpp: float
    areas: Areas


def nuclei_in(image: np.ndarray, mpp: float) -> np.ndarray | None:
    """Find the nuclei of an image, (H, W, 3) uint8: rows and columns where haematoxylin stands out, (n, 2) int.

    None where pixels are too coarse. Touching nuclei of one darkness count as one.
    """
    if mpp > COARSEST_MPP:
        return None
    from skimage.color import rgb2hed
    from skimage.feature import peak_local_max
    from skimage.filters import difference_of_gaussians, threshold_otsu

    sizes = (NUCLEUS_UM / 4 / mpp, NUCLEUS_UM / mpp)
    contrast = difference_of_gaussians(rgb2hed(image)[..., 0], *sizes)
    otsu = threshold_otsu(contrast[contrast > 0]) if (contrast > 0).any() else 0.0
    options = {"threshold_abs": max(float(otsu), PALEST_NUCLEUS), "exclude_border": False}
    distance = max(1, round(NUCLEUS_UM / 2 / mpp))
    return np.asarray(peak_local_max(contrast, distance, **options))


def areas_in(
    labels: np.ndarray,
    num_subtypes: int,
    tile_px: int,
    *,
    shares: np.ndarray | None = None,
    nuclei: np.ndarray | None = None,
    corner: tuple[int, int] = (0, 0),
) -> Areas:
    """Cut the tissue of an image into areas.

    ``labels`` (H, W) uint8 has 0 for background and pixels to be ignored, ``shares`` (K, H, W) the probabilities of the
    subtypes, ``nuclei`` (m, 2) rows and columns; ``corner`` is the image's place in its region.
    """
    from skimage.measure import label

    rows, columns = ((first + np.arange(length)) // tile_px for first, length in zip(corner, labels.shape, strict=True))
    across = columns[-1] - columns[0] + 1
    tile = (rows - rows[0])[:, None] * across + (columns - columns[0])
    marked = np.where(labels > 0, tile * 256 + labels, 0).astype(np.int32)
    numbered = label(marked, connectivity=1).ravel()  # of equal values
    count = int(numbered.max()) + 1
    value = np.zeros(count, np.int64)
    value[numbered] = marked.ravel()
    px, subtype, tile_of = np.bincount(numbered, minlength=count), value % 256, value // 256
    cells = np.full(count, np.nan)
    if nuclei is not None:
        cells = np.bincount(numbered.reshape(labels.shape)[tuple(nuclei.T)], minlength=count).astype(float)
    mean = np.eye(num_subtypes + 1)[np.minimum(subtype, num_subtypes), 1:]
    if shares is not None:
        sums = [np.bincount(numbered, weights=channel.ravel(), minlength=count) for channel in shares]
        mean = np.stack(sums, axis=1) / np.maximum(px, 1)[:, None]  # background may have no pixel
    places = (tile_of // across + rows[0]) * 2**31 + tile_of % across + columns[0]
    return Areas(*(found[1:] for found in (places, subtype, px, cells, mean)))


def _tile_px(shape: tuple[int, ...], mpp: float) -> int:
    return max(1, round(min(TILE_UM / mpp, max(shape[:2]) / TILES)))


def annotated_parts(cohort: Cohort, split: str, progress: Progress = bar) -> Iterator[SlidePart]:
    """Yield the annotated areas of every region of a split."""
    regions = regions_of(cohort, split)
    with progress("scoring", len(regions)) as advance:
        for position in regions.index.tolist():
            image, instances = cohort.read(position)
            labels = label_mask(instances, cohort.subtypes(position))
            labels[labels == IGNORE] = 0
            nuclei = nuclei_in(image, cohort.mpp)
            yield _part(cohort, position, areas_in(labels, *_of(cohort, image), nuclei=nuclei))
            advance(1)


def _of(cohort: Cohort, image: np.ndarray) -> tuple[int, int]:
    return len(cohort.taxonomy.subtypes), _tile_px(image.shape, cohort.mpp)


def _part(cohort: Cohort, position: int, areas: Areas) -> SlidePart:
    region, slide, patient = cohort.regions[["region", "slide", "patient"]].iloc[position].astype(str)
    return SlidePart(slide, patient, region, cohort.mpp, areas)


def _predicted_areas(
    logits: np.ndarray, temperature: float, mpp: float, read: Callable[[], np.ndarray], **where: Any
) -> Areas:
    """Return the areas of a predicted image from its logits (K, H, W).

    ``read`` returns its pixels, ``where`` is as for :func:`areas_in`.
    """
    from scipy.special import softmax

    labels = np.where(np.logaddexp.reduce(logits, axis=0) > 0, logits.argmax(0) + 1, 0).astype(np.uint8)
    nuclei = nuclei_in(read(), mpp) if mpp <= COARSEST_MPP and labels.any() else None
    return areas_in(labels, len(logits), shares=softmax(logits / temperature, axis=0), nuclei=nuclei, **where)


def predicted_parts(
    segmenter: Path, cohort: Cohort, split: str, *, temperature: float, device: str, progress: Progress = bar
) -> Iterator[SlidePart]:
    """Yield the predicted areas of every region of a split; raises what :func:`counterstain.evaluate` does."""
    with progress("scoring", len(regions_of(cohort, split))) as advance:
        for position, canvas in canvases_of(segmenter, cohort, split, device):
            tile_px = _tile_px(canvas.shape, cohort.mpp)
            read = partial(_pixels, cohort, position)
            areas = _predicted_areas(canvas.logits(), temperature, cohort.mpp, read, tile_px=tile_px)
            yield _part(cohort, position, areas)
            advance(1)


def _pixels(cohort: Cohort, position: int) -> np.ndarray:
    return cohort.read(position)[0]


def canvases_of(segmenter: Path, cohort: Cohort, split: str, device: str) -> Iterator[tuple[int, Canvas]]:
    """Yield every region of a split with its logits."""
    model, header = load_segmenter(segmenter)
    require_subtypes(segmenter, header)
    check_evaluable(segmenter, header, cohort, split)
    windows, where = model.config.inference.windows(header.size_px), choose_device(device)
    positions = regions_of(cohort, split).index.tolist()
    canvases = (Canvas(_pixels(cohort, position), windows) for position in positions)
    with fast_arithmetic(where):
        yield from zip(positions, filled(place(model, where), canvases, windows.batch_size), strict=True)


def require_subtypes(segmenter: Path, header: CheckpointHeader) -> None:
    """Raise MismatchError unless a segmenter tells subtypes."""
    if header.config.get("classes") != "subtypes":
        raise MismatchError(
            f"{segmenter}: knows {header.taxonomy.tissue_class} and background, no subtypes; train a segmenter with "
            "--set segmenter.classes=subtypes"
        )


def predicted_slide_parts(
    segmenter: Path,
    source: Path,
    *,
    regions: str,
    mpp_level0: float | None,
    temperature: float,
    device: str,
    progress: Progress = bar,
) -> Iterator[SlidePart]:
    """Yield the predicted areas of slides and images, tile by tile; ``regions`` and errors as for ``predict``."""
    model, header = load_segmenter(segmenter)
    require_subtypes(segmenter, header)
    placed = place(model, choose_device(device))
    slides = list_slides(source, PREDICTED)
    with progress("scoring", len(slides)) as advance:
        for name, path in slides.items():
            with Slide.open(path, mpp_level0) as slide:
                for box in predicted_boxes(slide, regions, PredictConfig()):
                    empty = areas_in(np.zeros((1, 1), np.uint8), len(header.taxonomy.subtypes), 1)
                    yield SlidePart(name, name, box.name, header.mpp, empty)  # also where nothing is found
                    view = slide.window(box, header.mpp)
                    glass = regions == WHOLE and path.suffix.lower() not in IMAGE_SUFFIXES
                    shown = partial(Tissue.of(slide).shown, view) if glass else everywhere
                    for areas in _tiles_areas(placed, view, shown, header, temperature):
                        yield SlidePart(name, name, box.name, header.mpp, areas)
            advance(1)


def _tiles_areas(
    model: Segmenter, view: PixelWindow, shown: HasTissue, header: CheckpointHeader, temperature: float
) -> Iterator[Areas]:
    windows, tile_px = model.config.inference.windows(header.size_px), _tile_px(view.shape, header.mpp)
    rows = tile_rows(view, windows, shown)
    with fast_arithmetic(model.device), closing(read_ahead(tiles(rows, windows), readers())) as read:
        ready = filled(model, read, windows.batch_size)
        for down, across in ((row.span, column) for row in rows for column in row.columns):
            top, left, height, width = down.start, across.start, down.stop - down.start, across.stop - across.start
            y, x = top - down.read_from, left - across.read_from
            logits = next(ready).logits()
            if logits.ndim > 2:  # otherwise no window shows tissue
                own, pixels = logits[..., y : y + height, x : x + width], partial(view.read, top, left, height, width)
                yield _predicted_areas(own, temperature, header.mpp, pixels, tile_px=tile_px, corner=(top, left))
