"""Print the peak memory of the first and of the second thousand patches of a synthetic set: it should be flat.

python benchmarks/memory_of_synthesis.py COHORT CHECKPOINT [STEPS]; Linux, which can set the peak back.
"""

import sys
import tempfile
from pathlib import Path

from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import SHARD_PATCHES
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.synthesis.masks import SynthesisConfig
from counterstain.synthesis.synthesize import synthesize

SHARDS = 16  # 1,024 patches


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kib = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    return int(kib) / 1024


def main() -> None:
    cohort = Cohort.open(sys.argv[1])
    generator = DiffusionGenerator.load(Path(sys.argv[2]))
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else generator.sampler.steps
    generator.draw_with(generator.sampler.model_copy(update={"steps": steps}), generator.inpainting, generator.windows)
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for first in (0, SHARDS):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak back
            synthesize(
                generator,
                cohort,
                Path(folder),
                SynthesisConfig(),
                count=2 * SHARDS * SHARD_PATCHES,
                size_px=generator.trained_px,
                seed=0,
                shards=range(first, first + SHARDS),
            )
            peaks.append(peak_mib())
            print(f"patches {first * SHARD_PATCHES} and following: peak {peaks[-1]:.1f} MiB", flush=True)
    print(f"second over first: {peaks[1] / peaks[0]:.4f}")


if __name__ == "__main__":
    main()
