"""Procedural HER2 tissue with exact masks: the cohort that anybody can make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage

from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.data.patches import label_mask
from counterstain.data.phantom.canvas import Canvas, Stains, white_noise
from counterstain.data.phantom.nests import DUCT, draw_nests, lay_out
from counterstain.data.phantom.styles import PhantomConfig, SlideStyle, patient_name, slide_name, slide_style
from counterstain.data.phantom.surroundings import (
    FOCUS_LOSS_UM,
    draw_artefacts,
    draw_benign,
    draw_fibres,
    draw_stroma_cells,
    focus_loss,
)
from counterstain.data.region_store import Region
from counterstain.errors import InputError
from counterstain.seeding import derive
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy

SCORE_NAMES = ("0", "1+", "2+", "3+")
REGION_STEP_PX = 4096  # regions lie so far apart on their slide


def _photograph(canvas: Canvas, stains: Stains) -> np.ndarray:
    """Return the picture of stained tissue, (H, W, 3) uint8: light through the dyes, optics, veil and camera.

    The optical density (to base 10) of a channel is the sum over dyes of amount times vector (Ruifrok & Johnston 2001).
    """
    style, rng = canvas.style, canvas.rng("camera")
    dyes = np.array([style.haematoxylin_vector, style.dab_vector], np.float32) * np.float32(-np.log(10))
    counter = stains.haematoxylin * np.float32(style.haematoxylin_strength)
    density = dyes[0, :, None, None] * counter + dyes[1, :, None, None] * stains.dab  # (3, H, W), as all below
    light = np.exp(density) * np.array(style.glass, np.float32)[:, None, None]
    sharp_px, blurred_px = float(np.hypot(style.blur_um / canvas.mpp, 0.35)), FOCUS_LOSS_UM / canvas.mpp
    light = ndimage.gaussian_filter(light, (0, sharp_px, sharp_px), truncate=3.0)
    out_of_focus = focus_loss(canvas)
    if out_of_focus is not None:
        blurred = ndimage.gaussian_filter(light, (0, blurred_px, blurred_px), truncate=2.5)
        light = light + out_of_focus * (blurred - light)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = (np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in canvas.shape)
    slope = np.float32(np.sin(angle)) * y[:, None] + np.float32(np.cos(angle)) * x
    light = (light * (1 - style.haze) + 0.93 * style.haze) * (1 + np.float32(style.illumination) * slope)
    noise = white_noise(rng, light.shape) + white_noise(rng, light.shape)
    light += style.noise * np.sqrt(0.5) * (0.4 + 0.6 * light) * noise
    picture = np.minimum(np.maximum(np.rint(light * 255), 0), 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(picture, 0, -1))


def render(label_mask: np.ndarray, instances: np.ndarray, style: SlideStyle, seed: int, *, mpp: float) -> np.ndarray:
    """Draw tissue, (H, W, 3) uint8, for a mask, which may be relabelled, cropped or not drawn by the phantom at all.

    ``label_mask`` (H, W) holds 0 = background, 1..4 = HER2 0..3+, 5 = LCIS/DCIS; 255 (ignore) is drawn as background.
    Nests of the same id in ``instances`` (H, W) share the hidden score of a duct; all sizes follow from ``mpp``. The
    picture depends on the arguments alone. Relabelled instances keep their cells where they are; only the stain
    changes, and the inside of what is or was a duct.

    Raises InputError where the arrays differ in shape or contain a label that the phantom cannot draw.
    """
    if label_mask.shape != instances.shape or label_mask.ndim != 2:
        raise InputError(f"label mask of shape {label_mask.shape}, instances of {instances.shape}: expected one (H, W)")
    labels = np.where(label_mask == IGNORE, BACKGROUND, label_mask)
    if labels.size == 0 or labels.min() < BACKGROUND or labels.max() > DUCT:
        raise InputError(
            f"label mask: found labels {np.unique(labels).tolist()}; the phantom draws 0..{DUCT} of the taxonomy her2"
        )
    canvas = Canvas(labels=labels.astype(np.uint8), instances=instances, style=style, seed=seed, mpp=mpp)
    stains, across_um = draw_fibres(canvas)
    free = draw_benign(canvas, stains)
    free &= draw_nests(canvas, stains)
    draw_stroma_cells(canvas, stains, across_um, free)
    draw_artefacts(canvas, stains)
    return _photograph(canvas, stains)


def regions_of_slide(config: PhantomConfig, slide_index: int) -> list[Region]:
    """Draw the regions of a slide; they follow from the configuration and the number of the slide alone."""
    style = slide_style(config, slide_index)
    regions = []
    for number in range(config.regions_per_slide):
        seed = derive(config.seed, "region", slide_index, number)
        instances, subtypes = lay_out((config.size_px, config.size_px), style, seed, config.mpp)
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


def write_phantom(config: PhantomConfig, out: str | Path, progress: Callable[[], None] | None = None) -> Cohort:
    """Write a phantom as a cohort; finished slides are kept when it is interrupted and run again.

    ``progress`` is called after every slide. Raises MismatchError where the folder holds something else, and
    StorageError where the disk is full.
    """
    source = {"kind": "phantom", "config": config.model_dump(mode="json")}
    writer = CohortWriter(out, taxonomy=Taxonomy.named("her2"), mpp=config.mpp, source=source)
    for index in range(config.slides):
        if not writer.finished and not writer.has(slide_name(index)):
            writer.add(slide_name(index), regions_of_slide(config, index))
        if progress:
            progress()
    return writer.finish(config.slides * config.regions_per_slide)
