"""Print how many patches a second the sampler draws on one core from regions in memory."""

import tempfile
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.data.region_store import Region
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.seeding import numpy_generator
from counterstain.taxonomy import Taxonomy


def region(number: int) -> Region:
    rng = numpy_generator(0, "region", number)
    instances = ndimage.label(ndimage.gaussian_filter(rng.normal(size=(512, 512)), 12) > 0.02)[0].astype(np.int32)
    return Region(
        region=f"r{number}",
        slide=f"s{number % 8}",
        patient=f"p{number % 8}",
        image=rng.integers(0, 256, (512, 512, 3), dtype=np.uint8),
        instances=instances,
        subtypes={i: int(rng.integers(1, 6)) for i in range(1, instances.max() + 1)},
        split="train",
    )


def cohort(folder: Path) -> Cohort:
    writer = CohortWriter(folder, taxonomy=Taxonomy.named("her2"), mpp=0.5, source={"kind": "benchmark"})
    writer.add("all", [region(i) for i in range(40)])
    return writer.finish()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        drawn = cohort(Path(folder) / "cohort")
        for position in range(len(drawn)):
            drawn.read(position)
        for size_px in (64, 128, 256):
            for jitter in (0.0, 0.05):
                sampler = PatchSampler(drawn, "train", size_px, SamplingConfig(stain_jitter=jitter), seed=0)
                start = time.process_time()
                for i in range(2000):
                    sampler[i]
                rate = 2000 / (time.process_time() - start)
                print(f"{size_px:4d} px, stain jitter {jitter:4.2f}: {rate:6.0f} patches a second of processor time")


if __name__ == "__main__":
    main()
