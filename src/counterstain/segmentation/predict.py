"""Outline tumour in the regions of a cohort with a trained segmenter: a GeoJSON file for each slide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypedDict

import numpy as np
import shapely
from pydantic import Field

from counterstain.checkpoints import CheckpointHeader
from counterstain.config import Config
from counterstain.data.cohort import Cohort
from counterstain.devices import choose_device
from counterstain.errors import InputError, MismatchError
from counterstain.io.export_contents import file_names
from counterstain.io.regions import Box
from counterstain.segmentation.inference import Span, predict_each
from counterstain.segmentation.model import Segmenter, load_segmenter
from counterstain.segmentation.outlines import DECIMALS, Area, ObjectType, Outlined, join, pieces, write_geojson
from counterstain.storage import claim, fingerprint

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class PredictConfig(Config):
    """How tumour is outlined."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Probability from which a pixel is tumour."""
    min_area_um2: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Smaller areas are left out, in square micrometres."""
    object_type: ObjectType = "annotation"
    """What QuPath is to make of them: annotations can be edited, detections are light."""
    origin: Literal["bounds", "canvas"] | None = None
    """Coordinates count from the corner of the scanned area, as QuPath's, or of the whole canvas; None = bounds for a
    slide, canvas for a cohort, which does not know where its slides were scanned."""
    regions_per_slide: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Regions placed on tissue: how many at most."""
    region_size_um: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1500.0
    """Regions placed on tissue: edge in micrometres."""


class Prediction(NamedTuple):
    """What was written."""

    path: Path
    areas: int | None
    """Outlined areas; None where the file was there already."""
    area_um2: float | None
    """Their area in all."""


class WindowOptions(TypedDict):
    """Options of :func:`counterstain.segmentation.inference.predict_each`."""

    size_px: int
    overlap_px: int
    batch_size: int


class Windows(NamedTuple):
    """How images are cut into windows."""

    size_px: int
    overlap_px: int
    batch_size: int

    @classmethod
    def of(cls, segmenter: Segmenter, header: CheckpointHeader) -> Self:
        """Return what a segmenter was configured with."""
        chosen = segmenter.config.inference
        return cls(*chosen.edges(header.size_px), chosen.batch_size)

    def as_options(self) -> WindowOptions:
        """Return them by name."""
        return {"size_px": self.size_px, "overlap_px": self.overlap_px, "batch_size": self.batch_size}


def on_slide(
    areas: Sequence[Area], *, corner_xy_level0_px: tuple[float, float], mpp: float, mpp_level0: float, region: str
) -> Iterator[Outlined]:
    """Move areas from the pixels of a region to those of its slide, as exactly as they will be written.

    What is too small to be written has no area any more and is left out.
    """
    for area in areas:
        moved = shapely.transform(area.polygon, lambda xy: xy * (mpp / mpp_level0) + corner_xy_level0_px)
        for part in shapely.get_parts(shapely.set_precision(moved, 10.0**-DECIMALS)):
            if part.area > 0:
                yield Outlined(part, area.mean_probability, part.area * mpp_level0**2, region)


def summary(path: Path, areas: Sequence[Outlined]) -> Prediction:
    """Return how many areas were written, and how large they are."""
    return Prediction(path, len(areas), sum(area.area_um2 for area in areas))


@contextmanager
def silent(_label: str, _total: int) -> Iterator[Callable[[int], None]]:
    """Show no progress."""
    yield lambda _steps: None


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
