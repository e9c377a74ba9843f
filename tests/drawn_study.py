"""A study's folder with the segmenters of two arms, which differ by their seeds."""

from pathlib import Path

from counterstain.config import build
from counterstain.data.cohort import Cohort
from counterstain.recipe import load_recipe
from counterstain.segmentation.segmenter_config import SegmenterConfig
from counterstain.segmentation.train import train_segmenter
from counterstain.storage import claim, write_sealed
from counterstain.study.cells import Cell, cohort_cell
from counterstain.study.status import write_plan

ARMS = ("subtype", "oracle+100")


def draw_study(run: Path, cohort: Cohort) -> list[Path]:
    """Write a study of a cohort and return the folders of its segmenters."""
    recipe = load_recipe("demo", None, ["segmenter.encoder=tu-test_resnet", "segmenter.training.steps=2"])
    config = build(SegmenterConfig, recipe.segmenter.model_dump())
    claim(run, "study", {"name": "s"})
    whole = cohort_cell(cohort)
    cells = [whole]
    for seed, arm in enumerate(ARMS):
        inputs = {"cohort": whole.folder}
        cell = Cell(
            name=f"segmenter {arm} #0", stage="segmenter", settings={"seed": seed}, inputs=inputs, arm=arm, repeat=0
        )
        train_segmenter(cohort, config, run / "cells" / cell.folder, size_px=64, seed=seed)
        cells.append(cell)
    for cell in cells:
        write_sealed(run / "cells" / cell.folder / "cell.json", {"settings": cell.settings} | cell.details)
    write_plan(run, cells)
    return [run / "cells" / cell.folder for cell in cells[1:]]
