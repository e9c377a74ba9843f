"""Does balancing found subtypes help as much as balancing the true ones? A study with each, scored by the true ones.

    python benchmarks/found_subtypes.py out/found 5 6

For each seed: a phantom of 32 slides, `discover` on it with five clusters and with `--k auto`, and a study of
inpainting +100 % with the demo's settings (three repeats) on the true subtypes and on both kinds of found ones. Every
segmenter is then counted on the test patients by the true subtypes. An hour a seed on two shared cores; the same
command continues.
"""

import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd

import counterstain as cs
from counterstain.config import build, read_yaml
from counterstain.data.cohort import Cohort
from counterstain.segmentation.counts import count, dice, recalls
from counterstain.segmentation.evaluate import predicted_strips
from counterstain.storage import read_sealed
from counterstain.study.cells import CELLS
from counterstain.study.config import StudyConfig
from counterstain.study.run import run_study

RECIPE = read_yaml(Path(str(files("counterstain"))) / "presets" / "study_demo.yaml")["recipe"]


def tissues(out: Path, seed: int) -> dict[str, Path]:
    """Make a phantom and find subtypes on it; return a cohort for each taxonomy."""
    cohort = out / f"p{seed}"
    if not cohort.exists():
        cs.make_phantom(cohort, slides=32, regions=3, size_px=128, mpp=2.0, seed=seed)
        cs.split(cohort, train=16, val=6, test=10, seed=seed)
    found = {f"found{seed}-{k}": out / f"f{seed}-{k}" for k in ("5", "auto")}
    for name, folder in found.items():
        if not folder.exists():
            cs.discover(cohort, out=folder, k=name.rpartition("-")[2])
    return {f"true{seed}": cohort, **found}


def counted(segmenter: Path, cohort: Path, true: Cohort) -> np.ndarray:
    """Return the counts (K + 1, 2) of a segmenter on the test patients by the true subtypes."""
    counts, rows = np.zeros((true.taxonomy.num_labels, 2), np.int64), 0
    for strip in predicted_strips(segmenter, Cohort.open(cohort), "test"):
        height, width = strip.tumour.shape
        patch = true.cut(strip.position, rows, 0, height, width)
        counts += count(patch.label_mask, strip.tumour, true.taxonomy.num_labels)
        rows = 0 if strip.is_last else rows + height
    return counts


def main() -> None:
    out, rows = Path(sys.argv[1]), []
    for seed in map(int, sys.argv[2:]):
        folders = tissues(out, seed)
        true = Cohort.open(out / f"p{seed}")
        for name, cohort in folders.items():
            settings = {
                "cohort": {"path": str(cohort.resolve())},
                "methods": ["inpainting"],
                "amounts": [1.0],
                "repeats": 3,
            }
            study = {"name": name, "preset": "demo", "recipe": RECIPE, "resources": {"threads": 1}}
            run_study(build(StudyConfig, study | settings, name), out / name)
            for folder in sorted((out / name / CELLS).glob("segmenter-*")):
                cell = read_sealed(folder / "cell.json")
                counts = counted(folder, cohort, true)
                of_subtypes = dict(zip(true.taxonomy.names, 100 * recalls(counts), strict=True))
                arm = cell["name"].removeprefix("segmenter ").partition(" #")[0]
                row = {"seed": seed, "balanced": name, "arm": arm, "dice": 100 * dice(counts), **of_subtypes}
                rows.append(
                    row | {"variance": np.var(100 * recalls(counts)), "fp": 100 * counts[0, 1] / counts[0].sum()}
                )
    table = pd.DataFrame(rows).groupby(["seed", "balanced", "arm"], sort=False).mean()
    table["spread"] = table.pop("variance") ** 0.5
    print(table.round(1).to_string())


if __name__ == "__main__":
    main()
