"""What a filter of drawn images answers, and how often it refused what.

The filter itself belongs to the audit; drawing only asks it. So the same filter serves every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from counterstain.data.patches import Patch
from counterstain.taxonomy import Taxonomy


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a filter says of one drawn image."""

    kept: bool
    instances: tuple[tuple[int, bool], ...]
    """Asked subtype of each judged instance, and whether it looks like it."""


class ImageFilter(Protocol):
    """A judge of drawn images; what it says of one must not depend on the others."""

    @property
    def masks(self) -> int:
        """How many masks are tried at most for one patch."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that its verdicts depend on, for the record."""

    @property
    def patients_seen(self) -> Sequence[str]:
        """Patients that it learnt from."""

    def __call__(self, patches: Sequence[Patch], redraw: np.ndarray) -> list[Verdict]:
        """Judge images with their asked subtypes; ``redraw`` (n, H, W) bool says which pixels were drawn anew."""


def rejections(judged: pd.DataFrame, taxonomy: Taxonomy) -> pd.DataFrame:
    """Count what a filter refused, by subtype.

    Parameters
    ----------
    judged : pandas.DataFrame
        A row per drawn and judged instance: ``index``, ``drawing``, ``subtype``, ``agreed``, ``kept`` (its image).

    Returns
    -------
    pandas.DataFrame
        A row per subtype: ``subtype`` (name), ``drawn`` (instances), ``disagreed`` (those that look like another
        subtype), ``refused`` (those in refused images), ``rejection_rate`` (refused / drawn; NaN where none was drawn).
    """
    rows = []
    for subtype in taxonomy.subtypes:
        of_subtype = judged[judged["subtype"] == subtype.id]
        drawn, refused = len(of_subtype), int((~of_subtype["kept"]).sum())
        rate = refused / drawn if drawn else float("nan")
        rows.append((subtype.name, drawn, int((~of_subtype["agreed"]).sum()), refused, rate))
    return pd.DataFrame(rows, columns=["subtype", "drawn", "disagreed", "refused", "rejection_rate"])
