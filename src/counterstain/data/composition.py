"""What a cohort is made of: counts and areas by part and subtype, and what is missing."""

from __future__ import annotations

import pandas as pd

from counterstain.data.cohort import PARTS, Cohort

UNSPLIT = "no part"  # in tables, for patients without one


def parts_table(cohort: Cohort) -> pd.DataFrame:
    """Return a row per part in use: part, patients, slides, regions, area_mm2."""
    px2 = (cohort.mpp / 1000) ** 2
    regions = cohort.regions.assign(
        part=_named_parts(cohort.regions["split"]),
        area_mm2=cohort.regions["height_px"] * cohort.regions["width_px"] * px2,
    )
    table = regions.groupby("part", observed=True).agg(
        patients=("patient", "nunique"), slides=("slide", "nunique"), regions=("region", "size"),
        area_mm2=("area_mm2", "sum"),
    )  # fmt: skip
    return table.reindex([part for part in (*PARTS, UNSPLIT) if part in table.index]).reset_index()


def subtypes_table(cohort: Cohort) -> pd.DataFrame:
    """Return a row per part in use and subtype, present or not.

    Columns part, subtype, slides, instances, instance_share, area_mm2, area_share; shares are of the part, 0 to 1.
    """
    counts = cohort.composition()
    counts["part"] = _named_parts(counts["split"])
    grouped = counts.groupby(["part", "subtype"]).agg(
        slides=("slide", "nunique"), instances=("instances", "sum"), area_px=("area_px", "sum")
    )
    every = pd.MultiIndex.from_product(
        [parts_table(cohort)["part"], cohort.taxonomy.names], names=["part", "subtype"]
    )  # pixels to be ignored are no subtype
    table = grouped.reindex(every, fill_value=0).reset_index()
    for column, share in (("instances", "instance_share"), ("area_px", "area_share")):
        total = table.groupby("part")[column].transform("sum")
        table[share] = table[column] / total.where(total > 0, 1)
    table["area_mm2"] = table["area_px"] * (cohort.mpp / 1000) ** 2
    return table[["part", "subtype", "slides", "instances", "instance_share", "area_mm2", "area_share"]]


def missing_subtypes(cohort: Cohort) -> list[str]:
    """Return a warning for every part in use that has no instance of some subtypes."""
    table = subtypes_table(cohort)
    missing = table[(table["instances"] == 0) & (table["part"] != UNSPLIT)]
    return [
        f"part {part} has no {', '.join(rows['subtype'])}: it says nothing about "
        f"{'it' if len(rows) == 1 else 'them'}; move a patient there that has some"
        for part, rows in missing.groupby("part", sort=False)
    ]


def _named_parts(split: pd.Series) -> pd.Series:
    return split.astype(object).where(split.notna(), UNSPLIT)
