"""A small cohort of drawn discs and a set of its patches, for tests that need tissue but not its looks."""

from pathlib import Path

import numpy as np

from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.data.patch_set import PatchSet, PatchSetHeader, PatchSetWriter, SyntheticPatch
from counterstain.data.region_store import Region
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.taxonomy import Taxonomy

HER2 = Taxonomy.named("her2")
SPLIT = ("train", "train", "train", "val", "test")


def boxes(name: str, *drawn: tuple[int, ...], shape: tuple[int, int] = (64, 64), **known) -> Region:
    """A region of noise with boxes of (subtype, y0, x0, y1, x1); every patient has one slide."""
    instances = np.zeros(shape, np.int32)
    for i, (_, y0, x0, y1, x1) in enumerate(drawn, start=1):
        instances[y0:y1, x0:x1] = i
    image = np.random.default_rng([*name.encode(), *shape]).integers(0, 256, (*shape, 3), dtype=np.uint8)
    known = {"slide": "s1", "split": "train", "subtypes": {i: box[0] for i, box in enumerate(drawn, start=1)}} | known
    return Region(region=name, **({"patient": known["slide"]} | known), image=image, instances=instances)


def store(folder: Path, *regions: Region, mpp: float = 0.5, taxonomy: Taxonomy = HER2) -> Cohort:
    writer = CohortWriter(folder, taxonomy, mpp, {"kind": "drawn"})
    writer.add("all", regions)
    return writer.finish()


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


def draw_set(
    folder: Path,
    cohort: Cohort,
    *,
    count: int = 64,
    part: str = "train",
    size_px: int = 48,
    seen=(),
    settings=None,
    **known,
) -> PatchSet:
    """Real patches as if they were synthetic, of a generator that has ``seen`` more patients."""
    sampler = PatchSampler(cohort, part, size_px, SamplingConfig(flip=False, quarter_turns=False), seed=0)
    header = PatchSetHeader(
        method="oracle", taxonomy=HER2, size_px=size_px, mpp=cohort.mpp, count=count, seed=0, version="0",
        settings=settings or {}, cohort=cohort.fingerprint, generator="",
        patients_seen=(*cohort.patients("train"), *seen),
    )  # fmt: skip
    writer = PatchSetWriter(folder, header)
    for shard in writer.missing_shards():
        patches = [(i, sampler[i]) for i in writer.indices(shard)]
        drawn = [SyntheticPatch(index=i, patch=p, subtypes_before=p.subtypes, seed=i, **known) for i, p in patches]
        writer.write(shard, drawn)
    return writer.finish()
