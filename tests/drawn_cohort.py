"""A small cohort of drawn discs, for tests that need tissue but not its looks."""

from pathlib import Path

import numpy as np

from counterstain.data.cohort import Cohort, CohortWriter, Region
from counterstain.taxonomy import Taxonomy

HER2 = Taxonomy.named("her2")
SPLIT = ("train", "train", "train", "val", "test")


def draw_region(rng: np.random.Generator, name: str, patient: str, size_px: int = 96) -> Region:
    """Nine discs on bright ground; the darker, the higher the subtype."""
    y, x = np.mgrid[:size_px, :size_px]
    instances = np.zeros((size_px, size_px), np.int32)
    subtypes = {i: int(rng.integers(1, 6)) for i in range(1, 10)}
    step = size_px // 3
    for i in subtypes:
        row, column = divmod(i - 1, 3)
        inside = (y - row * step - step // 2) ** 2 + (x - column * step - step // 2) ** 2 < (step // 2.6) ** 2
        instances[inside] = i
    shade = np.array([230, *(200 - 30 * subtypes[i] for i in subtypes)])[instances]
    image = np.clip(shade[..., None] + rng.integers(-15, 16, (size_px, size_px, 3)), 0, 255).astype(np.uint8)
    return Region(region=name, slide=patient, patient=patient, image=image, instances=instances, subtypes=subtypes)


def draw_cohort(folder: Path, *, regions: int = 2, size_px: int = 96) -> Cohort:
    """Five patients: three to train, one each to validate and test."""
    rng = np.random.default_rng(0)
    writer = CohortWriter(folder, HER2, 0.5, {"kind": "drawn"})
    patients = [f"p{i}" for i in range(len(SPLIT))]
    for patient in patients:
        writer.add(patient, [draw_region(rng, f"{patient}-{i}", patient, size_px) for i in range(regions)])
    return writer.finish().write_split(dict(zip(patients, SPLIT, strict=True)))
