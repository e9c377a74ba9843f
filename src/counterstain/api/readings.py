"""Readings: what people say of drawn patches, in reviews of synthetic sets and in blind tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from counterstain.api import PathLike, open_cohort, verb

if TYPE_CHECKING:
    from counterstain.audit.reading_test import ReadingTest
    from counterstain.data.cohort import Cohort
    from counterstain.data.patch_set import PatchSet


@verb
def make_reading_test(
    cohort: PathLike | Cohort,
    *,
    synthetic: PathLike | PatchSet,
    out: PathLike,
    split: str | None = None,
    count: int = 40,
    seed: int = 0,
) -> ReadingTest:
    """Make a blind reading test: real patches of held-out tissue and drawn ones, in random order.

    For each drawn patch there is a real one that shows the same subtypes; no two overlap by more than a quarter. The
    key is written beside the folder, as OUT.key.json, and is needed for the result alone.

    Parameters
    ----------
    cohort : str, Path or Cohort
        The cohort that the set was made from.
    synthetic : str, Path or PatchSet
        Drawn patches, best for held-out masks: 'counterstain synthesize --split test'.
    out : str or Path
        Folder of the test, which readers may see.
    split : str, optional
        val or test: where real patches are cut out [default: as the masks of the set; test if those are of train].
    count : int
        Questions; half of the patches are real.
    seed : int
        Of the choice of patches and their order.
    """
    from counterstain.audit.reading_patches import write_reading_test
    from counterstain.data.patch_set import PatchSet

    patches = synthetic if isinstance(synthetic, PatchSet) else PatchSet.open(Path(synthetic))
    return write_reading_test(open_cohort(cohort), patches, Path(out), part=split, count=count, seed=seed)
