"""What subtypes a cohort shows, and which of its parts and folds lack some."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import pandas as pd

from counterstain.data.cohort import UNSPLIT, Cohort, subtypes_table


def tissue_shares(cohort: Cohort) -> dict[str, float]:
    """Return the share, 0 to 1, that each subtype covers of the regions that show it."""
    regions = cohort.regions.set_index("region")
    px = cohort.instances["region"].map(regions["height_px"] * regions["width_px"])
    by_region = cohort.instances.assign(region_px=px).groupby(["subtype", "region"])
    table = by_region.agg(area_px=("area_px", "sum"), region_px=("region_px", "first")).groupby("subtype").sum()
    return {
        cohort.taxonomy.name_of(int(str(s))): float(row["area_px"] / row["region_px"]) for s, row in table.iterrows()
    }


def unseen_in_training(cohort: Cohort) -> list[str]:
    """Return the subtypes of which no training region shows an instance, in the order of the taxonomy."""
    shown = cohort.composition()
    seen = {*shown["subtype"][shown["split"] == "train"]}
    return [name for name in cohort.taxonomy.names if name not in seen]


def missing_subtypes(cohort: Cohort) -> list[str]:
    """Return a warning for every split in use that has no instance of some subtypes."""
    table = subtypes_table(cohort)
    missing = table[(table["instances"] == 0) & (table["split"] != UNSPLIT)]
    return [
        f"split {split} has no {', '.join(rows['subtype'])}, so nothing can be measured there for "
        f"{'it' if len(rows) == 1 else 'them'}; move a patient there that has some"
        for split, rows in missing.groupby("split", sort=False)
    ]


def untrained_subtypes(cohort: Cohort, splits: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Yield a warning for every fold that trains without a subtype of the cohort."""
    seen = cohort.composition()
    seen = seen[seen["subtype"].isin(cohort.taxonomy.names)]
    for fold, split in enumerate(splits, 1):
        if lacking := {*seen["subtype"]} - {*seen["subtype"][seen["patient"].map(split) == "train"]}:
            yield f"fold {fold} trains without {', '.join(sorted(lacking))}; {_why(seen, lacking, splits)}"


def _why(seen: pd.DataFrame, lacking: Collection[str], splits: Sequence[Mapping[str, str]]) -> str:
    patients = seen[seen["subtype"].isin(lacking)].groupby("subtype")["patient"].unique()
    single = [f"only patient {owners[0]} has {name}" for name, owners in patients.items() if len(owners) == 1]
    if len(single) < len(patients) and len(splits) < len(splits[0]):
        return "; ".join([*single, "more folds leave more patients to train on"])
    few = [f"only patients {', '.join(sorted(o))} have {name}" for name, o in patients.items() if len(o) > 1]
    return "; ".join([*single, *few])
