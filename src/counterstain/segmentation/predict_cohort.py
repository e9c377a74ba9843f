"""Outline tumour in the regions of a cohort with a trained segmenter: a GeoJSON file for each slide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from counterstain.checkpoints import CheckpointHeader
from counterstain.data.cohort import Cohort
from counterstain.data.export.contents import file_names
from counterstain.data.regions import Box
from counterstain.errors import InputError, MismatchError
from counterstain.segmentation.evaluate import choose_device
from counterstain.segmentation.geojson import Outlined, write_geojson
from counterstain.segmentation.inference import predict_each
from counterstain.segmentation.model import Segmenter, load_segmenter
from counterstain.segmentation.outlines import join, pieces
from counterstain.segmentation.predict import PredictConfig, Prediction, Progress, Windows, on_slide, silent, summary
from counterstain.segmentation.tiling import Span
from counterstain.storage import claim, fingerprint


def predict_cohort(
    folder: Path,
    cohort: Cohort,
    out: Path,
    config: PredictConfig,
    *,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[Prediction]:
    """Outline tumour in all regions of a cohort.

    Probabilities are those of :func:`counterstain.segmentation.evaluate.evaluate`. Coordinates are level-0 pixels of
    the slide's canvas. A slide whose regions overlap, such as images that were cut out without their place, has a
    file for each region.

    Parameters
    ----------
    folder : Path
        Checkpoint of a segmenter.
    cohort : Cohort
    out : Path
        Folder; files in it that are finished are kept.
    config : PredictConfig
    device : ``auto``, ``cpu`` or ``cuda``
    progress : callable, optional
        As :func:`counterstain.progress.bar`.

    Raises
    ------
    InputError
        There is no such segmenter, or coordinates are to count from the scanned area.
    MismatchError
        The cohort has another resolution, or ``out`` holds something else.
    """
    if config.origin == "bounds":
        raise InputError(
            f"{cohort.folder}: a cohort does not know where its slides were scanned; give --origin canvas, "
            "or predict on the slide itself"
        )
    segmenter, header = load_segmenter(folder)
    _check_mpp(folder, header, cohort)
    windows = Windows.of(segmenter, header)
    about: dict[str, Any] = {
        "segmenter": header.sha256,
        "cohort": fingerprint(cohort.regions.drop(columns="split").astype(str).to_dict("records")),
        "mpp": cohort.mpp,
        **config.model_dump(mode="json", include={"threshold", "min_area_um2", "object_type"}),
        **windows._asdict(),
    }
    claim(out, "predict", about)
    segmenter.to(choose_device(device))
    written = []
    with (progress or silent)("regions", len(cohort)) as advance:
        for name, positions in _files(cohort).items():
            path = out / f"{name}.geojson"
            if path.exists():
                written.append(Prediction(path, None, None))
            else:
                found = _outline(segmenter, cohort, positions, windows, config)
                write_geojson(
                    path,
                    found,
                    label=header.taxonomy.tissue_class,
                    object_type=config.object_type,
                    offset_xy_level0_px=(0, 0),
                    about={"file": name, "origin": "canvas", **about},
                )
                written.append(summary(path, found))
            advance(len(positions))
    return written


def _check_mpp(folder: Path, header: CheckpointHeader, cohort: Cohort) -> None:
    if not cohort.is_at(header.mpp):
        raise MismatchError(
            f"{folder}: was trained at {header.mpp:g} um/px, {cohort.folder} is at {cohort.mpp:g} um/px; "
            f"import the cohort at {header.mpp:g} um/px"
        )


def _outline(
    segmenter: Segmenter, cohort: Cohort, positions: Sequence[int], windows: Windows, config: PredictConfig
) -> list[Outlined]:
    images = (cohort.read(position)[0] for position in positions)
    areas: list[Outlined] = []
    for position, probability in zip(positions, predict_each(segmenter, images, **windows.as_options()), strict=True):
        areas += _areas(cohort, position, probability, config)
    return areas


def _areas(cohort: Cohort, position: int, probability: np.ndarray, config: PredictConfig) -> list[Outlined]:
    """Return the areas of one region on its slide."""
    region = cohort.regions.iloc[position]
    rows, columns = (Span(0, length, 0, length) for length in probability.shape)
    outlined = on_slide(
        join(list(pieces(probability, rows, columns, config.threshold))),
        corner_xy_level0_px=(int(region["x_level0_px"]), int(region["y_level0_px"])),
        mpp=cohort.mpp,
        mpp_level0=_mpp_level0(cohort, position),
        region=str(region["region"]),
    )
    return [area for area in outlined if area.area_um2 >= config.min_area_um2]


def _mpp_level0(cohort: Cohort, position: int) -> float:
    """Return the slide's resolution; where it is not known, the region's is that of level 0."""
    known = cohort.regions["mpp_level0"].iloc[position]
    return float(known) if known is not None and known > 0 else cohort.mpp


def _files(cohort: Cohort) -> dict[str, list[int]]:
    """Return the regions of every file."""
    groups: dict[str, list[int]] = {}
    for slide, found in cohort.regions.groupby("slide", sort=True).indices.items():
        positions: list[int] = np.asarray(found).tolist()
        if _overlap([_box(cohort, position) for position in positions]):
            groups |= {str(cohort.regions["region"].iloc[position]): [position] for position in positions}
        else:
            groups[str(slide)] = positions
    return dict(zip(file_names(list(groups)), groups.values(), strict=True))


def _box(cohort: Cohort, position: int) -> Box:
    region, step = cohort.regions.iloc[position], cohort.mpp / _mpp_level0(cohort, position)
    width, height = (max(1, round(int(region[side]) * step)) for side in ("width_px", "height_px"))
    return Box(
        name=str(region["region"]), x=int(region["x_level0_px"]), y=int(region["y_level0_px"]),
        width=width, height=height,
    )  # fmt: skip


def _overlap(boxes: Sequence[Box]) -> bool:
    return any(box.overlaps(other) for number, box in enumerate(boxes) for other in boxes[:number])
