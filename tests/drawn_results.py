"""Draws the results folder of a study: counts by chance, tables that follow from them, small pictures."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from counterstain.seeding import numpy_generator
from counterstain.segmentation.counts import TABLE_COLUMNS, measures, pooled
from counterstain.taxonomy import Taxonomy

HER2 = Taxonomy.named("her2")
DEMO_ARMS = ("tumor", "subtype", "spade+100", "diffusion+100", "inpainting+100")
METHODS = ("spade", "diffusion", "inpainting")
PAPER_ARMS = ("tumor", "subtype", *(f"{method}+{amount}" for method in METHODS for amount in (50, 100, 200, 400)))


def draw_counts(arms, repeats, patients=8, gain=None, seed=0, taxonomy=HER2):
    """Draw the long form of count tables; `gain` adds to the recall of the first subtype by arm."""
    rows = []
    for split in ("val", "test"):
        for p in range(patients):
            draw = numpy_generator(seed, "patient", split, p)
            pixels = draw.integers(2_000, 30_000, taxonomy.num_labels) * (draw.random(taxonomy.num_labels) < 0.8)
            pixels[0], pixels[1 + p % 4] = 400_000, 60_000
            hard = draw.normal(0, 0.06, taxonomy.num_labels)
            for arm in arms:
                for repeat in range(repeats):
                    wobble = numpy_generator(seed, "cell", arm, repeat).normal(0, 0.012, taxonomy.num_labels)
                    recall = np.linspace(0.62, 0.93, taxonomy.num_labels) + hard + wobble
                    recall[0] = 0.05 + abs(wobble[0])
                    recall[1] += (gain or {}).get(arm, 0.0)
                    found = np.round(pixels * np.clip(recall, 0, 1)).astype(int)
                    place = (arm, repeat, f"{split}{p}", f"{split}-patient{p}", f"{p % 4}", split)
                    for label, (n, hit) in enumerate(zip(pixels.tolist(), found.tolist(), strict=True)):
                        rows.append((*place, label, n - hit, hit))
    return pd.DataFrame(rows, columns=["arm", "repeat", *TABLE_COLUMNS])


def results_of(counts, taxonomy=HER2):
    rows = [
        {"arm": arm, "repeat": repeat, "split": split, **measures(pooled(cell), taxonomy)}
        for (arm, repeat, split), cell in counts.groupby(["arm", "repeat", "split"], sort=False)
    ]
    return pd.DataFrame(rows)


def draw_composition(taxonomy=HER2):
    draw = numpy_generator(0, "composition")
    rows = []
    for split, patients in (("train", 24), ("val", 8), ("test", 8)):
        for p in range(patients):
            for s in taxonomy.subtypes:
                n = int(draw.integers(1, 40 if s.id == 1 + p % 4 else 6))
                slide = f"{split}-{p}"
                rows.append((split, slide, slide, str(p % 4), s.name, n, n * int(draw.integers(900, 4000))))
    return pd.DataFrame(rows, columns=["split", "slide", "patient", "score", "subtype", "instances", "area_px"])


def draw_synthetic(methods=METHODS, taxonomy=HER2):
    columns = {
        "subtype": taxonomy.names,
        "instances": [180 + s.id for s in taxonomy.subtypes],
        "area_px": [200_000 + 9_000 * s.id for s in taxonomy.subtypes],
        "instances_before": [30, 80, 260, 420, 110],
        "area_px_before": [20_000, 60_000, 240_000, 500_000, 190_000],
    }
    return pd.DataFrame({"method": methods}).merge(pd.DataFrame(columns), how="cross")


def draw_losses(arms, repeats, steps=400):
    stages = {"spade": ("generator", "discriminator", "kl"), "autoencoder": ("reconstruction",), "diffusion": ("loss",)}
    stages |= {f"segmenter {arm} #{r}": ("loss", "val_dice") for arm in arms for r in range(repeats)}
    parts = []
    for stage, names in stages.items():
        for name in names:
            draw = numpy_generator(0, stage, name)
            step = np.arange(0, steps, 5)
            value = np.exp(-step / 120) + 0.2 + draw.normal(0, 0.03, len(step))
            parts.append(pd.DataFrame({"stage": stage, "step": step, "name": name, "value": np.abs(value)}))
    return pd.concat(parts)


def _tissue(draw, size, labels):
    """Blots of colour: enough to see where a picture stands in a figure."""
    coarse = draw.integers(0, 60, (size // 8, size // 8, 3)).repeat(8, 0).repeat(8, 1)
    image = HER2.palette[labels].astype(int) - coarse // 2 + draw.integers(-12, 12, (size, size, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def draw_examples(folder: Path, methods=METHODS, count=4, size=96, taxonomy=HER2):
    folder.mkdir()
    y, x = np.mgrid[:size, :size]
    listing = []
    for e in range(count):
        draw = numpy_generator(0, "example", e)
        old, new = np.zeros((2, size, size), int)
        for _ in range(3):
            (cy, cx), radius = draw.integers(10, size - 10, 2), draw.integers(size // 8, size // 4)
            inside = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
            old[inside], new[inside] = 1 + draw.integers(0, 5), 1 + draw.integers(0, 5)
        images = {"real": _tissue(draw, size, old), "mask": taxonomy.palette[old], "new_mask": taxonomy.palette[new]}
        images |= {method: _tissue(draw, size, new) for method in methods}
        for name, image in images.items():
            Image.fromarray(image).save(folder / f"{e}-{name}.png")
        entry = {name: f"{e}-{name}.png" for name in ("real", "mask", "new_mask")}
        listing.append(entry | {"images": {m: f"{e}-{m}.png" for m in methods}, "old": [1], "new": [2], "redraw": None})
    (folder / "examples.json").write_text(json.dumps(listing))


def draw_gallery(file: Path, methods=METHODS, count=4, size=48):
    """Pictures as a study keeps them: a real patch, then what every method made of it."""
    rows = []
    for p in range(count):
        place = {"region": f"r{p}", "slide": f"slide {p % 2}", "patient": f"patient {p % 3}", "y_px": 8 * p, "x_px": 16}
        before, after = [1 + p % 5, 4], [1 + (p + 1) % 5, 2]
        source = len(rows)
        for method in ("real", *methods):
            labels = np.zeros((size, size), int)
            labels[: size // 2], labels[size // 2 :, : size // 2] = after if method != "real" else before
            pictures = {}
            for name, form, image in (
                ("image", "WEBP", _tissue(numpy_generator(0, "gallery", p, method), size, labels)),
                ("mask", "PNG", HER2.palette[labels]),
            ):
                Image.fromarray(image).save(buffer := io.BytesIO(), form)
                pictures[name] = buffer.getvalue()
            numbers = {"number": len(rows), "source": source, "index": p, "attempts": int(method != "real")}
            now = {"before": before, "after": before if method == "real" else after, "area_px": [1152, 576]}
            rows.append({"method": method} | pictures | place | numbers | now)
    pd.DataFrame(rows).to_parquet(file)


def draw_records(folder: Path, arms, repeats, methods=METHODS):
    """What a study writes of its trainings and sets."""
    trained = {"sha256": "", "batch_size": 16, "patients_seen": 24, "seconds": 61.0}
    of_method = {"steps": 400, "logs": ""}
    trainings = [trained | of_method | {"name": name, "stage": name, "sha256": name * 4} for name in methods]
    trainings += [
        trained | {"name": f"segmenter {arm} #{r}", "stage": "segmenter", "steps": 80, "logs": f"cells/{arm}-{r}/logs"}
        for arm in arms
        for r in range(repeats)
    ]
    (folder / "trainings.json").write_text(json.dumps(trainings))
    pairs = itertools.product(HER2.names, HER2.names)
    changes = [{"before": a, "after": b, "instances": 10 + i, "area_px": 9_000} for i, (a, b) in enumerate(pairs)]
    settings = {"synthesis": {"reject": "near_white", "white_level": 235.0, "attempts": 5}}
    sets = [
        {"name": method, "method": method, "patches": 640, "size_px": 96, "mpp": 0.5, "seed": "12345678901234567890"}
        | {"cohort": "9f2c" * 16, "generator": method * 4, "patients_seen": ["P1", "P2"], "version": "0.1.0"}
        | {"settings": settings, "sources": {"region": 40, "slide": 24, "patient": 24}, "changes": changes}
        | {"drawn": 640 + 7 * i, "rejected": 7 * i, "background_only": 12}
        for i, method in enumerate(methods)
    ]
    (folder / "sets.json").write_text(json.dumps(sets))


def draw_fairness(arms, repeats):
    """What each training was given: the same but for its synthetic patches."""
    alike = {"steps": 80, "batch_size": 16, "starts_from": "random", "settings": "3f2a", "schedule": "constant"}
    alike |= {"augmentation": "mirrored, quarter turns", "subtype_weighting": 0.0}
    rows = []
    for arm in arms:
        method, plus, _ = arm.partition("+")
        synthetic = {"synthetic_set": method if plus else "", "synthetic_patches": 640 if plus else 0}
        filtered = {"filter": "near white" if plus else "", "drawn": 647 if plus else 0, "rejected": 7 if plus else 0}
        share = {"synthetic_share": 0.5 if plus else 0.0}
        rows += [
            {"arm": arm, "repeat": r, "seed": 9 + r} | alike | synthetic | share | filtered for r in range(repeats)
        ]
    return pd.DataFrame(rows)


def draw_results(run: Path, arms=DEMO_ARMS, repeats=2, gain=None, patients=8, methods=METHODS, **study) -> Path:
    """Write RUN/results as a study does; `study` overrides what study.json says."""
    folder = run / "results"
    folder.mkdir(parents=True)
    counts = draw_counts(arms, repeats, gain=gain, patients=patients)
    counts.to_parquet(folder / "counts.parquet")
    results_of(counts).to_csv(folder / "results.csv", index=False)
    draw_composition().to_csv(folder / "composition.csv", index=False)
    draw_synthetic(methods).to_csv(folder / "synthetic.csv", index=False)
    draw_losses(arms, repeats).to_csv(folder / "losses.csv", index=False)
    draw_examples(folder / "examples", methods)
    draw_gallery(folder / "gallery.parquet", methods)
    draw_records(folder, arms, repeats, methods)
    draw_fairness(arms, repeats).to_csv(folder / "fairness.csv", index=False)
    record = {
        "name": "drawn study",
        "preset": "demo",
        "taxonomy": HER2.model_dump(mode="json"),
        "cohort": {
            "source": "phantom, 40 slides, seed 0",
            "mpp": 0.5,
            "fingerprint": "9f2c" * 16,
            "regions": 400,
            "patients": {"train": 24, "val": 8, "test": patients},
        },
        "config": {"seed": 0, "sampling": {"size_px": 96, "background_share": 0.5}, "arms": list(arms)},
        "arms": list(arms),
        "reference": "subtype",
        "repeats": repeats,
        "versions": {"counterstain": "0.1.0", "numpy": np.__version__, "torch": "2.15.0"},
        "seconds": {"phantom": 31.2, "spade": 95.0, "diffusion": 140.7, "segmenters": 4210.0},
        "failed": [],
        "filter": {m: {"drawn": 640 + 7 * i, "rejected": 7 * i} for i, m in enumerate(methods)},
        "device": "cpu, 2 threads",
    }
    (folder / "study.json").write_text(json.dumps(record | study))
    return run
