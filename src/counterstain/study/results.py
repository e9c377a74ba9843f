"""The results of a study as small files that a report, or anybody, can read without the study's models.

RESULTS holds ``study.json`` (what was run), ``results.csv`` (a row per arm, repeat and part with every measure),
``counts.parquet`` (pixels per arm, repeat, fold, part, slide and label: everything else follows from them),
``composition.csv``, ``synthetic.csv`` (balance of the sets), ``losses.csv``, ``fairness.csv`` (what each training
was given), ``amounts.csv`` (what cross-fitting found of each amount) and ``examples/`` (pictures); for the report
alone ``trainings.json``, ``sets.json`` (what is known of every training and set) and ``gallery.parquet``. Where a study
merges subtypes, all this is of the merged ones, and ``unmerged/`` holds ``results.csv`` and ``counts.parquet`` of the
original ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from counterstain.checkpoints import is_finished, read_header
from counterstain.data.cohort import PARTS as COHORT_PARTS
from counterstain.data.cohort import Cohort, subtypes_table
from counterstain.data.patch_set import PatchSet
from counterstain.data.review import Review
from counterstain.generators.methods import METHODS
from counterstain.recipe import Recipe
from counterstain.segmentation.counts import TABLE_COLUMNS, measures
from counterstain.storage import (
    LOG_FOLDER,
    committing,
    read_json,
    read_sealed,
    write_csv,
    write_json,
    write_parquet,
    write_sealed,
)
from counterstain.study.cells import CELLS, REFERENCE, Cell
from counterstain.study.config import StudyConfig
from counterstain.study.pictures import write_examples, write_gallery
from counterstain.study.records import fairness_table
from counterstain.study.stages import AMOUNT_FILE, merged, open_cohort, software
from counterstain.study.status import DONE_FILE, FILES_FILE, is_done, notes_of
from counterstain.synthesis.synthesize import rejections
from counterstain.taxonomy import Taxonomy

UNMERGED = "unmerged"
POINTS_PER_CURVE, DIGITS_PER_POINT = 100, 5  # finer than any plot shows; a study has some hundred curves


def write_results(
    study: StudyConfig, recipe: Recipe, cells: Sequence[Cell], out: Path, failures: dict[str, str]
) -> Path:
    """Collect the results of all finished cells in one step, but for cross-fitting, and return their folder."""
    root = out / CELLS
    notes = [read_sealed(root / cell.folder / DONE_FILE) for cell in cells if is_done(cell, root)]
    cells = [cell for cell in cells if not cell.fit]
    done = [cell for cell in cells if is_done(cell, root)]
    cohort, merge = open_cohort(root / cells[0].folder), study.cohort.merge
    used = [c for c in done if c.stage == "cohort" and ("merge" in c.settings) == (merge is not None)]
    folds = [c for c in used if c.fold]
    if folds:
        cohort.regions["split"] = "test"  # each patient is tested in one of them
    counts = original = counts_of(cells, root)
    if merge is not None:
        lookup, unmerged, cohort = cohort.taxonomy.merge_lookup(merge), cohort.taxonomy, cohort.merged(merge)
        counts = merged_counts(counts, lookup)
    sets = {(c.set_name, c.fold): PatchSet.open(root / c.folder) for c in done if c.stage == "synthetic"}
    by_name = {name: [found for (other, _), found in sets.items() if other == name] for name, _ in sets}
    with committing(out / "results") as folder:
        happened = {
            "seconds": pd.DataFrame(notes).groupby("stage", sort=False)["seconds"].sum().to_dict(),
            "failed": [{"cell": name, "why": why} for name, why in failures.items()],
            "filter": {method: _filtered(found) for method, found in by_name.items()},
            # What the cells noted: this process may have made none of them.
            **merged([note for note in notes if "versions" in note] or [software()]),
        }
        if chosen := [cell for cell in done if cell.stage == "amount"]:
            tried = _amounts_tried(chosen, root)
            happened["amounts"] = tried[tried["chosen"]].groupby("arm", sort=False)["amount"].agg(list).to_dict()
            write_csv(folder / "amounts.csv", tried)
        if folds:
            happened["folds"] = [_fold_record(open_cohort(root / cell.folder)) for cell in folds]
        write_json(folder / "study.json", _study(study, recipe, cohort) | happened)
        write_csv(folder / "results.csv", measures_table(counts, cohort.taxonomy))
        counts.to_parquet(folder / "counts.parquet", index=False)
        if merge is not None:
            write_parquet(folder / UNMERGED / "counts.parquet", original)
            write_csv(folder / UNMERGED / "results.csv", measures_table(original, unmerged))
        composition = cohort.composition()
        write_csv(folder / "composition.csv", composition[composition["split"].notna()])
        write_csv(folder / "synthetic.csv", _balance(by_name))
        write_csv(folder / "losses.csv", _losses(done, root))
        # A filtered set has other masks in some places, so its images do not stand beside the others'.
        first = (folds or used or cells)[0]
        shown = {name: found for (name, fold), found in sets.items() if name in METHODS and fold == first.fold}
        write_examples(folder / "examples", open_cohort(root / first.folder), shown)
        write_csv(folder / "fairness.csv", fairness_table(done, root))
        trained = [cell for cell in done if is_finished(root / cell.folder)]
        write_json(folder / "trainings.json", [_training_record(cell, root) for cell in trained])
        reviewed = {cell.inputs["synthetic"] for cell in done if "left_out" in cell.settings}
        write_json(
            folder / "sets.json",
            [_set_record(*key, found, review=found.folder.name in reviewed) for key, found in sets.items()],
        )
        write_gallery(folder / "gallery.parquet", cohort, sets, study.gallery)
        write_sealed(folder / FILES_FILE, {"files": notes_of(folder)})
    return out / "results"


def _amounts_tried(cells: Sequence[Cell], root: Path) -> pd.DataFrame:
    """Return a row per arm, fold and amount, with what cross-fitting found; see ``stages.chosen_amount``."""
    found = [(cell, read_json(root / cell.folder / AMOUNT_FILE)) for cell in cells]
    return pd.DataFrame(
        {"arm": cell.arm, "fold": cell.fold, **row, "chosen": row["amount"] == tried["amount"]}
        for cell, tried in found
        for row in tried["table"]
    )


def measures_table(counts: pd.DataFrame, taxonomy: Taxonomy) -> pd.DataFrame:
    """Return a row per arm, repeat and part; columns: arm, repeat, split, then the measures."""
    keys = ["arm", "repeat", "split"]
    cells = counts.groupby(keys, sort=False)
    return pd.DataFrame([dict(zip(keys, key, strict=True)) | measures(table, taxonomy) for key, table in cells])


def merged_counts(counts: pd.DataFrame, lookup: np.ndarray) -> pd.DataFrame:
    """Add up the counts by slide of subtypes that are put together, by the new label of every old one, (256,)."""
    keys = [name for name in counts if not str(name).startswith("predicted_")]
    merged = counts.assign(subtype=lookup.astype("int64")[counts["subtype"].to_numpy(int)])
    return merged.groupby(keys, sort=False, dropna=False, as_index=False).sum()


def counts_of(cells: Sequence[Cell], root: Path) -> pd.DataFrame:
    """Return the counts of evaluations, with the columns arm and repeat (and fold, if there are any) before theirs.

    Arms and repeats that are not finished in every fold are left out: all must be tested on the same patients.
    """
    evaluations = [cell for cell in cells if cell.stage == "evaluation"]
    unfinished = {(cell.arm, cell.repeat) for cell in evaluations if not is_done(cell, root)}
    columns = ["arm", "repeat", *(["fold"] if any(cell.fold for cell in evaluations) else []), *TABLE_COLUMNS]
    tables = [
        pd.read_parquet(root / cell.folder / "counts.parquet").assign(arm=cell.arm, repeat=cell.repeat, fold=cell.fold)[
            columns
        ]
        for cell in evaluations
        if (cell.arm, cell.repeat) not in unfinished
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def _study(study: StudyConfig, recipe: Recipe, cohort: Cohort) -> dict[str, Any]:
    config = study.model_dump(mode="json", exclude={"recipe", "cohort"})
    return {
        "name": study.name,
        "preset": study.preset,
        "taxonomy": cohort.taxonomy.model_dump(mode="json"),
        "cohort": about_cohort(cohort),
        "config": {"study": config, "cohort": cohort.source, "recipe": recipe.model_dump(mode="json")},
        "arms": [asdict(arm) for arm in study.arms],
        "reference": REFERENCE,
        "repeats": study.repeats,
    }


def about_cohort(cohort: Cohort) -> dict[str, Any]:
    """Return what results say of a cohort."""
    return {
        "source": str(cohort.source.get("kind", "")),
        "mpp": cohort.mpp,
        "fingerprint": cohort.fingerprint,
        "regions": int(cohort.regions["split"].notna().sum()),
        "patients": {part: len(cohort.patients(part)) for part in COHORT_PARTS},
    }


def _fold_record(cohort: Cohort) -> dict[str, Any]:
    """Return a fold's patients by part, and the subtypes that only others than its training patients have."""
    counts = subtypes_table(cohort).pivot_table("instances", "subtype", "split", sort=False)
    lacking = counts.index[(counts["train"] == 0) & counts.any(axis=1)]
    return {part: cohort.patients(part) for part in COHORT_PARTS} | {"lacking": lacking.tolist()}


def _filtered(sets: Sequence[PatchSet]) -> dict[str, Any]:
    """Count what a filter rejected in the sets of one name, one for each fold."""
    patches, header = pd.concat([found.patches for found in sets]), sets[0].header
    attempts = patches["attempts"]
    counts = {"drawn": int(attempts.sum()), "rejected": int((attempts - 1).sum())}
    if "filter" not in header.settings:
        return counts
    never = (~patches["kept"]).sum() if "kept" in patches else 0  # an early version did not note it
    by_subtype = rejections(pd.concat([found.judged for found in sets]), header.taxonomy)
    return counts | {"never_passed": int(never), "by_subtype": by_subtype.fillna(0.0).to_dict("records")}


def _balance(sets: dict[str, list[PatchSet]]) -> pd.DataFrame:
    columns = ["method", "subtype", "instances", "area_px", "instances_before", "area_px_before"]
    balances = {method: pd.concat([found.balance() for found in of_folds]) for method, of_folds in sets.items()}
    tables = [
        table.groupby("subtype", sort=False, as_index=False).sum().assign(method=method)
        for method, table in balances.items()
    ]
    return pd.concat([pd.DataFrame(columns=columns), *tables], ignore_index=True)[columns]


def _losses(done: Sequence[Cell], root: Path) -> pd.DataFrame:
    tables = []
    for cell in done:
        file = root / cell.folder / "losses.csv"
        if file.exists():
            table = pd.read_csv(file)
            steps = np.sort(table["step"].unique())
            kept = steps[np.linspace(0, len(steps) - 1, min(len(steps), POINTS_PER_CURVE)).round().astype(int)]
            shown = table[table["step"].isin(kept)].assign(stage=cell.set_name or cell.name)
            tables.append(shown.assign(value=[float(f"{value:.{DIGITS_PER_POINT}g}") for value in shown["value"]]))
    columns = ["stage", "step", "name", "value"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _set_record(name: str, fold: int, found: PatchSet, *, review: bool) -> dict[str, Any]:
    """Describe a set: its header, where its masks come from, what was relabelled to what, what was rejected by whom."""
    header, patches, attempts = found.header, found.patches, found.patches["attempts"]
    copied = ("size_px", "mpp", "cohort", "generator", "settings", "version")
    return {
        "name": name,
        **({"fold": fold} if fold else {}),
        "method": header.method,
        "patches": len(found),
        "seed": str(header.seed),  # of 64 bits: more than a number in JSON is sure to hold
        "patients_seen": list(header.patients_seen),
        **{key: getattr(header, key) for key in copied},
        "sources": {kind: int(patches[kind].nunique()) for kind in ("region", "slide", "patient")},
        "drawn": int(attempts.sum()),
        "rejected": int((attempts - 1).sum()),
        "background_only": len(found) - int(found.instances["index"].nunique()),
        "changes": _changes(found),
        **({"review": Review(found).provenance()} if review else {}),
    }


def _changes(found: PatchSet) -> list[dict[str, Any]]:
    """Return a row per old and new subtype (names)."""
    taxonomy = found.header.taxonomy
    known = found.instances[found.instances["subtype"].between(1, len(taxonomy.subtypes))]
    rows: pd.DataFrame = (
        known.groupby(["subtype_before", "subtype"])["area_px"].agg(["size", "sum"]).reset_index().astype("int64")
    )
    return [
        {"before": taxonomy.name_of(before), "after": taxonomy.name_of(after), "instances": count, "area_px": area}
        for before, after, count, area in rows.itertuples(index=False, name=None)
    ]


def _training_record(cell: Cell, root: Path) -> dict[str, Any]:
    folder = root / cell.folder
    header, logs = read_header(folder), folder / LOG_FOLDER
    training = header.config.get("training", {})
    return {
        "name": cell.name,
        "stage": cell.stage,
        "sha256": header.sha256,
        "steps": int(header.notes.get("steps", training.get("steps", 0))),
        "batch_size": int(training.get("batch_size", 0)),
        "patients_seen": len(header.patients_seen),
        "seconds": float(read_sealed(folder / DONE_FILE)["seconds"]),
        # Where its curves lie, from the study's folder.
        "logs": logs.relative_to(root.parent).as_posix() if logs.is_dir() else "",
    }
