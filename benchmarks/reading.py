"""Print what reading a patch costs from cohorts of 20 and of N regions (400 by default), and how much memory it takes.

    python benchmarks/reading.py FOLDER [N]

The cohorts, 20 MB a region of 3,000 px, and a slide of 6,000 px stay in FOLDER and are made once.
Times are of the processor (milliseconds,
median), taken in turn in one process, so that what else the machine does hardly counts.
"""

import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import zarr
from numcodecs.zstd import decompress

from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.data.phantom import PhantomConfig, write_phantom
from counterstain.data.region_store import CHUNK_PX
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.io.slides import Slide
from counterstain.storage import read_json, write_json

SIZE_PX, SLIDE_PX, TIMED, DRAWN = 3000, 6000, 200, 2000
INDEX_BYTES = 16  # a chunk
STATUS = Path("/proc/self/status")  # a child's ru_maxrss begins with that of its parent


def tissue(folder: Path) -> Cohort:
    if not (folder / "cohort.json").exists():
        write_phantom(PhantomConfig(slides=2, regions_per_slide=1, size_px=SIZE_PX, mpp=0.5), folder)
    return Cohort.open(folder)


def repeated(folder: Path, drawn: Cohort, count: int) -> Cohort:
    """Make a cohort of copies of the drawn regions, each a pack of its own on disk under its own name."""
    writer = CohortWriter(folder, drawn.taxonomy, drawn.mpp, {"kind": "benchmark", "count": count})
    for number in () if writer.finished else range(count):
        name, region = f"r{number:03d}", drawn.regions.iloc[number % len(drawn)]
        instances = drawn.instances[drawn.instances["region"] == region["region"]].assign(region=name)
        pack = folder / "packs" / f"{name}.ome.zarr"
        shutil.copytree(drawn.folder / "packs" / f"{region['pack']}.ome.zarr", pack, dirs_exist_ok=True)
        described = read_json(pack / "zarr.json")
        described["attributes"]["counterstain"]["regions"] = [name]
        write_json(pack / "zarr.json", described)
        own = {**dict.fromkeys(("region", "slide", "patient", "pack"), name), "split": "train"}
        tables = {"regions": [json.loads(region.to_json()) | own], "instances": instances.to_dict("records")}
        write_json(folder / "parts" / f"{name}.json", tables)
    return writer.finish(count)


class ByHand:
    """The chunks under a window and nothing else: no check, no cache but for the indices."""

    def __init__(self, cohort: Cohort) -> None:
        self._packs = [cohort.folder / "packs" / f"{name}.ome.zarr" for name in cohort.regions["pack"]]
        self._index: dict[Path, np.ndarray] = {}

    def cut(self, position: int, y: int, x: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image and instances of a window."""
        image = np.empty((3, size, size), np.uint8)
        instances = np.empty((size, size), np.int32)
        for out, file in ((image, "0/c/0/0/0/0"), (instances, "labels/instances/0/c/0/0/0")):
            self._fill(out, self._packs[position] / file, y, x, size)
        turned = np.empty((size, size, 3), np.uint8)
        for channel in range(3):
            turned[..., channel] = image[channel]
        return turned, instances

    def _fill(self, out: np.ndarray, file: Path, y: int, x: int, size: int) -> None:
        across, step = -(-SIZE_PX // CHUNK_PX), CHUNK_PX
        with file.open("rb", buffering=0) as opened:
            if file not in self._index:
                opened.seek(-across * across * INDEX_BYTES - 4, 2)
                self._index[file] = np.frombuffer(opened.read(across * across * INDEX_BYTES), "<u8").reshape(-1, 2)
            for row, column in itertools.product(*(range(n // step, (n + size - 1) // step + 1) for n in (y, x))):
                start, length = self._index[file][row * across + column].tolist()
                opened.seek(start)
                chunk = np.frombuffer(decompress(opened.read(length)), out.dtype).reshape(*out.shape[:-2], step, step)
                top, left = max(row * step, y), max(column * step, x)
                bottom, right = min((row + 1) * step, y + size), min((column + 1) * step, x + size)
                cut = chunk[..., top - row * step : bottom - row * step, left - column * step : right - column * step]
                out[..., top - y : bottom - y, left - x : right - x] = cut


def by_zarr(cohort: Cohort) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    arrays: dict[int, tuple[zarr.Array, zarr.Array]] = {}

    def cut(position: int, y: int, x: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        if position not in arrays:
            pack = cohort.folder / "packs" / f"{cohort.regions['pack'].iloc[position]}.ome.zarr"
            arrays[position] = tuple(zarr.open_array(pack / path, mode="r") for path in ("0", "labels/instances/0"))
        image, instances = (array[..., 0, y : y + size, x : x + size] for array in arrays[position])
        return np.moveaxis(image, 0, -1).copy(), instances

    return cut


def cpu_ms(action: Callable[..., object], *arguments: int) -> float:
    start = time.process_time()
    action(*arguments)
    return 1000 * (time.process_time() - start)


def times(cohort: Cohort, size_px: int) -> dict[str, float]:
    """Return the median time of a patch for each way to read it; the same places, in turn."""
    one = 3 * CHUNK_PX**2
    cold, warm = Cohort.open(cohort.folder, cache_bytes=10 * one), Cohort.open(cohort.folder, cache_bytes=2**31)
    ways = {"zarr's slices": by_zarr(cohort), "chunks by hand": ByHand(cohort).cut}
    for name, opened in (("Cohort.cut, decoded", cold), ("Cohort.cut, in memory", warm)):
        ways[name] = lambda p, y, x, s, opened=opened: opened.cut(p, y, x, s, s)
    places = np.random.default_rng(0).integers(0, [len(cohort), SIZE_PX - size_px, SIZE_PX - size_px], (TIMED, 3))
    found: dict[str, list[float]] = {name: [] for name in ways}
    for position, y, x in places.tolist():
        warm.cut(position, y, x, size_px, size_px)
        for name, cut in ways.items():
            if name != "Cohort.cut, in memory":
                cut(position, 0, 0, 1)  # what is read once for each region
                cold.cut(0, SIZE_PX - 900, SIZE_PX - 900, 900, 900)  # displaces the chunks
                cold.cut(position, 0, 0, 1, 1)
            found[name].append(cpu_ms(cut, position, y, x, size_px))
    return {name: float(np.median(taken)) for name, taken in found.items()}


def stream(folder: Path, size_px: int) -> None:
    """Print the mean time of the sampler's first patches, with the usual cache, and the process's peak memory."""
    sampler = PatchSampler(Cohort.open(folder), "train", size_px, SamplingConfig(), seed=0)
    taken = [cpu_ms(sampler.__getitem__, i) for i in range(DRAWN)]
    (peak,) = (int(line.split()[1]) / 1000 for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    print(f"| {len(sampler.cohort)} | {size_px} | {np.mean(taken):.1f} | {np.percentile(taken, 95):.1f} | {peak:.0f} |")


def from_a_slide(folder: Path, size_px: int) -> dict[str, float]:
    """Return the milliseconds of a patch of level 0 of a slide: ours, OpenSlide's, MONAI's WSIReader's if installed."""
    path = folder / "slide.tif"
    if not path.exists():
        from inference import write_slide  # with torch: not in the processes whose memory is measured

        write_slide(path, SLIDE_PX, 1.0)
    plain = openslide.OpenSlide(path)
    ways: dict[str, Callable[[int, int], object]] = {
        "OpenSlide": lambda x, y: np.asarray(plain.read_region((x, y), 0, (size_px, size_px)).convert("RGB"))
    }
    try:
        from monai.data.wsi_reader import WSIReader
    except ImportError:
        print("MONAI's WSIReader: not installed, left out")
    else:
        reader = WSIReader(backend="openslide")
        opened = reader.read(str(path))
        ways["MONAI's WSIReader"] = lambda x, y: reader.get_data(opened, (y, x), (size_px, size_px), level=0)
    with Slide.open(path) as slide:
        ways["Slide.read"] = lambda x, y: slide.read(x, y, size_px, size_px, slide.mpp_level0)
        places = np.random.default_rng(0).integers(0, SLIDE_PX - size_px, (TIMED // 4, 2)).tolist()
        taken = {name: [] for name in ways}
        for (x, y), (name, read) in itertools.product(places, ways.items()):
            taken[name].append(cpu_ms(read, x, y))
    return {name: float(np.median(found)) for name, found in taken.items()}


def main() -> None:
    if sys.argv[1] == "--stream":
        return stream(Path(sys.argv[2]), int(sys.argv[3]))
    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 400
    drawn = tissue(folder / "tissue")
    cohorts = [repeated(folder / f"of-{n}", drawn, n) for n in sorted({20, count})]
    print("\n| ms a patch | 512 px | 256 px |\n|---|---|---|")
    by_size = [times(cohorts[-1], size_px) for size_px in (512, 256)]
    for name in by_size[0]:
        print(f"| {name} | {by_size[0][name]:.2f} | {by_size[1][name]:.2f} |", flush=True)
    print("\n| from a slide | ms | of Slide.read's |\n|---|---|---|")
    for size_px in (512, 1024):
        taken = from_a_slide(folder, size_px)
        for name, found in taken.items():
            print(f"| {name}, {size_px} px | {found:.1f} | {found / taken['Slide.read']:.2f} |", flush=True)
    whole = np.median([cpu_ms(cohorts[0].read, p) for p in range(10)])
    print(f"\nA whole region, decoded: {whole:.0f} ms")
    print("\n| regions | px | sampler, ms a patch | 95 % below | peak memory, MB |\n|---|---|---|---|---|", flush=True)
    for cohort, size_px in itertools.product(cohorts, ("512", "256")):
        subprocess.run([sys.executable, __file__, "--stream", str(cohort.folder), size_px], check=True)
    return None


if __name__ == "__main__":
    main()
