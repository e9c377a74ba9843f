"""What predictions on slides and on cohorts have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self, TypedDict

import shapely
from pydantic import Field

from counterstain.checkpoints import CheckpointHeader
from counterstain.config import Config
from counterstain.segmentation.geojson import DECIMALS, ObjectType, Outlined
from counterstain.segmentation.model import Segmenter
from counterstain.segmentation.outlines import Area

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
