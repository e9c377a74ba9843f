"""Values of a study's arms over repeats, and their differences to the reference arm."""

from __future__ import annotations

import pandas as pd

from counterstain.study.statistics.count_array import require_reference

KEYS = ("arm", "repeat", "split")
EFFECT = ["arm", "split", "measure", "n", "reference", "value", "mean", "sd", "min", "max", "relative"]


def measures_of(results: pd.DataFrame) -> list[str]:
    """Return the columns of a results table that are measures."""
    return [str(column) for column in results.columns if column not in KEYS]


def spread(results: pd.DataFrame) -> pd.DataFrame:
    """Return mean, sd (ddof 1), min, max and n over the repeats: a row per arm, split and measure."""
    long = results.melt(id_vars=list(KEYS), value_vars=measures_of(results), var_name="measure")
    groups = long.groupby(["arm", "split", "measure"], sort=False)["value"]
    return groups.agg(mean="mean", sd="std", min="min", max="max", n="count").reset_index()


def differences(results: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return the differences of every arm to the reference arm, paired by repeat.

    Parameters
    ----------
    results : DataFrame
        A row per arm, repeat and split; every other column is a measure.
    reference : str
        Name of the arm that the others are held against.

    Returns
    -------
    DataFrame
        A row per arm, split and measure: ``n`` pairs; ``reference`` and ``value``, the two means over these pairs;
        ``mean``, ``sd`` (ddof 1; NaN for one pair), ``min`` and ``max`` of the differences; ``relative``, the mean
        difference as a share of ``reference``.

    Raises
    ------
    InputError
        The reference arm has no row.
    """
    require_reference(results, reference)
    long = results.melt(id_vars=list(KEYS), value_vars=measures_of(results), var_name="measure").dropna()
    of_reference = long.loc[long["arm"] == reference].drop(columns="arm").rename(columns={"value": "reference"})
    pairs = long.loc[long["arm"] != reference].merge(of_reference, on=["repeat", "split", "measure"])
    pairs["difference"] = pairs["value"] - pairs["reference"]
    groups = pairs.groupby(["arm", "split", "measure"], sort=False)
    table = groups.agg(
        n=("difference", "size"),
        reference=("reference", "mean"),
        value=("value", "mean"),
        mean=("difference", "mean"),
        sd=("difference", "std"),
        min=("difference", "min"),
        max=("difference", "max"),
    ).reset_index()
    table["relative"] = table["mean"] / table["reference"].where(table["reference"] != 0)
    return table[EFFECT]
