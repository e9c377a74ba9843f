"""Outline tumour on a slide with a trained segmenter: on all tissue, in squares on tissue, or in listed regions."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import shapely

from counterstain.checkpoints import CheckpointHeader
from counterstain.data.region_store import ImageWindow
from counterstain.devices import choose_device
from counterstain.errors import InputError, MismatchError
from counterstain.io.regions import Box, Extent, place_boxes, read_region_table
from counterstain.io.slide_plan import slide_name
from counterstain.io.slides import Slide, SlideWindow, tissue_mask
from counterstain.segmentation.inference import Span, TumourModel, predict_each, spans
from counterstain.segmentation.model import Segmenter, load_segmenter
from counterstain.segmentation.outlines import Outlined, Piece, is_written, join, mask_polygons, pieces, write_geojson
from counterstain.segmentation.predict import PredictConfig, Prediction, Progress, Windows, on_slide, silent, summary
from counterstain.storage import claim, fingerprint, write_parquet

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


# Outline tumour on a slide with a trained segmenter.
#
# The slide is read tile by tile: the pixels in memory do not grow with its size. The pieces of every row of tiles are
# kept on the disk until the slide is done, so that an interrupted prediction goes on where it was.


def predict_slide(
    folder: Path,
    path: Path,
    out: Path,
    config: PredictConfig,
    *,
    regions: str = "whole",
    mpp_level0: float | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Prediction:
    """Outline tumour on a slide, at the resolution that the segmenter was trained at.

    Parameters
    ----------
    folder : Path
        Checkpoint of a segmenter.
    path : Path
        Slide.
    out : Path
        GeoJSON file to be written; one that this very command wrote is left as it is.
    config : PredictConfig
    regions : ``whole``, ``auto`` or the path of a CSV table
        All tissue; squares placed on tissue; or the regions that a table lists for this slide. Outlines end at the
        edge of a region.
    mpp_level0 : float, optional
        Micrometres per level-0 pixel, where the slide does not say.
    device : ``auto``, ``cpu`` or ``cuda``
    progress : callable, optional
        As :func:`counterstain.progress.bar`.

    Raises
    ------
    InputError
        There is no such segmenter, slide or region, the resolution is not known, or ``out`` is no name of GeoJSON.
    MismatchError
        ``out`` holds something else.
    """
    _check_name(out)
    with Slide.open(path, mpp_level0) as slide:
        segmenter, header = load_segmenter(folder)
        boxes = predicted_boxes(slide, regions, config)
        windows = Windows.of(segmenter, header)
        about = _about(slide, header, config, windows, boxes)
        if _is_there(out, fingerprint(about)):
            return Prediction(out, None, None)
        kept = out.with_name(f".{out.name}.unfinished")
        claim(kept, "predict", about)
        job = _Job(segmenter.to(choose_device(device)), header, windows, config.threshold, kept)
        tissue = Tissue.of(slide) if regions == "whole" else None
        areas = _outline(job, slide, boxes, tissue, progress or silent)
    areas = [area for area in areas if area.area_um2 >= config.min_area_um2]
    x, y, _, _ = slide.bounds_level0_px
    write_geojson(
        out,
        areas,
        label=header.taxonomy.tissue_class,
        object_type=config.object_type,
        offset_xy_level0_px=(0, 0) if config.origin == "canvas" else (x, y),
        about={"fingerprint": fingerprint(about)} | {key: about[key] for key in about if key != "regions"},
    )
    shutil.rmtree(kept)
    return summary(out, areas)


@dataclass(frozen=True, slots=True)
class _Job:
    segmenter: Segmenter
    header: CheckpointHeader
    windows: Windows
    threshold: float
    kept: Path
    """Folder of what is done already."""


def _outline(
    job: _Job, slide: Slide, boxes: Sequence[Box], tissue: Tissue | None, progress: Progress
) -> list[Outlined]:
    views = [slide.window(box, job.header.mpp) for box in boxes]
    grids = [_grid(view, job.windows) for view in views]
    areas: list[Outlined] = []
    with progress("tiles", sum(len(rows) * len(columns) for rows, columns in grids)) as advance:
        for number, (box, view, (rows, columns)) in enumerate(zip(boxes, views, grids, strict=True)):
            found: list[Piece] = []
            for row in rows:
                file = job.kept / f"{number:04d}-{row.start:09d}.parquet"
                if not file.exists():
                    wanted = [c for c in columns if tissue is None or tissue.shown(view, row, c)]
                    _save(
                        file, row_pieces(job.segmenter, view, row, wanted, windows=job.windows, threshold=job.threshold)
                    )
                found += _load(file)
                advance(len(columns))
            areas += on_slide(
                join(found),
                corner_xy_level0_px=(view.x_level0_px, view.y_level0_px),
                mpp=job.header.mpp,
                mpp_level0=slide.mpp_level0,
                region=box.name,
            )
    return areas


def row_pieces(
    segmenter: TumourModel,
    view: ImageWindow,
    row: Span,
    columns: Sequence[Span],
    *,
    windows: Windows,
    threshold: float,
) -> list[Piece]:
    """Outline tumour in a row of tiles; see :func:`counterstain.segmentation.outlines.pieces`."""
    images = (view.read(row.read_from, column.read_from, row.read_px, column.read_px) for column in columns)
    found: list[Piece] = []
    for column, probability in zip(columns, predict_each(segmenter, images, **windows.as_options()), strict=True):
        found += pieces(probability, row, column, threshold)
    return found


def _grid(view: SlideWindow, windows: Windows) -> tuple[list[Span], list[Span]]:
    rows, columns = (spans(length, windows.size_px, windows.overlap_px) for length in view.shape[:2])
    return rows, columns


def _save(file: Path, found: Sequence[Piece]) -> None:
    columns = {
        "wkb": [shapely.to_wkb(piece.polygon) for piece in found],
        "probability_sum": [piece.probability_sum for piece in found],
        "pixels": [piece.pixels for piece in found],
    }
    write_parquet(file, pd.DataFrame(columns))


def _load(file: Path) -> list[Piece]:
    table = pd.read_parquet(file)
    columns = (table[name].tolist() for name in ("wkb", "probability_sum", "pixels"))
    return [Piece(shapely.from_wkb(wkb), total, pixels) for wkb, total, pixels in zip(*columns, strict=True)]


def _about(
    slide: Slide, header: CheckpointHeader, config: PredictConfig, windows: Windows, boxes: Sequence[Box]
) -> dict[str, Any]:
    """Return what tells this prediction from another one."""
    chosen = config.model_dump(mode="json", include={"threshold", "min_area_um2", "object_type"})
    return {
        "segmenter": header.sha256,
        "slide": slide.path.name,
        "size_level0_px": list(slide.size_level0_px),
        "mpp_level0": slide.mpp_level0,
        "mpp": header.mpp,
        "origin": config.origin or "bounds",
        **chosen,
        **windows._asdict(),
        "regions": [[box.name, box.x, box.y, box.width, box.height] for box in boxes],
    }


def _check_name(out: Path) -> None:
    if out.suffix not in {".geojson", ".json"} or out.is_dir():
        raise InputError(f"--out {out}: expected the name of a file that ends in .geojson, which QuPath knows")


def _is_there(out: Path, identity: str) -> bool:
    if not out.exists():
        return False
    if not is_written(out, identity):
        raise MismatchError(f"{out}: holds something else already; give another --out, or delete it")
    return True
