"""Predict tumour with a trained segmenter on a slide, as outlines for QuPath; by subtype if the segmenter tells them.

A slide is read tile by tile, so memory does not grow with its size. The pieces of every row of tiles are kept on disk
until the slide is done, so that an interrupted prediction continues where it stopped.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import shapely
from pydantic import Field

from counterstain.checkpoints import CheckpointHeader
from counterstain.config import Config
from counterstain.devices import choose_device, fast_arithmetic, place
from counterstain.errors import CounterstainError, InputError
from counterstain.io.outlines import (
    RGB,
    TUMOUR_COLOUR,
    ObjectType,
    Outlined,
    Piece,
    Span,
    is_written,
    join,
    mask_polygons,
    on_slide,
    pieces,
    write_geojson,
)
from counterstain.io.regions import place_boxes, read_region_table, tissue_mask
from counterstain.io.slides import Box, Slide, SlideWindow, slide_name
from counterstain.progress import Progress, silent
from counterstain.segmentation.inference import (
    Canvas,
    TileRow,
    everywhere,
    filled,
    read_ahead,
    readers,
    tile_rows,
    tiles,
)
from counterstain.segmentation.model import Segmenter, load_segmenter
from counterstain.segmentation.segmenter_config import Windows
from counterstain.storage import claim, file_identity, fingerprint, read_sealed, write_sealed

TISSUE_PX = 2048  # longer side of the thumbnail in which tissue is detected
WHOLE, AUTO = "whole", "auto"
GEOJSON = (".geojson", ".json")


class PredictConfig(Config):
    """How tumour is outlined."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Probability from which a pixel is tumour."""
    min_area_um2: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Smaller areas are left out, in square micrometres."""
    object_type: ObjectType = "annotation"
    """Type of the objects in QuPath: annotations can be edited, detections are lighter."""
    origin: Literal["bounds", "canvas"] | None = None
    """Origin of the coordinates: the corner of the scanned area, as in QuPath, or that of the whole canvas; null =
    bounds for a slide, canvas for a cohort, which does not know the scanned areas of its slides."""
    regions_per_slide: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Most regions placed on tissue."""
    region_size_um: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1500.0
    """Edge of the regions placed on tissue, in micrometres."""


class Prediction(NamedTuple):
    """A file of predicted areas."""

    path: Path
    areas: int | None  # outlined areas; None if the file existed already
    area_um2: float | None  # their total area


def predict_slide(
    segmenter: str | Path,
    slide: str | Path,
    out: str | Path,
    config: PredictConfig | None = None,
    *,
    regions: str | Path = WHOLE,
    mpp_level0: float | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Prediction:
    """Outline tumour on a slide, at the resolution that the segmenter was trained at.

    ``out`` is a GeoJSON file; an existing one of the same prediction is kept. ``regions`` are ``whole``: all tissue,
    where windows that show none, by :func:`counterstain.io.regions.tissue_mask` on a thumbnail of 2,048 px and a pixel
    around it, are background; ``auto``: squares placed on tissue; or a CSV table of this slide's regions, both with
    their glass. Outlines end at the edge of a region. ``mpp_level0`` is needed where the slide does not have it.

    Raises InputError where there is no such segmenter, slide or region, the resolution is unknown, or ``out`` is not
    named like GeoJSON; MismatchError where ``out`` contains something else.
    """
    out, config = Path(out), config or PredictConfig()
    check_name(out)
    with Slide.open(slide, mpp_level0) as opened:
        model, header = load_segmenter(segmenter)
        boxes = predicted_boxes(opened, str(regions), config)
        windows = model.config.inference.windows(header.size_px)
        about = _about_slide(opened, header, config, windows, boxes)
        of_file = {"fingerprint": fingerprint(about)} | {key: about[key] for key in about if key != "regions"}
        if is_written(out, of_file):
            return Prediction(out, None, None)
        unfinished = out.with_name(f".{out.name}.unfinished")
        claim(unfinished, "predict", about)
        where = choose_device(device)
        views = [opened.window(box, header.mpp) for box in boxes]
        tissue = Tissue.of(opened) if regions == WHOLE else None
        with fast_arithmetic(where):
            settings: dict[str, Any] = {"windows": windows, "threshold": config.threshold}
            found = _pieces_of(views, place(model, where), tissue, unfinished, progress, **settings)
        areas, classes = list[Outlined](), classes_of(header)
        for box, view, of_view in zip(boxes, views, found, strict=True):
            corner = (view.x_level0_px, view.y_level0_px)
            mpp = {"mpp": header.mpp, "mpp_level0": opened.mpp_level0}
            areas += outlined(of_view, classes, corner_xy_level0_px=corner, **mpp, region=box.name)
        origin = (0, 0) if config.origin == "canvas" else opened.bounds_level0_px[:2]
    prediction = write_areas(out, areas, config, of_file, classes, offset_xy_level0_px=origin)
    shutil.rmtree(unfinished)
    return prediction


def check_name(out: Path) -> None:
    """Raise InputError where a file of outlines is not named like GeoJSON."""
    if out.suffix not in GEOJSON or out.is_dir():
        raise InputError(f"--out {out}: expected the name of a file that ends in .geojson, which QuPath knows")


def classes_of(header: CheckpointHeader) -> dict[str, RGB]:
    """Return the classes that a segmenter outlines, with their colours: the tissue class, or all its subtypes."""
    taxonomy = header.taxonomy
    if header.config.get("classes") != "subtypes":
        return {taxonomy.tissue_class: TUMOUR_COLOUR}
    red, green, blue = taxonomy.palette[1 : taxonomy.num_labels].T.tolist()
    return dict(zip(taxonomy.names, zip(red, green, blue, strict=True), strict=True))


def tumour_pieces(canvas: Canvas, rows: Span, columns: Span, threshold: float) -> Iterator[Piece]:
    """Outline tumour in one tile, see :func:`counterstain.io.outlines.pieces`; where subtypes are told, each of them.

    A pixel is of the likeliest subtype; the probability is that of tumour.
    """
    probability, subtypes = canvas.tumour()
    if subtypes is None:
        yield from pieces(probability, rows, columns, threshold)
        return
    for subtype in np.unique(subtypes[probability >= threshold]).tolist():
        for piece in pieces(np.where(subtypes == subtype, probability, 0), rows, columns, threshold):
            yield piece._replace(subtype=subtype)


def outlined(found: Sequence[Piece], classes: Mapping[str, RGB], **place: Any) -> Iterator[Outlined]:
    """Join the pieces of each class into areas; ``place`` as for :func:`counterstain.io.outlines.on_slide`."""
    for number, label in enumerate(classes, start=1):
        yield from on_slide(join([piece for piece in found if max(piece.subtype, 1) == number]), label=label, **place)


def write_areas(
    path: Path,
    areas: Iterable[Outlined],
    config: PredictConfig,
    about: dict[str, Any],
    classes: Mapping[str, RGB],
    *,
    offset_xy_level0_px: tuple[int, int] = (0, 0),
) -> Prediction:
    """Write areas that are large enough; see :func:`counterstain.io.outlines.write_geojson`."""
    large = [area for area in areas if area.area_um2 >= config.min_area_um2]
    colours = {area.label: classes[area.label] for area in large}
    write_geojson(
        path,
        large,
        colours=colours,
        object_type=config.object_type,
        offset_xy_level0_px=offset_xy_level0_px,
        about=about,
    )
    return Prediction(path, len(large), sum(area.area_um2 for area in large))


def identity_of(config: PredictConfig, windows: Windows) -> dict[str, Any]:
    """Return the settings that change a prediction."""
    chosen = config.model_dump(mode="json", include={"threshold", "min_area_um2", "object_type"})
    return chosen | windows._asdict()


# Slides: where tumour is predicted, and tile by tile


class Tissue(NamedTuple):
    """Where a slide shows tissue."""

    mask: np.ndarray  # (H, W) bool
    x_level0_px: int
    y_level0_px: int  # its upper left corner on the canvas
    downsample: float

    @classmethod
    def of(cls, slide: Slide) -> Self:
        """Detect the tissue of a slide."""
        thumbnail = slide.thumbnail(TISSUE_PX)
        return cls(tissue_mask(thumbnail.image), *thumbnail[1:])

    def shown(self, view: SlideWindow, y_px: int, x_px: int, height_px: int, width_px: int) -> bool:
        """Whether a part of a window shows tissue, or tissue lies within one pixel of the mask."""
        y = self._slice(view.y_level0_px + y_px * view.step - self.y_level0_px, height_px * view.step)
        x = self._slice(view.x_level0_px + x_px * view.step - self.x_level0_px, width_px * view.step)
        return bool(self.mask[y, x].any())

    def _slice(self, start: float, length: float) -> slice:
        first = math.floor(start / self.downsample) - 1
        return slice(max(first, 0), max(math.ceil((start + length) / self.downsample) + 1, 0))


def predicted_boxes(slide: Slide, regions: str, config: PredictConfig) -> list[Box]:
    """Return the rectangles of an open slide in which tumour is predicted; ``regions`` as in :func:`predict_slide`.

    Raises InputError where there is no tissue, or a table has no region of this slide or one that lies off it.
    """
    extent = Box(*slide.bounds_level0_px, name="slide")
    if regions == WHOLE:
        return [extent]
    if regions != AUTO:
        return _listed(slide, Path(regions))
    tissue = Tissue.of(slide)
    edge = max(1, round(config.region_size_um / slide.mpp_level0))
    corner = (tissue.x_level0_px, tissue.y_level0_px)
    areas = [shapely.transform(p, lambda xy: xy * tissue.downsample + corner) for p in mask_polygons(tissue.mask)]
    boxes = place_boxes(areas, count=config.regions_per_slide, edge=edge, extent=extent)
    if not boxes:
        raise InputError(f"{slide.path}: no tissue found on it; give --regions whole, or a table of regions")
    return boxes


def _listed(slide: Slide, table: Path) -> list[Box]:
    name = slide_name(slide.path)
    boxes = read_region_table(table).get(name)
    if not boxes:
        raise InputError(f"{table}: no region of slide {name!r}; add a row for it, or give --regions whole")
    width, height = slide.size_level0_px
    canvas = Box(0, 0, width, height)
    for box in boxes:
        if not box.overlaps(canvas):
            raise InputError(
                f"{table}: region {box.name} of slide {name} at x {box.x}, y {box.y} lies off its "
                f"{width} x {height} px; regions are given in level-0 pixels of the whole canvas"
            )
    return boxes


def _about_slide(
    slide: Slide, header: CheckpointHeader, config: PredictConfig, windows: Windows, boxes: Sequence[Box]
) -> dict[str, Any]:
    """Return what identifies a prediction."""
    return {
        "segmenter": header.sha256,
        "slide": slide.path.name,
        "file": file_identity(slide.path),
        "size_level0_px": list(slide.size_level0_px),
        "mpp_level0": slide.mpp_level0,
        "mpp": header.mpp,
        "origin": config.origin or "bounds",
        **identity_of(config, windows),
        "regions": [[box.name, box.x, box.y, box.width, box.height] for box in boxes],
    }


def _pieces_of(
    views: Sequence[SlideWindow],
    model: Segmenter,
    tissue: Tissue | None,
    unfinished: Path,
    progress: Progress,
    *,
    windows: Windows,
    threshold: float,
) -> list[list[Piece]]:
    """Return the pieces of every view; those of finished rows of tiles come from the folder ``unfinished``."""
    shown = [partial(tissue.shown, view) if tissue else everywhere for view in views]
    by_view = [tile_rows(view, windows, has_tissue) for view, has_tissue in zip(views, shown, strict=True)]
    rows = [(number, row) for number, of_view in enumerate(by_view) for row in of_view]
    files = [unfinished / f"{number:04d}-{row.span.start:09d}.json" for number, row in rows]
    kept = [_load(file) for file in files]
    missing = [row for (_, row), of_row in zip(rows, kept, strict=True) if of_row is None]
    found: list[list[Piece]] = [[] for _ in views]
    with (
        progress("tiles", sum(len(row.columns) for _, row in rows)) as advance,
        closing(pieces_by_row(model, missing, windows=windows, threshold=threshold)) as made,
    ):
        for (number, row), file, of_row in zip(rows, files, kept, strict=True):
            if of_row is None:
                _save(file, of_row := next(made))
            found[number] += of_row
            advance(len(row.columns))
    return found


def pieces_by_row(
    segmenter: Segmenter, rows: Sequence[TileRow], *, windows: Windows, threshold: float
) -> Generator[list[Piece], None, None]:
    """Outline tumour, see :func:`counterstain.io.outlines.pieces`; yields the pieces of a row of tiles."""
    with closing(read_ahead(tiles(rows, windows), readers())) as read:
        ready = filled(segmenter, read, windows.batch_size)
        for row in rows:
            tumour = ((column, next(ready)) for column in row.columns)
            yield [piece for column, found in tumour for piece in tumour_pieces(found, row.span, column, threshold)]


def _save(file: Path, found: Sequence[Piece]) -> None:
    rows = [(shapely.to_wkb(p.polygon, hex=True), p.probability_sum, p.pixels, p.subtype) for p in found]
    write_sealed(file, {"pieces": rows})


def _load(file: Path) -> list[Piece] | None:
    """Return the pieces of a row of tiles, None where they are not known yet or the file is damaged."""
    try:
        rows = read_sealed(file)["pieces"]
    except (CounterstainError, OSError, KeyError):
        return None
    return [Piece(shapely.from_wkb(wkb), *measured) for wkb, *measured in rows]
