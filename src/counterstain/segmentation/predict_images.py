"""Predict tumour in the regions of a cohort and in ordinary images, as outlines for QuPath.

Images are read whole, one at a time; windows of several share the batches of the network.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import shapely

from counterstain.checkpoints import CheckpointHeader, read_header
from counterstain.data.cohort import Cohort
from counterstain.devices import choose_device, fast_arithmetic, place
from counterstain.errors import InputError
from counterstain.io.export_contents import file_names
from counterstain.io.export_viewers import (
    OUTLINES,
    PREDICTIONS,
    Labels,
    ProjectImage,
    write_ome_tiff,
    write_project,
    write_store,
)
from counterstain.io.outlines import RGB, Outlined, Span, is_written, read_areas
from counterstain.io.pixel_readers import read_image
from counterstain.io.regions import InstanceWindow
from counterstain.io.slides import IMAGE_SUFFIXES, SUFFIXES, Box, Slide, list_slides
from counterstain.progress import Progress, silent
from counterstain.segmentation.evaluate import require_mpp
from counterstain.segmentation.inference import Canvas, filled, read_ahead
from counterstain.segmentation.model import Segmenter, load_segmenter
from counterstain.segmentation.predict import (
    GEOJSON,
    WHOLE,
    PredictConfig,
    Prediction,
    check_name,
    classes_of,
    identity_of,
    outlined,
    predict_slide,
    tumour_pieces,
    write_areas,
)
from counterstain.storage import claim, file_identity, fingerprint

FileFormat = Literal["geojson", "qupath", "ome-zarr"]
FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)
PREDICTED = (*SUFFIXES, *IMAGE_SUFFIXES)


class _Image(NamedTuple):
    """A region of a cohort, or an ordinary image."""

    name: str
    read: Callable[[], np.ndarray]  # (H, W, 3) uint8, at the segmenter's resolution
    corner_xy_level0_px: tuple[int, int]
    mpp: float
    mpp_level0: float


class _File(NamedTuple):
    """A file of outlines to be written."""

    path: Path
    about: dict[str, Any]  # how its areas are made
    images: Sequence[_Image]


def predict_cohort(
    segmenter: str | Path,
    cohort: Cohort,
    out: str | Path,
    config: PredictConfig | None = None,
    *,
    file_format: FileFormat = "geojson",
    device: str = "auto",
    progress: Progress = silent,
) -> list[Prediction]:
    """Outline tumour in all regions of a cohort, with the probabilities of :func:`counterstain.evaluate`.

    ``out`` is a folder of a GeoJSON file per slide; finished files are kept. Coordinates are level-0 pixels of the
    slide's canvas. A slide whose regions overlap, such as images that were cut out without their position, gets a file
    per region. With ``ome-zarr``, there is an OME-Zarr store for every region beside the folder ``outlines``.

    Raises InputError where there is no such segmenter, or coordinates from the scanned area are requested;
    MismatchError where the cohort has another resolution, or ``out`` contains something else.
    """
    out, config = Path(out), config or PredictConfig()
    if config.origin == "bounds":
        raise InputError(
            f"{cohort.folder}: a cohort does not know where its slides were scanned; give --origin canvas, "
            "or predict on the slide itself"
        )
    if file_format == "qupath":
        raise InputError(
            f"{cohort.folder}: a cohort has no images for QuPath; run 'counterstain export {cohort.folder} --format "
            "qupath --out PROJECT', then 'counterstain predict SEGMENTER PROJECT/images --out PROJECT/predictions'"
        )
    model, header = load_segmenter(segmenter)
    require_mpp(Path(segmenter), header, cohort)
    windows = model.config.inference.windows(header.size_px)
    known = cohort.regions.drop(columns="split").astype(str).to_dict("records")
    about = {
        "segmenter": header.sha256, "cohort": fingerprint(known), "mpp": cohort.mpp, **identity_of(config, windows),
    }  # fmt: skip
    claim(out, "predict", about)
    folder, groups = out / OUTLINES if file_format == "ome-zarr" else out, files_of(cohort)
    files = [
        _File(
            folder / f"{name}.geojson",
            {"file": name, "origin": "canvas", **about},
            [_region(cohort, position) for position in positions],
        )
        for name, positions in groups.items()
    ]
    found = _predict(model, header, files, config, device=device, progress=progress, label="regions")
    if file_format == "ome-zarr":
        for file, positions in zip(files, groups.values(), strict=True):
            _write_regions(out, cohort, positions, read_areas(file.path), classes_of(header))
    return found


def _write_regions(
    out: Path, cohort: Cohort, positions: Sequence[int], areas: Sequence[Outlined], classes: Mapping[str, RGB]
) -> None:
    names = file_names(cohort.regions["region"].tolist())
    for position in positions:
        store, box = out / f"{names[position]}.ome.zarr", _box(cohort, position)
        if not store.exists():
            image, _ = cohort.read(position)
            shown = [area for area in areas if area.metadata["region"] == box.name]
            step = cohort.mpp / mpp_level0_of(cohort, position)
            labels = predicted_labels(shown, classes, (box.x, box.y), step, image.shape)
            write_store(store, image, [labels], name=names[position], mpp=cohort.mpp)


def predict_files(
    segmenter: str | Path,
    source: str | Path,
    out: str | Path,
    config: PredictConfig | None = None,
    *,
    file_format: FileFormat = "geojson",
    regions: str | Path = WHOLE,
    mpp_level0: float | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> list[Prediction]:
    """Outline tumour on a slide or an image, or on all of a folder.

    ``out`` is a GeoJSON file, of a folder the folder of one file each. With ``qupath`` it is a QuPath project with the
    slides where they are and copies of ordinary images, with ``ome-zarr`` a folder of an OME-Zarr store for each, at
    the segmenter's resolution; both hold the GeoJSON files too. See :func:`predict_images` for ordinary images,
    :func:`counterstain.segmentation.predict.predict_slide` for everything else, and for ``regions``.

    Raises InputError also where there is no slide or image in a folder, or ``out`` is named like a file.
    """
    source, out, config = Path(source), Path(out), config or PredictConfig()
    slides = {out: source}
    if source.is_dir() or file_format != "geojson":
        if out.suffix in GEOJSON:
            raise InputError(f"--out {out}: here it is a folder, with a file for each image; give it another name")
        if file_format == "qupath" and config.origin == "canvas":
            raise InputError(f"{out}: QuPath counts from the corner of the scanned area; leave out --origin canvas")
        folder = {"geojson": out, "qupath": out / PREDICTIONS, "ome-zarr": out / OUTLINES}[file_format]
        slides = {folder / f"{name}.geojson": path for name, path in list_slides(source, PREDICTED).items()}
        header = read_header(Path(segmenter))
        _check_slides(slides.values(), mpp_level0)
        claim(out, "predict", {"segmenter": header.sha256, "format": file_format, **config.model_dump(mode="json")})
    where: dict[str, Any] = {"mpp_level0": mpp_level0, "device": device, "progress": progress}
    images = {file: path for file, path in slides.items() if path.suffix.lower() in IMAGE_SUFFIXES}
    if images and regions != WHOLE:
        raise InputError(f"{next(iter(images.values()))}: --regions is for slides; all of an image is predicted")
    found = predict_images(segmenter, images, config, **where) if images else []
    for file in (file for file in slides if file not in images):
        found.append(predict_slide(segmenter, slides[file], file, config, regions=regions, **where))
    if file_format == "qupath":
        _write_project(out, slides, mpp_level0, classes_of(header))
    elif file_format == "ome-zarr":
        for file, path in slides.items():
            _write_store(out, file, path, config, classes_of(header), mpp=header.mpp, mpp_level0=mpp_level0)
    return sorted(found)


def _check_slides(paths: Iterable[Path], mpp_level0: float | None) -> None:
    """Raise InputError, before anything is written, where a slide or the first of the images cannot be read."""
    images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    with warnings.catch_warnings(action="ignore"):  # each is said when the slide is read
        for path in (path for path in paths if path not in images[1:]):
            Slide.open(path, mpp_level0).close()


def _write_project(out: Path, slides: Mapping[Path, Path], mpp: float | None, classes: Mapping[str, RGB]) -> None:
    images = []
    for file, path in slides.items():
        copied = out / "images" / f"{file.stem}.ome.tif"
        ordinary = path.suffix.lower() in IMAGE_SUFFIXES
        if ordinary and not copied.exists():
            write_ome_tiff(copied, read_image(path), mpp or 1.0)
        images.append(ProjectImage(file.stem, copied if ordinary else path))
    write_project(out, images, classes)


def _write_store(
    out: Path, outlines: Path, path: Path, config: PredictConfig, classes: Mapping[str, RGB], **mpp: float | None
) -> None:
    """Write the store of a slide or an image; ``mpp`` are that of the segmenter, and mpp_level0."""
    store = out / f"{outlines.stem}.ome.zarr"
    if store.exists():
        return
    with Slide.open(path, mpp["mpp_level0"], given_by="") as opened:
        extent, spacing = Box(*opened.bounds_level0_px), mpp["mpp"] or opened.mpp_level0
        corner = (extent.x, extent.y) if config.origin == "canvas" else (0, 0)
        window = opened.window(extent, spacing)
        drawn = predicted_labels(read_areas(outlines), classes, corner, spacing / opened.mpp_level0, window.shape)
        write_store(store, window, [drawn], name=outlines.stem, mpp=spacing)


def predicted_labels(
    areas: Sequence[Outlined],
    classes: Mapping[str, RGB],
    corner_xy_level0_px: tuple[int, int],
    step: float,
    shape: Sequence[int],
) -> Labels:
    """Paint areas, numbered from 1 on, into an image of ``shape`` H, W, ``step`` level-0 pixels per pixel."""
    moved = [shapely.transform(a.polygon, lambda xy: (xy - corner_xy_level0_px) / step) for a in areas]
    painted = InstanceWindow(list(enumerate(moved, start=1)), (shape[0], shape[1]))
    known = {
        number: {"class": a.label, "mean probability": a.mean_probability, "area_um2": a.area_um2}
        for number, a in enumerate(areas, start=1)
    }
    colours = {number: classes[area.label] for number, area in enumerate(areas, start=1)}
    return Labels("prediction", painted, "int32", known, colours)


def predict_images(
    segmenter: str | Path,
    images: Mapping[Path, Path],
    config: PredictConfig | None = None,
    *,
    mpp_level0: float | None,
    device: str = "auto",
    progress: Progress = silent,
) -> list[Prediction]:
    """Outline tumour in ordinary images (PNG, JPEG, ...), all of it, also where nothing but glass is seen.

    ``images`` is GeoJSON file -> image; finished files are kept. ``mpp_level0`` is the micrometres per pixel of all
    images, which are predicted at the resolution that the segmenter was trained at.

    Raises InputError where there is no such segmenter or image, or ``mpp_level0`` is missing or no microscope's;
    MismatchError where a file contains something else.
    """
    config = config or PredictConfig()
    for path in images:
        check_name(path)
    with Slide.open(next(iter(images.values())), mpp_level0) as first:
        mpp = first.mpp_level0
    model, header = load_segmenter(segmenter)
    about = identity_of(config, model.config.inference.windows(header.size_px))
    files = [
        _File(
            path,
            {
                "segmenter": header.sha256, "image": image.name, "file": file_identity(image), "mpp": header.mpp,
                "mpp_level0": mpp, **about,
            },
            [_Image(image.name, partial(_read, image, header.mpp, mpp), (0, 0), header.mpp, mpp)],
        )
        for path, image in images.items()
    ]  # fmt: skip
    return _predict(model, header, files, config, device=device, progress=progress, label="images")


def _predict(
    model: Segmenter,
    header: CheckpointHeader,
    files: Sequence[_File],
    config: PredictConfig,
    *,
    device: str,
    progress: Progress,
    label: str,
) -> list[Prediction]:
    """Write the files that are not there yet."""
    where, written = choose_device(device), list[Prediction]()
    missing = {file.path for file in files if not is_written(file.path, file.about)}
    images = read_ahead(image.read for file in files if file.path in missing for image in file.images)
    windows = model.config.inference.windows(header.size_px)
    canvases = filled(place(model, where), (Canvas(image, windows) for image in images), windows.batch_size)
    classes = classes_of(header)
    with fast_arithmetic(where), progress(label, sum(len(file.images) for file in files)) as advance:
        for file in files:
            if file.path in missing:
                tumour = ((image, next(canvases)) for image in file.images)
                areas = [area for found in tumour for area in _areas(*found, config.threshold, classes)]
                written.append(write_areas(file.path, areas, config, file.about, classes))
            else:
                written.append(Prediction(file.path, None, None))
            advance(len(file.images))
    return written


def _areas(image: _Image, canvas: Canvas, threshold: float, classes: Mapping[str, RGB]) -> Iterator[Outlined]:
    """Return the areas of one image on its slide."""
    rows, columns = (Span(0, length, 0, length) for length in canvas.shape)
    found = list(tumour_pieces(canvas, rows, columns, threshold))
    corner, mpp = image.corner_xy_level0_px, {"mpp": image.mpp, "mpp_level0": image.mpp_level0}
    return outlined(found, classes, corner_xy_level0_px=corner, **mpp, region=image.name)


def _read(path: Path, mpp: float, mpp_level0: float) -> np.ndarray:
    with Slide.open(path, mpp_level0) as opened:
        window = opened.window(Box(*opened.bounds_level0_px), mpp)
        return np.ascontiguousarray(window.read(0, 0, *window.shape[:2]))


# Cohorts: the regions of every file, and their place on the slide


def files_of(cohort: Cohort) -> dict[str, list[int]]:
    """Return the positions of the regions of every file, by name."""
    groups: dict[str, list[int]] = {}
    for slide, found in cohort.regions.groupby("slide", sort=True).indices.items():
        positions: list[int] = np.asarray(found).tolist()
        boxes = [_box(cohort, position) for position in positions]
        if any(box.overlaps(other) for number, box in enumerate(boxes) for other in boxes[:number]):
            groups |= {str(cohort.regions["region"].iloc[position]): [position] for position in positions}
        else:
            groups[str(slide)] = positions
    return dict(zip(file_names(list(groups)), groups.values(), strict=True))


def _region(cohort: Cohort, position: int) -> _Image:
    box = _box(cohort, position)
    return _Image(
        box.name, lambda: cohort.read(position)[0], (box.x, box.y), cohort.mpp, mpp_level0_of(cohort, position)
    )


def _box(cohort: Cohort, position: int) -> Box:
    region, step = cohort.regions.iloc[position], cohort.mpp / mpp_level0_of(cohort, position)
    width, height = (max(1, round(int(region[side]) * step)) for side in ("width_px", "height_px"))
    x, y = int(region["x_level0_px"]), int(region["y_level0_px"])
    return Box(name=str(region["region"]), x=x, y=y, width=width, height=height)


def mpp_level0_of(cohort: Cohort, position: int) -> float:
    """Return the slide's resolution; if unknown, the region's own, as if it were at level 0."""
    known = cohort.regions["mpp_level0"].iloc[position]
    return float(known) if known is not None and known > 0 else cohort.mpp
