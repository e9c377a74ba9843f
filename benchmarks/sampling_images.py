"""Print images a second of every sampler, side by side in one run, as ratios to DDIM with 200 steps.

    python benchmarks/sampling_images.py DIFFUSION [--distilled FOLDER ...] [--images 16] [--rounds 3]

Speed does not depend on how well a network is trained: without ``--distilled`` the few-step rows evaluate the given
network itself, once a step and without guidance, as a distilled one would be; their images are then of no use.
Rounds are interleaved, and the median of each sampler is taken, so that a noisy machine hurts all alike.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from counterstain.generators.diffusion_config import SamplerConfig
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.interface import DrawRequest

PLAIN = {"DDIM 200, eta 1": SamplerConfig(name="ddim", steps=200, eta=1.0)}
FAST = {
    f"{title} {steps}": SamplerConfig(name=name, steps=steps)
    for title, name in (("DPM-Solver++", "dpmsolver++"), ("UniPC", "unipc"))
    for steps in (10, 15, 20, 25)
}
FEW = {
    f"few-step {steps} (weights not distilled)": SamplerConfig(name="dpmsolver++", steps=steps) for steps in (1, 2, 4)
}


def variants(arguments: argparse.Namespace) -> dict[str, DiffusionGenerator]:
    model = DiffusionGenerator.load(arguments.checkpoint).model
    batch = {"compute_batch": arguments.images}
    found = {
        name: DiffusionGenerator(model, sampler=sampler.model_copy(update=batch))
        for name, sampler in (PLAIN | FAST | FEW).items()
    }
    if model.config.condition_dropout:
        guided = {"guidance": 1.5} | batch
        for name in ("DPM-Solver++ 10", "DPM-Solver++ 20"):
            sampler = FAST[name].model_copy(update=guided)
            found[f"{name}, guidance"] = DiffusionGenerator(model, sampler=sampler)
    for folder in arguments.distilled:
        generator = DiffusionGenerator.load(folder)
        generator.draw_with(generator.sampler.model_copy(update=batch), generator.inpainting, generator.windows)
        found[f"few-step {generator.sampler.steps} ({folder.name})"] = generator
    return found


def seconds(generator: DiffusionGenerator, masks: np.ndarray) -> float:
    start = time.perf_counter()
    generator.draw([DrawRequest(mask=mask, seed=seed) for seed, mask in enumerate(masks)])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--distilled", type=Path, nargs="*", default=[])
    parser.add_argument("--images", type=int, default=16, help="drawn at once")
    parser.add_argument("--size-px", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    generators = variants(arguments)
    num_labels = next(iter(generators.values())).model.num_labels
    size = (arguments.images, arguments.size_px // 8, arguments.size_px // 8)
    masks = np.random.default_rng(0).integers(0, num_labels, size, dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    for generator in generators.values():
        if generator.sampler.steps <= 25:
            seconds(generator, masks)
    rounds = [{name: seconds(g, masks) for name, g in generators.items()} for _ in range(arguments.rounds)]
    median = {name: statistics.median(times[name] for times in rounds) for name in generators}
    reference = median["DDIM 200, eta 1"]
    print(
        f"{arguments.images} images of {arguments.size_px} px at once, median of {arguments.rounds} interleaved rounds"
    )
    for name, value in median.items():
        print(f"{name:38s} {arguments.images / value:9.2f} images/s   x {reference / value:6.1f}")


if __name__ == "__main__":
    main()
