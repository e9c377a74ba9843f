"""Where on a slide tumour is sought: on all tissue, in squares placed on tissue, or in listed regions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import shapely

from counterstain.data.regions import Box, Extent, place_boxes, read_region_table
from counterstain.data.slide_files import slide_name
from counterstain.data.slides import Slide, SlideWindow
from counterstain.data.tissue import tissue_mask
from counterstain.errors import InputError
from counterstain.segmentation.outlines import mask_polygons
from counterstain.segmentation.predict import PredictConfig
from counterstain.segmentation.tiling import Span

TISSUE_PX = 2048  # longer side of the thumbnail in which tissue is sought
WHOLE, AUTO = "whole", "auto"


class Tissue(NamedTuple):
    """Where a slide shows tissue."""

    mask: np.ndarray  # (H, W) bool
    x_level0_px: int
    y_level0_px: int
    """Its upper left corner on the canvas."""
    downsample: float

    @classmethod
    def of(cls, slide: Slide) -> Self:
        """Find the tissue of a slide."""
        thumbnail = slide.thumbnail(TISSUE_PX)
        return cls(tissue_mask(thumbnail.image), *thumbnail[1:])

    def shown(self, view: SlideWindow, rows: Span, columns: Span) -> bool:
        """Whether a tile of a window shows tissue, or lies within a pixel of the mask from it."""
        y, x = (
            self._slice(corner + span.start * view.step - own, (span.stop - span.start) * view.step)
            for corner, span, own in (
                (view.y_level0_px, rows, self.y_level0_px),
                (view.x_level0_px, columns, self.x_level0_px),
            )
        )
        return bool(self.mask[y, x].any())

    def _slice(self, start: float, length: float) -> slice:
        first = math.floor(start / self.downsample) - 1
        return slice(max(first, 0), max(math.ceil((start + length) / self.downsample) + 1, 0))


def predicted_boxes(slide: Slide, regions: str, config: PredictConfig) -> list[Box]:
    """Return the rectangles of a slide in which tumour is sought.

    Parameters
    ----------
    slide : Slide
        Open.
    regions : ``whole``, ``auto`` or the path of a CSV table
    config : PredictConfig

    Raises
    ------
    InputError
        There is no tissue, or the table has no region of this slide or one that lies off it.
    """
    if regions == WHOLE:
        x, y, width, height = slide.bounds_level0_px
        return [Box(name="slide", x=x, y=y, width=width, height=height)]
    return _placed(slide, config) if regions == AUTO else _listed(slide, Path(regions))


def _placed(slide: Slide, config: PredictConfig) -> list[Box]:
    tissue = Tissue.of(slide)
    edge = max(1, round(config.region_size_um / slide.mpp_level0))
    corner = (tissue.x_level0_px, tissue.y_level0_px)
    boxes = place_boxes(
        [shapely.transform(p, lambda xy: xy * tissue.downsample + corner) for p in mask_polygons(tissue.mask)],
        count=config.regions_per_slide,
        width=edge,
        height=edge,
        extent=Extent(*slide.bounds_level0_px),
    )
    if not boxes:
        raise InputError(f"{slide.path}: no tissue found on it; give --regions whole, or a table of regions")
    return boxes


def _listed(slide: Slide, table: Path) -> list[Box]:
    name = slide_name(slide.path)
    boxes = [box for key, of_slide in read_region_table(table).items() if slide_name(key) == name for box in of_slide]
    if not boxes:
        raise InputError(f"{table}: no region of slide {name!r}; add a row for it, or give --regions whole")
    width, height = slide.size_level0_px
    canvas = Box(name="", x=0, y=0, width=width, height=height)
    for box in boxes:
        if not box.overlaps(canvas):
            raise InputError(
                f"{table}: region {box.name} of slide {name} at x {box.x}, y {box.y} lies off its "
                f"{width} x {height} px; regions are given in level-0 pixels of the whole canvas"
            )
    return boxes
