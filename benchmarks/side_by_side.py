"""Print one table of how counterstain does beside what else one would use, each pair taken in turn in this run.

    python benchmarks/side_by_side.py [--folder out/side-by-side] [--preset demo] [--size 64] [--tiny]

Puts together reading.py (a patch of a slide), import_slides.py, inference.py and gpu.py (training steps, drawing),
which say how each is measured and take more settings. ``times as fast`` is processor time where both run in this
process, and time on the clock for training and drawing. What lies in the folder is used again.
"""

import argparse
import statistics
from pathlib import Path

import gpu
import import_slides
import inference
import pandas as pd
import reading
import torch

ROUNDS = 3


def patches(folder: Path, size_px: int) -> list[tuple[str, str, float]]:
    taken = reading.from_a_slide(folder, size_px)
    ours = taken.pop("Slide.read")
    return [(f"a patch of {size_px} px from a slide", other, found / ours) for other, found in taken.items()]


def imports(folder: Path, *, tiny: bool) -> list[tuple[str, str, float]]:
    rows = []
    for step, mpp in (("shrunk by 2", 0.25), ("shrunk by 2.06", 0.2431)):
        place, out = folder / f"import-{mpp}", folder / "imported"
        arguments = argparse.Namespace(processes=1, rounds=1 if tiny else ROUNDS)
        if not place.exists():
            import_slides.make_slides(place, 1, 1024 if tiny else 8192, 4 if tiny else 40, mpp)
        import_slides.shutil.rmtree(out, ignore_errors=True)
        regions = import_slides.run_import(place, out).regions
        taken = import_slides.compare(place, out, regions, arguments)
        plain, _, ours = (statistics.median(cpu for cpu, _ in rounds) for rounds in taken.values())
        rows.append((f"import of a TIFF slide, {step}", "OpenSlide's `read_region`, nothing kept", plain / ours))
    return rows


def predictions(folder: Path, *, tiny: bool) -> list[tuple[str, str, float]]:
    arguments = argparse.Namespace(
        slide_px=1024 if tiny else 6000, glass=0.6, regions=1, region_px=256 if tiny else 1500, only="",
        window_px=128 if tiny else 256, batch_size=16, steps=1 if tiny else 40, rounds=1 if tiny else ROUNDS,
        device="auto", profile=False,
    )  # fmt: skip
    inference.make_inputs(folder / "inference", arguments)
    found = inference.compare(folder / "inference", arguments)
    return [
        (
            name.replace("`", "") + (f" of {arguments.slide_px:,} px" if "slide" in name else ""),
            "the bare network on as many windows",
            statistics.median(their[1] / our[1] for our, their in zip(ours, theirs, strict=True)),
        )
        for name, (_, ours, theirs) in found.items()
    ]


def networks(folder: Path, preset: str, size_px: int, *, tiny: bool) -> list[tuple[str, str, float]]:
    words = ["--out", str(folder / "networks"), "--presets", preset, "--sizes", str(size_px)]
    gpu.main([*words, "--seconds", "20", *(["--tiny"] if tiny else [])])
    table = pd.read_csv(folder / "networks" / "gpu.csv")
    ours = table[~table["variant"].str.contains("plain") & table["ratio"].notna()]
    of_drawing = "a plain loop of diffusers' DDIM, 200 steps"
    return [
        (
            f"{row.part}, {row.network}, {row.variant}, {row.size_px} px".replace(", counterstain", ""),
            of_drawing if row.part == "drawing" else "plain fp32 code of the usual kind",
            row.ratio,
        )
        for row in ours.itertuples()
    ]


def main(words: list[str] | None = None) -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/side-by-side"), help="what is made and the table")
    parser.add_argument("--preset", default="demo", help="of the networks")
    parser.add_argument("--size", type=int, default=64, help="edge of the networks' patches")
    parser.add_argument("--tiny", action="store_true", help="show that it runs, in seconds, and nothing of speed")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args(words)
    folder, tiny = arguments.folder, arguments.tiny
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    rows = [row for size_px in (512, 1024) for row in patches(folder, size_px)]
    rows += imports(folder, tiny=tiny) + predictions(folder, tiny=tiny)
    rows += networks(folder, arguments.preset, arguments.size, tiny=tiny)
    lines = ["| | beside | times as fast |", "|---|---|---|"]
    lines += [f"| {ours} | {other} | {ratio:.2f} |" for ours, other, ratio in rows]
    (folder / "side-by-side.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
