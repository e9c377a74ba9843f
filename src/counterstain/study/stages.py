"""What each kind of cell does: from its settings and its inputs' folders to its folder."""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from counterstain.audit import JudgeFilterConfig
from counterstain.audit.copies import NoveltyFilter
from counterstain.audit.judge import JudgeFilter
from counterstain.checkpoints import read_header, write_header
from counterstain.config import ConfigT, build
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet
from counterstain.data.phantom import write_phantom
from counterstain.data.phantom.styles import PhantomConfig
from counterstain.data.split import (
    SplitConfig,
    folds_of,
    keep_training_patients,
    link_cohort,
    link_packs,
    split_cohort,
    split_of_fit,
)
from counterstain.errors import MismatchError
from counterstain.generators.interface import ImageGenerator, load_generator
from counterstain.generators.methods import METHODS
from counterstain.progress import bar
from counterstain.remote import place_of
from counterstain.segmentation.counts import by_slide, dice, pooled, recalls
from counterstain.segmentation.evaluate import evaluate
from counterstain.segmentation.segmenter_config import SegmenterConfig
from counterstain.segmentation.train import train_segmenter
from counterstain.storage import read_json, read_sealed, write_json, write_parquet, write_sealed
from counterstain.study.cells import Cell
from counterstain.study.config import trainings
from counterstain.study.status import DONE_FILE, notes_of
from counterstain.synthesis.masks import SynthesisConfig
from counterstain.synthesis.synthesize import Filters, ImageFilter, synthesize
from counterstain.taxonomy import Taxonomy
from counterstain.training_config import with_training

PACKAGES = ("counterstain", "torch", "lightning", "diffusers", "segmentation-models-pytorch", "numpy", "zarr")
HARDNESS_FILE, AMOUNT_FILE = "hardness.json", "amount.json"


def run_cell(cell: Cell, root: Path) -> tuple[float, int]:
    """Do a cell's work and return its seconds and bytes; ``root`` is the folder of all cells."""
    start, note = time.monotonic(), root / cell.folder / DONE_FILE
    shorter = float(read_sealed(note).get("seconds", 0.0)) if note.exists() else 0.0
    note.unlink(missing_ok=True)  # of a shorter set, which is not whole while it grows
    WORK.get(cell.stage, _train)(cell, root)
    files = notes_of(root / cell.folder)
    seconds = time.monotonic() - start
    done = {"name": cell.name, "stage": cell.stage, "settings": cell.settings, "inputs": cell.inputs}
    took = {"seconds": seconds + shorter, **software(), "files": files}
    write_sealed(note, done | cell.details | took)
    return seconds, sum(size for size, _ in files.values())


def follow_cohort(cell: Cell, root: Path) -> None:
    """Where the cohort of a study, or the study itself, has been moved, note where the cohort lies now."""
    done = root / cell.folder / DONE_FILE
    if not done.exists():
        return
    noted = read_sealed(done)
    if any(noted.get(key) != place for key, place in cell.details.items()):
        write_sealed(done, noted | cell.details)
    whole = cell.details.get("whole_path") or ("whole" in cell.inputs and root / cell.inputs["whole"] / "cohort")
    if whole:
        link_packs(place_of(whole), root / cell.folder / "cohort")


def open_cohort(folder: Path) -> Cohort:
    """Open the cohort of a study from its cell's folder."""
    done = folder / DONE_FILE
    path = read_sealed(done).get("path") if done.exists() else None
    return Cohort.open(path or folder / "cohort")


def _make_cohort(cell: Cell, root: Path) -> None:
    if "path" in cell.details:
        return
    settings, folder = cell.settings, root / cell.folder / "cohort"
    if "whole" in cell.inputs:
        cohort = cohort_of_fold(_cohort(cell, root, "whole"), cell, folder)
    elif "whole_path" in cell.details:
        cohort = link_cohort(Cohort.open(cell.details["whole_path"]), folder)
    else:
        config = build(PhantomConfig, settings["phantom"])
        with bar("phantom", config.slides) as advance:
            cohort = write_phantom(config, folder, lambda: advance(1))
        if "split" in settings:
            cohort, _ = split_cohort(cohort, build(SplitConfig, settings["split"]), force=True)
    if "train_patients" in settings:
        keep_training_patients(cohort, settings["train_patients"], settings["train_patients_seed"])


def cohort_of_fold(whole: Cohort, cell: Cell, folder: Path) -> Cohort:
    """Make the cohort of a fold's cell, or of cross-fitting, with another split, or one of merged subtypes."""
    if "merge" in cell.settings:
        return link_cohort(whole, folder).write_merged(cell.settings["merge"])
    if "cross_fit" in cell.settings:
        split = split_of_fit(whole, *(cell.settings[name] for name in ("cross_fit", "fit", "seed")))
        return link_cohort(whole, folder).write_split(split)
    splits = folds_of(whole, *(cell.settings[name] for name in ("folds", "validation", "seed")))
    return link_cohort(whole, folder).write_split(splits[cell.fold - 1])


def _train(cell: Cell, root: Path) -> None:
    training = trainings()[cell.stage]
    needs = {stage: root / cell.inputs[stage] for stage in training.needs}
    config = _logged(training.config_class, cell)
    training.train(_cohort(cell, root), config, root / cell.folder, **needs, **_size_and_seed(cell))
    if "drawing" in cell.details:  # which made no difference to the training, but to those who draw with it later
        header = read_header(root / cell.folder)
        known = header.model_copy(update={"config": header.config | cell.details["drawing"]})
        write_header(root / cell.folder, known)


def _synthesize(cell: Cell, root: Path) -> None:
    cohort, method = _cohort(cell, root), cell.settings["method"]
    checkpoint = root / cell.inputs["generator"] if "generator" in cell.inputs else None
    drawing = {name: cell.settings[name] for name in METHODS[method].drawing}
    config = build(SynthesisConfig, cell.settings["config"])
    if "hardness" in cell.inputs:
        found = read_json(root / cell.inputs["hardness"] / HARDNESS_FILE)
        relabel = config.relabel.model_copy(update={"target": found["subtypes"]})
        config = config.model_copy(update={"relabel": relabel, "slides": found["slides"]})
    generator = load_generator(method, checkpoint, cohort, drawing)
    synthesize(
        generator,
        cohort,
        root / cell.settings.get("set", cell.folder),
        config,
        count=int(cell.details["count"]),
        shards=range(cell.settings["first"], cell.settings["end"]) if cell.stage == "shards" else None,
        judge=_filters(cell, root, cohort, generator),
        **_size_and_seed(cell),
    )


def _filters(cell: Cell, root: Path, cohort: Cohort, generator: ImageGenerator) -> ImageFilter | None:
    size_px, found = int(cell.settings["size_px"]), list[ImageFilter]()
    if "filter" in cell.settings:
        config = build(JudgeFilterConfig, cell.settings["filter"])
        found.append(JudgeFilter.load(root / cell.inputs["judge"], cohort, config, size_px=size_px))
    if "novel" in cell.settings:
        found.append(NoveltyFilter.of(generator, cohort, size_px, cell.settings["novel"]))
    return Filters.of(*found)


def _train_segmenter(cell: Cell, root: Path) -> None:
    synthetic = PatchSet.open(root / cell.inputs["synthetic"]) if "synthetic" in cell.inputs else None
    amount = cell.settings["amount"]
    if "amount" in cell.inputs:
        amount = read_json(root / cell.inputs["amount"] / AMOUNT_FILE)["amount"]
    train_segmenter(
        _cohort(cell, root),
        _logged(SegmenterConfig, cell),
        root / cell.folder,
        synthetic=synthetic,
        amount=amount,
        share=cell.settings.get("share"),
        critic=root / cell.inputs["critic"] if "critic" in cell.inputs else None,
        ignore_above=cell.settings.get("ignore_above", 0.0),
        border_um=cell.settings.get("border_um", 0.0),
        left_out=cell.settings.get("left_out", ()),
        label=cell.name,
        **_size_and_seed(cell),
    )


def _evaluate(cell: Cell, root: Path) -> None:
    cohort = _cohort(cell, root)
    segmenter = root / cell.inputs["segmenter"]
    parts, merge = cell.settings["parts"], cell.settings.get("merge")
    tables = [evaluate(segmenter, cohort, part, label=f"{cell.name} {part}", merge=merge) for part in parts]
    write_parquet(root / cell.folder / "counts.parquet", pd.concat(tables, ignore_index=True))


def _find_hardness(cell: Cell, root: Path) -> None:
    counts = [
        pd.read_parquet(root / folder / "counts.parquet") for role, folder in cell.inputs.items() if role != "cohort"
    ]
    table = pd.concat(counts, ignore_index=True)
    found = hardness(table[table["split"] == "test"], _cohort(cell, root).taxonomy, cell.settings["keep"])
    write_json(root / cell.folder / HARDNESS_FILE, found)


def _choose_amount(cell: Cell, root: Path) -> None:
    counts: dict[float, list[pd.DataFrame]] = defaultdict(list)
    for role, folder in cell.inputs.items():
        if role != "cohort":
            name, _, fit = role.rpartition(", fit ")
            table = pd.read_parquet(root / folder / "counts.parquet").assign(fit=int(fit))
            counts[cell.settings["tried"][name]].append(table)
    found = chosen_amount({amount: pd.concat(tables, ignore_index=True) for amount, tables in counts.items()})
    write_json(root / cell.folder / AMOUNT_FILE, found)


def _cohort(cell: Cell, root: Path, role: str = "cohort") -> Cohort:
    folder = root / cell.inputs[role]
    cohort = open_cohort(folder)
    expected = read_sealed(folder / DONE_FILE)["settings"].get("fingerprint")
    if expected and cohort.fingerprint != expected:
        raise MismatchError(
            f"{cohort.folder}: changed since the study began; run the study again to begin anew with it"
        )
    return cohort


def _logged(kind: type[ConfigT], cell: Cell) -> ConfigT:
    config = build(kind, cell.settings["config"])
    given = {key: value for key, value in cell.details.items() if key in {"logger", "workers"}}
    return with_training(config, given) if given else config


def _size_and_seed(cell: Cell) -> dict[str, Any]:
    return {"size_px": int(cell.settings["size_px"]), "seed": int(cell.settings["seed"])}


def software() -> dict[str, Any]:
    """Return the versions of this process and its device."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {"versions": versions, "device": device}


def merged(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what several cells were made with; where they differ, all of it."""
    versions = defaultdict[str, set[str]](set)
    devices = {record["device"] for record in records}
    for record in records:
        for package, number in record["versions"].items():
            versions[package].add(number)
    joined = {package: " and ".join(sorted(numbers)) for package, numbers in versions.items()}
    return {"versions": joined, "device": " and ".join(sorted(devices))}


WORK: dict[str, Callable[[Cell, Path], None]] = {
    "cohort": _make_cohort,
    "shards": _synthesize,
    "synthetic": _synthesize,
    "segmenter": _train_segmenter,
    "evaluation": _evaluate,
    "hardness": _find_hardness,
    "amount": _choose_amount,
}
"""Stage -> what its cells do; the other stages are trainings."""


# Cross-fitting: what segmenters find hard on training patients that they have not seen, and which amount serves them.
# Training patients are dealt into folds, stratified by score; what is trained without a fold is tested on it, and on
# the validation patients. Test patients of the study take no part.


def hardness(counts: pd.DataFrame, taxonomy: Taxonomy, keep: Collection[str] = ()) -> dict[str, Any]:
    """Say what segmenters find hard, from counts by slide of training patients whom they have not seen.

    ``subtypes``: share of each subtype among relabelled instances, in proportion to the share of its pixels that is
    missed (1 / K each if none is); those in ``keep`` and those without pixels get none. ``slides``: how often masks are
    cut out of each, in proportion to its rank by the share of its pixels that is wrong, the easiest having rank 1 (Yang
    et al., FreeMask, NeurIPS 2023: the number of images grows with the rank of their mask).
    """
    missed = 1 - recalls(pooled(counts))
    known = {name: miss for name, miss in zip(taxonomy.names, missed.tolist(), strict=True) if name not in keep}
    known = {name: miss for name, miss in known.items() if not np.isnan(miss)}
    total = sum(known.values())
    shares = {name: miss / total if total else 1 / len(known) for name, miss in known.items()}
    tables, slides = by_slide(counts), sorted({*zip(counts["patient"], counts["slide"], strict=True)})
    counted = tables.sum(axis=(1, 2)) > 0  # all of a slide may be ignored
    tables, slides = tables[counted], [slide for slide, some in zip(slides, counted, strict=True) if some]
    wrong = (tables[:, 0, 1] + tables[:, 1:, 0].sum(axis=1)) / tables.sum(axis=(1, 2))
    ranks = wrong.argsort(kind="stable").argsort(kind="stable") + 1
    return {
        "subtypes": shares,
        "slides": {slide: int(rank) for (_, slide), rank in zip(slides, ranks, strict=True)},
        "missed": known,
        "wrong": {slide: float(share) for (_, slide), share in zip(slides, wrong, strict=True)},
    }


def chosen_amount(counts: Mapping[float, pd.DataFrame]) -> dict[str, Any]:
    """Choose an amount by the one-standard-error rule (Breiman et al. 1984; Hastie et al. 2009, section 7.10).

    ``counts`` holds the counts by slide of each amount, of the same patients, with a column ``fit`` (the fold). The
    result has ``amount``: the smallest one that falls behind the best by at most one standard error, of the mean over
    patients of the difference in Dice; and ``table``, a row for each amount: ``amount``, ``dice`` (mean over patients),
    ``behind``, ``standard_error``.
    """
    scores = {amount: _dice_by_patient(table) for amount, table in sorted(counts.items())}
    means = {amount: float(score.mean()) for amount, score in scores.items()}
    best = max(means, key=lambda amount: (means[amount], -amount))
    rows = []
    for amount, score in scores.items():
        behind = (scores[best] - score).dropna()
        error = float(behind.std(ddof=1) / len(behind) ** 0.5) if len(behind) > 1 else 0.0
        row = {"amount": amount, "dice": means[amount], "behind": float(behind.mean()), "standard_error": error}
        rows.append(row)
    chosen = next(row["amount"] for row in rows if row["behind"] <= row["standard_error"])
    return {"amount": chosen, "best": best, "patients": len(scores[best]), "table": rows}


def _dice_by_patient(counts: pd.DataFrame) -> pd.Series:
    """Return each patient's Dice, of validation patients the mean over the folds."""
    rows = [(patient, float(dice(pooled(table)))) for (patient, _), table in counts.groupby(["patient", "fit"])]
    return pd.DataFrame(rows, columns=["patient", "dice"]).groupby("patient")["dice"].mean().dropna()
