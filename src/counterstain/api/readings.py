"""What drawn patches are worth: audits, traces to patients, reviews and blind tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterstain.api import Numbers, PathLike, numbers_of, open_cohort, verb
from counterstain.errors import ConfigError, InputError

if TYPE_CHECKING:
    import pandas as pd

    from counterstain.audit.findings import Audit
    from counterstain.audit.judge import Judge
    from counterstain.audit.reading_result import ReadingResult
    from counterstain.audit.reading_test import ReadingTest
    from counterstain.audit.trace_result import Trace
    from counterstain.data.cohort import Cohort
    from counterstain.data.patch_set import PatchSet
    from counterstain.data.review import Review


@verb
def audit(
    sets: Sequence[PathLike],
    *,
    cohort: PathLike | Cohort,
    judge: PathLike,
    out: PathLike,
    patches: int = 2000,
    features: str = "judge",
    weights: PathLike | None = None,
    stain: str | None = None,
    copies: int = 300,
    device: str = "auto",
    batch_size: int = 32,
    seed: int = 0,
) -> Audit:
    """Audit synthetic sets: do the images look real, do they show the subtype asked for, are they copies?

    Every figure stands beside the same figure of real patches of held-out patients, distances also beside those
    between two halves of the training patients.

    Parameters
    ----------
    sets : sequence of str or Path
        Synthetic sets of one cohort, side by side.
    cohort : str, Path or Cohort
        The cohort that they were made from.
    judge : str or Path
        Made by 'counterstain train judge' on that cohort.
    out : str or Path
        Folder of the tables and pictures.
    patches : int
        Patches of each kind at most, 50 or more.
    features : str
        What distances are measured in: judge, timm:NAME, timm:FOLDER or timm:hf-hub:OWNER/NAME.
    weights : str or Path, optional
        State dict of timm:NAME; nothing is downloaded for it.
    stain : str, optional
        The stain beside haematoxylin, dab or eosin [default: what the cohort shows; dab where colours do not tell].
    copies : int
        Patches of each kind that are searched for copies.
    device : str
        Where the networks run: auto, cpu or cuda.
    batch_size : int
        Patches that go through the networks at once.
    seed : int
        Of the real patches.
    """
    from counterstain.audit.audit import audit_identity, audit_sets, require_auditable, write_audit
    from counterstain.audit.findings import AuditConfig
    from counterstain.config import build
    from counterstain.data.patch_set import PatchSet
    from counterstain.data.stains import check_stains, stain_shares, stained_windows
    from counterstain.progress import bar
    from counterstain.storage import claimed

    tissue, judge, out = open_cohort(cohort), Path(judge), Path(out)
    check_stains(tissue, [] if stain is None else [("stain", stain)])
    stain = stain or stain_shares(patch.image for patch in stained_windows(tissue)).stain or "dab"
    options = {"patches": patches, "features": features, "weights": weights, "stain": stain, "copies": copies}
    wanted = build(AuditConfig, options | {"device": device, "batch_size": batch_size, "seed": seed}, "audit")
    if not sets:
        raise InputError("audit: give one synthetic set or more")
    opened = {name: PatchSet.open(folder) for name, folder in _named([Path(folder) for folder in sets]).items()}
    require_auditable(opened, tissue, judge)
    with claimed(out, "audit", audit_identity(opened, tissue, judge, wanted)):
        with bar("audit", len(opened) + 2) as advance:
            result = audit_sets(opened, tissue, judge, wanted, advance)
        write_audit(result, opened, wanted, out)
    return result


def _named(sets: list[Path]) -> dict[str, Path]:
    """Name sets by their folders' names, by their paths where those are not unique."""
    for parts in (1, 2):
        named = {"-".join(folder.parts[-parts:]): folder for folder in sets}
        if len(named) == len(sets):
            return named
    raise InputError(f"{sets[0]}: the same set is given twice; give each set once")


@verb
def trace(
    synthetic: PathLike | PatchSet,
    *,
    cohort: PathLike | Cohort,
    generator: PathLike | None = None,
    judge: PathLike | None = None,
    out: PathLike | None = None,
    study: PathLike | None = None,
    patches: int = 200,
    seed: int = 0,
) -> Trace:
    """Trace drawn images to patients: copies of training tissue, membership, re-identification.

    Tests hold their rate of false alarms over patients, 5 % together. docs/trace.md says what each figure means.

    Parameters
    ----------
    synthetic : str, Path or PatchSet
        Synthetic set.
    cohort : str, Path or Cohort
        The cohort that it was made from; two patients in val and test together are the least.
    generator : str or Path, optional
        The checkpoint that drew it: do its losses tell who was in training? Of diffusion and inpainting alone.
    judge : str or Path, optional
        Made by 'counterstain train judge': compare in its features as well.
    out : str or Path, optional
        Folder of trace.json, trace.csv and trace.png [default: SET/trace].
    study : str or Path, optional
        Folder of a study whose report is to show the result.
    patches : int
        Images that are compared, at most.
    seed : int
        Of the real patches.
    """
    from counterstain.audit.trace import denoiser_of, judge_features, require_traceable, trace_set
    from counterstain.audit.trace_result import write_trace
    from counterstain.data.patch_set import PatchSet
    from counterstain.progress import bar
    from counterstain.report.results import find_results
    from counterstain.storage import claimed

    tissue = open_cohort(cohort)
    found = synthetic if isinstance(synthetic, PatchSet) else PatchSet.open(Path(synthetic))
    if patches < 1:
        raise ConfigError(f"--patches {patches}: expected 1 image or more")
    require_traceable(found, tissue)
    run = None if study is None else find_results(Path(study)).parent
    own = found.folder / "trace" if out is None else Path(out)
    identity = {"set": found.header.model_dump(mode="json", exclude={"taxonomy"}), "patches": patches, "seed": seed}
    options: dict[str, Any] = {"patches": patches, "seed": seed}
    if generator is not None:
        options["generator"] = denoiser_of(found, tissue, Path(generator))
        identity["generator"] = True
    if judge is not None:
        identity["judge"], options["features"] = judge_features(Path(judge), tissue, found.header.size_px)
    with claimed(own, "trace", identity):
        with bar("trace", min(patches, len(found))) as advance:
            result = trace_set(found, tissue, **options, advance=advance)
        write_trace(result, found, own)
    if run is not None:
        from counterstain.report.page import write_report
        from counterstain.report.readings import TRACES

        write_trace(result, found, run / TRACES / found.folder.name)
        write_report(run, command="trace")
    return result


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
