"""Print how fast `evaluate` and `predict` are beside the bare network on as many random windows, taking turns.

    python benchmarks/inference.py [--slide-px 12000] [--region-px 3000] [--window-px 512] [--rounds 3] [--threads 1]

Makes a slide (tiled JPEG, levels, a disc of phantom tissue in glass), a cohort of phantom regions and a segmenter
(ResNet-34 U-Net, random weights, trained for a few steps so that its outlines are no noise). The windows of a region
or slide are those of one grid that show tissue; whatever is computed beyond them counts as loss. Linux alone can set
the peak of memory back.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import tifffile
import torch

from counterstain.data.cohort import Cohort
from counterstain.data.phantom import regions_of_slide, write_phantom
from counterstain.data.phantom.styles import PhantomConfig
from counterstain.io.slides import Slide
from counterstain.segmentation.evaluate import evaluate
from counterstain.segmentation.model import Segmenter, load_segmenter
from counterstain.segmentation.predict import Tissue, predict_slide
from counterstain.segmentation.predict_images import predict_cohort
from counterstain.segmentation.segmenter_config import InferenceConfig, SegmenterConfig, Windows
from counterstain.segmentation.train import train_segmenter
from counterstain.training_config import TrainingConfig

MPP_LEVEL0, MPP, TILE_PX = 0.25, 0.5, 256
GLASS = (242, 241, 244)
STROMA = np.array([0.98, 0.86, 0.92], np.float32)  # light that passes a counterstain, which the phantom lacks


def write_slide(path: Path, edge: int, tissue_share: float) -> None:
    """Write a slide with a disc of tissue, phantom side by side, and levels shrunk by 4 and 16."""
    patch = regions_of_slide(PhantomConfig(slides=1, regions_per_slide=1, size_px=min(2048, edge), mpp=MPP_LEVEL0), 0)
    repeats = -(-edge // len(patch[0].image))
    image = (np.tile(patch[0].image, (repeats, repeats, 1))[:edge, :edge] * STROMA).astype(np.uint8)
    y, x = np.ogrid[:edge, :edge]
    image[(y - edge / 2) ** 2 + (x - edge / 2) ** 2 > tissue_share * edge**2 / np.pi] = GLASS
    options = {"tile": (TILE_PX, TILE_PX), "photometric": "rgb", "compression": "jpeg", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in (1, 4, 16):
            size = edge // level
            shrunk = image[: size * level, : size * level].reshape(size, level, size, level, 3)
            pixels = image if level == 1 else shrunk.mean((1, 3)).astype(np.uint8)
            resolution = (10_000 / (MPP_LEVEL0 * level),) * 2
            options |= {"resolution": resolution, "resolutionunit": "CENTIMETER", "compressionargs": {"level": 85}}
            file.write(pixels, subfiletype=0 if level == 1 else 1, **options)


def make_inputs(folder: Path, args: argparse.Namespace) -> None:
    """Write slide, cohort and segmenter, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "slide.tif").exists():
        write_slide(folder / "slide.tif", args.slide_px, 1 - args.glass)
    phantom = PhantomConfig(slides=1, regions_per_slide=args.regions, size_px=args.region_px, mpp=MPP)
    cohort = write_phantom(phantom, folder / "cohort")
    if cohort.regions["split"].isna().any():
        cohort = cohort.write_split(dict.fromkeys(cohort.regions["patient"], "train"))
    config = SegmenterConfig(
        encoder_weights=None,
        training=TrainingConfig(steps=args.steps, batch_size=8),
        inference=InferenceConfig(window_px=args.window_px, batch_size=args.batch_size),
    )
    train_segmenter(cohort, config, folder / "segmenter", size_px=128, seed=0)


def windows_along(length: int, windows: Windows) -> np.ndarray:
    stride = windows.size_px - windows.overlap_px
    return np.arange(max(1, -(-(length - windows.size_px) // stride) + 1)) * stride


def windows_on_tissue(path: Path, windows: Windows) -> int:
    """Return how many windows of a grid over a slide show tissue, or come within a pixel of its mask."""
    with Slide.open(path) as slide:
        tissue = Tissue.of(slide)
        scale = MPP / slide.mpp_level0 / tissue.downsample
        sides = [round(side * slide.mpp_level0 / MPP) for side in slide.size_level0_px]
        ys, xs = windows_along(sides[1], windows), windows_along(sides[0], windows)
        shown = 0
        for y in ys:
            rows = slice(max(int(y * scale) - 1, 0), int((y + windows.size_px) * scale) + 2)
            for x in xs:
                columns = slice(max(int(x * scale) - 1, 0), int((x + windows.size_px) * scale) + 2)
                shown += bool(tissue.mask[rows, columns].any())
    return shown


class Work(NamedTuple):
    """Something that is timed beside the network."""

    windows: int
    run: Callable[[], object]


def bare(network: Segmenter, windows: Windows, count: int) -> None:
    """Run the network on random windows, in batches of one size."""
    size = windows.size_px
    batch = np.random.default_rng(0).integers(0, 256, (windows.batch_size, size, size, 3), dtype=np.uint8)
    with torch.inference_mode():
        for start in range(0, count, windows.batch_size):
            network.tumour_logits(torch.from_numpy(batch[: count - start])).cpu()


def free_logits(_segmenter: Segmenter, images: torch.Tensor) -> torch.Tensor:
    """Stand in for the network at almost no cost: what is dark, blurred, is tumour."""
    darkness = 140 - images[..., 1].float()
    return torch.nn.functional.avg_pool2d(darkness[:, None], 9, 1, 4)[:, 0] / 16


def timed(work: Callable[[], object]) -> tuple[float, float, float]:
    """Return seconds on the clock, CPU seconds of this process, and peak memory in MB."""
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5", encoding="ascii")
    cpu, clock = time.process_time(), time.perf_counter()
    work()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return clock, cpu, next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM")), float("nan"))


def works_of(folder: Path, windows: Windows, device: str) -> dict[str, Work]:
    cohort = Cohort.open(folder / "cohort")
    sides = cohort.regions[["height_px", "width_px"]].to_numpy()
    of_regions = sum(len(windows_along(h, windows)) * len(windows_along(w, windows)) for h, w in sides)
    segmenter, out = folder / "segmenter", folder / "out"

    def fresh() -> Cohort:
        return Cohort.open(folder / "cohort")  # nothing in memory

    def of_slide() -> None:
        predict_slide(segmenter, folder / "slide.tif", out / "slide.geojson", device=device)

    return {
        f"`evaluate`, {len(sides)} regions": Work(
            of_regions, lambda: evaluate(segmenter, fresh(), "train", device=device, label="")
        ),
        f"`predict`, {len(sides)} regions": Work(
            of_regions, lambda: predict_cohort(segmenter, fresh(), out / "cohort", device=device)
        ),
        "`predict`, slide": Work(windows_on_tissue(folder / "slide.tif", windows), of_slide),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide-px", type=int, default=12_000, help=f"edge of the slide at {MPP_LEVEL0} um/px")
    parser.add_argument("--glass", type=float, default=0.6, help="share of the slide")
    parser.add_argument("--regions", type=int, default=1)
    parser.add_argument("--region-px", type=int, default=3000, help=f"edge of a region at {MPP} um/px")
    parser.add_argument("--window-px", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40, help="of the segmenter's training")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", default="", help="work whose name contains this")
    parser.add_argument("--folder", type=Path, help="keep the inputs here, and use them if they are there")
    parser.add_argument("--free-network", action="store_true", help="CPU seconds of all that is not the network")
    parser.add_argument("--profile", action="store_true", help="also say which functions take the time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        make_inputs(folder, args)
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.free_network:
            show_rest(folder, args)
        else:
            show(compare(folder, args), args)


def show_rest(folder: Path, args: argparse.Namespace) -> None:
    """Print CPU seconds of everything but the network, beside those of the network on as many windows."""
    network, header = load_segmenter(folder / "segmenter")
    windows = network.config.inference.windows(header.size_px)
    seconds = [timed(lambda: bare(network, windows, windows.batch_size))[1] for _ in range(args.rounds + 1)]
    each = statistics.median(seconds[1:]) / windows.batch_size
    for name, work in works_of(folder, windows, args.device).items():
        if args.only not in name:
            continue
        rest = []
        with mock.patch.object(Segmenter, "tumour_logits", free_logits):
            for _ in range(args.rounds):
                shutil.rmtree(folder / "out", ignore_errors=True)
                (folder / "out").mkdir()
                rest.append(timed(work.run)[1])
        cpu, of_network = statistics.median(rest), each * work.windows
        share = of_network / (of_network + cpu)
        print(
            f"{name}: {work.windows} windows, network {of_network:.1f} s, all else {cpu:.2f} s of CPU time: {share:.3f}"
        )


Rounds = dict[str, tuple[Work, list[tuple[float, ...]], list[tuple[float, ...]]]]


def compare(folder: Path, args: argparse.Namespace) -> Rounds:
    """Time every work, each time beside the bare network."""
    network, header = load_segmenter(folder / "segmenter")
    windows = network.config.inference.windows(header.size_px)
    works = works_of(folder, windows, args.device)
    found: Rounds = {name: (work, [], []) for name, work in works.items() if args.only in name}
    bare(network, windows, windows.batch_size)
    for _ in range(args.rounds):
        for work, ours, theirs in found.values():
            shutil.rmtree(folder / "out", ignore_errors=True)
            (folder / "out").mkdir()
            theirs.append(timed(lambda count=work.windows: bare(network, windows, count)))
            ours.append(timed(work.run))
    for name, (work, _, _) in found.items() if args.profile else ():
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir()
        profile = cProfile.Profile()
        profile.runcall(work.run)
        print(name)
        pstats.Stats(profile).sort_stats("tottime").print_stats(18)
    return found


def show(found: Rounds, args: argparse.Namespace) -> None:
    print(f"windows of {args.window_px} px, batches of {args.batch_size}, torch on {torch.get_num_threads()} threads\n")
    print("| | windows | windows/s | Mpx/s | share of the network's speed | of CPU time | peak MB (network) |")
    print("|---|---|---|---|---|---|---|")
    for name, (work, ours, theirs) in found.items():
        clock, _, peak = (statistics.median(values) for values in zip(*ours, strict=True))
        share, of_cpu = (
            statistics.median(their[i] / our[i] for our, their in zip(ours, theirs, strict=True)) for i in (0, 1)
        )
        rate = work.windows / clock
        network_peak = statistics.median(their[2] for their in theirs)
        print(
            f"| {name} | {work.windows} | {rate:.2f} | {rate * args.window_px**2 * 9 / 16 / 1e6:.2f} | {share:.2f} | "
            f"{of_cpu:.2f} | {peak:.0f} ({network_peak:.0f}) |"
        )


if __name__ == "__main__":
    main()
