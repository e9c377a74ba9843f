"""Instances as 16 bits grey, the most that PNG holds."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from counterstain.errors import InputError

MAX_INSTANCE = 2**16 - 1


def stored_numbers(ids: pd.Series) -> pd.Series:
    """Return the number that each instance of an image has in its file: its own, or its rank where one is too large."""
    return ids if ids.max() <= MAX_INSTANCE else ids.rank(method="dense").astype("int64")


def stored_instances(instances: np.ndarray, ids: Iterable[int], name: str) -> np.ndarray:
    """Return an instance map, (H, W) int32, as it is stored, (H, W) uint16.

    Parameters
    ----------
    instances : (H, W) int32 array
    ids : iterable of int
        All instances of the image.
    name : str
        Of the image, for the message.

    Raises
    ------
    InputError
        There are more instances than 16 bits can number.
    """
    known = np.array(sorted(ids), np.int64)
    if len(known) > MAX_INSTANCE:
        raise InputError(f"{name}: has {len(known):,} instances, PNG holds {MAX_INSTANCE:,}; import smaller regions")
    if instances.max(initial=0) <= MAX_INSTANCE:
        return instances.astype(np.uint16)
    return np.where(instances == 0, 0, np.searchsorted(known, instances) + 1).astype(np.uint16)
