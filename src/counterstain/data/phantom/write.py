"""A phantom as a cohort: regions of slides, written slide by slide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from counterstain.data.cohort import Cohort, CohortWriter, Region
from counterstain.data.patches import label_mask
from counterstain.data.phantom.layout import lay_out
from counterstain.data.phantom.render import render
from counterstain.data.phantom.styles import PhantomConfig, patient_name, slide_name, slide_style
from counterstain.seeding import derive
from counterstain.taxonomy import Taxonomy

SCORE_NAMES = ("0", "1+", "2+", "3+")
REGION_STEP_PX = 4096  # regions lie so far apart on their slide


def regions_of_slide(config: PhantomConfig, slide_index: int) -> list[Region]:
    """Draw the regions of a slide; they follow from the configuration and the number of the slide alone."""
    style = slide_style(config, slide_index)
    shape = (config.size_px, config.size_px)
    regions = []
    for number in range(config.regions_per_slide):
        seed = derive(config.seed, "region", slide_index, number)
        instances, subtypes = lay_out(shape, style, seed, config.mpp)
        image = render(label_mask(instances, subtypes), instances, style, seed, mpp=config.mpp)
        regions.append(
            Region(
                region=f"{slide_name(slide_index)}-r{number:02d}",
                slide=slide_name(slide_index),
                patient=patient_name(config.seed, slide_index),
                image=image,
                instances=instances,
                subtypes=subtypes,
                score=SCORE_NAMES[style.dominant_score],
                mpp_level0=config.mpp,
                origin_xy_level0_px=(number * max(REGION_STEP_PX, config.size_px), 0),
            )
        )
    return regions


def write_phantom(config: PhantomConfig, out: Path, progress: Callable[[], None] | None = None) -> Cohort:
    """Write a phantom as a cohort; finished slides are kept when it is interrupted and run again.

    Parameters
    ----------
    config : PhantomConfig
    out : Path
        Folder of the cohort.
    progress : callable, optional
        Called after every slide.

    Raises
    ------
    MismatchError
        The folder holds something else.
    StorageError
        The disk is full.
    """
    source = {"kind": "phantom", "config": config.model_dump(mode="json")}
    writer = CohortWriter(out, taxonomy=Taxonomy.named("her2"), mpp=config.mpp, source=source)
    for index in range(config.slides):
        if not writer.finished and not writer.has(slide_name(index)):
            writer.add(slide_name(index), regions_of_slide(config, index))
        if progress:
            progress()
    return writer.finish()
