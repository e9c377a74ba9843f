"""Print how fast `import slides` takes tissue out of slides, beside plain reading of the same areas.

Makes slides as scanners and vips write them (tiles of 256 px, JPEG, levels) with annotations, then takes turns:
counterstain's import, openslide's `read_region` and tifffile's tiles of the same areas, on one core; with --processes,
also several slides at once. Rates are level-0 pixels of the regions over CPU time, medians of the rounds.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import tifffile

from counterstain.data.cohort import Cohort
from counterstain.data.phantom import regions_of_slide
from counterstain.data.phantom.styles import PhantomConfig
from counterstain.io.import_slides import import_slides
from counterstain.io.slides import area_average
from counterstain.processes import ExecutorConfig
from counterstain.seeding import numpy_generator

TILE_PX, COHORT_MPP, POINTS = 256, 0.5, 120
MARGIN_PX = 72  # around a region, so that it begins within a tile
GRAIN = 5.0  # grey levels: a megapixel of JPEG then takes as much as a scanner's, about 400 kB
LABELS = "labels:\n  one: HER2 1+\n  three: HER2 3+\n"


def write_slide(path: Path, edge: int, tissue: np.ndarray, mpp: float) -> None:
    """Write a slide of ``edge`` px, phantom tissue side by side, with levels shrunk by 4 and 16."""
    repeats = -(-edge // len(tissue))
    image = np.tile(tissue, (repeats, repeats, 1))[:edge, :edge]
    edges = np.arange(edge + 1.0)
    options = {"tile": (TILE_PX, TILE_PX), "photometric": "ycbcr", "compression": "jpeg", "subsampling": (2, 2)}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in (1, 4, 16):
            resolution = (10_000 / (mpp * level), 10_000 / (mpp * level))
            file.write(
                area_average(image, edges[:: level], edges[:: level]), **options,
                compressionargs={"level": 85}, resolution=resolution, resolutionunit="CENTIMETER",
                subfiletype=0 if level == 1 else 1, metadata=None,
            )  # fmt: skip


def write_annotations(path: Path, edge: int, count: int, seed: int) -> None:
    rng = numpy_generator(seed, "outlines")
    features = []
    for number in range(count):
        angle = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
        radius = edge / 14 * (1 + 0.2 * np.sin(3 * angle + rng.uniform(0, 6)))
        centre = rng.uniform(edge / 12, edge - edge / 12, 2)
        ring = (centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)).round(2).tolist()
        features.append(
            {
                "type": "Feature",
                "id": f"nest-{number}",
                "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
                "properties": {"objectType": "annotation", "classification": {"name": ("one", "three")[number % 2]}},
            }
        )
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def make_slides(folder: Path, count: int, edge: int, polygons: int, mpp: float) -> None:
    """Write slides that differ, their annotations and LABELS.yaml."""
    (folder / "slides").mkdir(parents=True)
    (folder / "annotations").mkdir()
    (folder / "LABELS.yaml").write_text(LABELS)
    patch = min(2048, edge)
    tissue = regions_of_slide(PhantomConfig(slides=1, regions_per_slide=1, size_px=patch, mpp=0.25), 0)[0].image
    grain = numpy_generator(0, "grain").normal(0, GRAIN, tissue.shape)
    tissue = np.clip(tissue + grain, 0, 255).astype(np.uint8)
    side = edge // 2 - 2 * MARGIN_PX
    rows = ["slide,x_level0_px,y_level0_px,width_level0_px,height_level0_px"]
    rows += [
        f"s{n},{x},{y},{side},{side}" for n in range(count) for y in (77, edge // 2 + 45) for x in (91, edge // 2 + 33)
    ]
    (folder / "regions.csv").write_text("\n".join(rows) + "\n")
    for number in range(count):
        write_slide(folder / "slides" / f"s{number}.tif", edge, np.roll(tissue, 611 * number, axis=1), mpp)
        write_annotations(folder / "annotations" / f"s{number}.geojson", edge, polygons, number)


def run_import(folder: Path, out: Path, processes: int | None = None) -> Cohort:
    return import_slides(
        folder / "slides", folder / "annotations", file_format="qupath", labels=folder / "LABELS.yaml", mpp=COHORT_MPP,
        out=out, regions=folder / "regions.csv",
        executor=ExecutorConfig(processes=processes),
    )  # fmt: skip


def read_openslide(folder: Path, regions: pd.DataFrame, step_px: int = 1024) -> None:
    """Read the regions as everybody does: square blocks of level 0, RGBA to an RGB array."""
    for slide, of_slide in regions.groupby("slide"):
        with openslide.OpenSlide(folder / "slides" / f"{slide}.tif") as file:
            for x0, y0, width, height in places(of_slide):
                for y in range(y0, y0 + height, step_px):
                    for x in range(x0, x0 + width, step_px):
                        size = (min(step_px, x0 + width - x), min(step_px, y0 + height - y))
                        np.asarray(file.read_region((x, y), 0, size).convert("RGB"))


def read_tifffile(folder: Path, regions: pd.DataFrame) -> None:
    """Decode every tile under the regions once."""
    for slide, of_slide in regions.groupby("slide"):
        with tifffile.TiffFile(folder / "slides" / f"{slide}.tif") as file:
            page = file.pages[0]
            for x, y, width, height in places(of_slide):
                for row in range(y // TILE_PX, -(-(y + height) // TILE_PX)):
                    for column in range(x // TILE_PX, -(-(x + width) // TILE_PX)):
                        index = row * -(-page.imagewidth // TILE_PX) + column
                        file.filehandle.seek(page.dataoffsets[index])
                        data = file.filehandle.read(page.databytecounts[index])
                        page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)


def places(regions: pd.DataFrame) -> list[tuple[int, int, int, int]]:
    names = ("x_level0_px", "y_level0_px", "width_px", "height_px", "mpp_level0")
    rows = zip(*(regions[name] for name in names), strict=True)
    return [(x, y, *(round(side * COHORT_MPP / mpp) for side in sides)) for x, y, *sides, mpp in rows]


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return CPU seconds of this process and seconds on the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edge", type=int, default=12_288, help="of a slide in level-0 pixels, a multiple of 16")
    parser.add_argument("--polygons", type=int, default=40)
    parser.add_argument("--slides", type=int, default=1)
    parser.add_argument(
        "--mpp", type=float, default=0.25, help="of the slides; 0.25 shrinks by 2, 0.2431 by parts of pixels"
    )
    parser.add_argument("--processes", type=int, default=1, help="also import with so many, against one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the slides here, and use them if they are there")
    parser.add_argument("--profile", action="store_true", help="say which functions take the time of an import")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "LABELS.yaml").exists():
            make_slides(folder, args.slides, args.edge, args.polygons, args.mpp)
        out = Path(temporary) / "cohort"
        regions = run_import(folder, out).regions
        if args.profile:
            shutil.rmtree(out)
            profile = cProfile.Profile(time.process_time)
            profile.runcall(run_import, folder, out)
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        show(regions, compare(folder, out, regions, args))


def compare(
    folder: Path, out: Path, regions: pd.DataFrame, args: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    """Return CPU and clock seconds of every round, the works taking turns."""
    works: dict[str, Callable[[], object]] = {
        "openslide read_region": lambda: read_openslide(folder, regions),
        "tifffile, every tile once": lambda: read_tifffile(folder, regions),
        "import slides": lambda: run_import(folder, out),
    }
    if args.processes > 1:
        several = f"import slides, {args.processes} processes"
        works[several] = lambda: run_import(folder, out, args.processes)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(args.rounds):
        for name, work in works.items():
            shutil.rmtree(out, ignore_errors=True)
            taken[name].append(timed(work))
    return taken


def show(regions: pd.DataFrame, taken: dict[str, list[tuple[float, float]]]) -> None:
    mpx = sum(width * height for _, _, width, height in places(regions)) / 1e6
    first = statistics.median(cpu for cpu, _ in next(iter(taken.values())))
    print(f"{len(regions)} regions, {mpx:.0f} Mpx of level 0, {len(next(iter(taken.values())))} rounds\n")
    print("| | Mpx/s of CPU time | to openslide | seconds on the clock |\n|---|---|---|---|")
    for name, rounds in taken.items():
        cpu, clock = (statistics.median(values) for values in zip(*rounds, strict=True))
        rates = f"{mpx / cpu:.0f} | {first / cpu:.2f}" if "processes" not in name else "|"  # elsewhere is not counted
        print(f"| {name} | {rates} | {clock:.1f} |")


if __name__ == "__main__":
    main()
