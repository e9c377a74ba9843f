"""Readings: what people say of drawn patches, in reviews of synthetic sets and in blind tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from counterstain.api import Numbers, PathLike, numbers_of, open_cohort, verb

if TYPE_CHECKING:
    import pandas as pd

    from counterstain.audit.judge import Judge
    from counterstain.audit.reading_result import ReadingResult
    from counterstain.audit.reading_test import ReadingTest
    from counterstain.data.cohort import Cohort
    from counterstain.data.patch_set import PatchSet
    from counterstain.data.review import Review


@verb
def review(
    synthetic: PathLike | PatchSet,
    *,
    reviewer: str | None = None,
    accept: Numbers | None = None,
    reject: Numbers | None = None,
    unsure: Numbers | None = None,
    undo: bool = False,
    audit: PathLike | None = None,
    judge: PathLike | None = None,
) -> Review:
    """Accept and reject patches of a synthetic set, and show how far its review is.

    Decisions are kept in the set at once, with who made them and when; nothing is ever deleted. 'segment', 'export' and
    the arms +reviewed of a study leave rejected patches out.

    Parameters
    ----------
    synthetic : str, Path or PatchSet
        Synthetic set.
    reviewer : str, optional
        Name or number of who decides.
    accept, reject, unsure : str or sequence of int, optional
        Numbers of patches, such as 3,17,42.
    undo : bool
        Take back this reviewer's last decision.
    audit : str or Path, optional
        Folder of an audit of the set: near copies of training tissue are listed first.
    judge : str or Path, optional
        Judge that says which patches look as asked, of a set that was drawn without a filter.
    """
    from counterstain.data.patch_set import PatchSet
    from counterstain.data.review import Review

    patches = synthetic if isinstance(synthetic, PatchSet) else PatchSet.open(synthetic)
    opened = Review(patches, reviewer, audit=audit, judged=None if judge is None else judged_by(judge, patches))
    decided = {"accept": accept, "reject": reject, "unsure": unsure}
    numbers = {decision: numbers_of(given, decision) or [] for decision, given in decided.items()}
    opened.check([number for found in numbers.values() for number in found])
    for decision, found in numbers.items():
        for number in found:
            opened.decide(number, decision)
    if undo:
        opened.undo()
    return opened


def judged_by(judge: PathLike | Judge, patches: PatchSet) -> Callable[[], pd.Series]:
    """Return what says, when it is called, how far each patch of a set looks to a judge as asked.

    Raises MismatchError where the judge is of another taxonomy or resolution.
    """
    from counterstain.api.drawing import open_judge
    from counterstain.audit.judge import Judge, agreement

    header = patches.header
    opened = judge if isinstance(judge, Judge) else open_judge(judge, header.taxonomy, header.mpp)
    return lambda: agreement(opened, patches)


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


@verb
def score_reading_test(
    test: PathLike, *, key: PathLike | None = None, out: PathLike | None = None, study: PathLike | None = None
) -> ReadingResult:
    """Score a blind reading test: how well readers tell drawn from real patches, and which subtypes they saw.

    Accuracy and rates with exact 95 % intervals, d', subtypes by confusion, agreement between readers (kappa).

    Parameters
    ----------
    test : str or Path
        Folder of the test, with its answers.
    key : str or Path, optional
        The key [default: TEST.key.json beside the folder].
    out : str or Path, optional
        Folder of readers.csv, confusion.csv and agreement.csv [default: TEST-result beside the test].
    study : str or Path, optional
        Folder of a study whose report is to show the result.
    """
    from counterstain.audit.reading_result import score_readers, write_result
    from counterstain.audit.reading_test import ReadingTest

    opened = ReadingTest.open(Path(test), None if key is None else Path(key))
    result = score_readers(opened)
    place = opened.folder.resolve()
    write_result(result, place.with_name(f"{place.name}-result") if out is None else Path(out))
    if study is not None:
        from counterstain.report.page import write_report
        from counterstain.report.readings import READING_TESTS
        from counterstain.report.results import find_results

        run = find_results(Path(study)).parent
        write_result(result, run / READING_TESTS / place.name)
        write_report(run, command="reading-test result")
    return result
