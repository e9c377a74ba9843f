"""Do a judge, synthetic sets and a cohort belong together?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from counterstain.audit.findings import REFERENCES
from counterstain.audit.ruler import FEWEST_PATCHES
from counterstain.checkpoints import CheckpointHeader, read_header, require_taxonomy
from counterstain.data.cohort import Cohort
from counterstain.data.leakage import check_no_leak
from counterstain.data.patch_set import PatchSet
from counterstain.errors import InputError, MismatchError


def require_auditable(sets: Mapping[str, PatchSet], cohort: Cohort, judge_folder: Path) -> CheckpointHeader:
    """Check that a judge, sets and a cohort belong together; return what is known about the judge.

    Raises
    ------
    MismatchError
        The judge or a set is of another cohort, taxonomy, size or resolution.
    LeakageError
        The judge saw a validation or test patient.
    InputError
        A set has fewer than 50 patches, or the name of a row of real patches.
    """
    judge, who = read_header(judge_folder), f"the judge {judge_folder}"
    require_taxonomy(judge_folder, judge, cohort.taxonomy)
    _require_mpp(who, judge.mpp, cohort)
    check_no_leak(judge.patients_seen, {part: cohort.patients(part) for part in ("val", "test")}, who)
    _require_cohort(who, judge.cohort, cohort)
    for name, patch_set in sets.items():
        if name in REFERENCES:
            raise InputError(f"{patch_set.folder}: {name!r} is the name of a row of real patches; rename the folder")
        if len(patch_set) < FEWEST_PATCHES:
            raise InputError(f"{name}: {len(patch_set)} patches are too few to audit; {FEWEST_PATCHES} are the least")
        if patch_set.header.taxonomy != cohort.taxonomy:
            raise MismatchError(
                f"{name}: has other subtypes than {cohort.folder}; give the cohort that it was made from"
            )
        _require_mpp(name, patch_set.header.mpp, cohort)
        _require_cohort(name, patch_set.header.cohort, cohort)
        if patch_set.header.size_px != judge.size_px:
            raise MismatchError(
                f"{name}: has patches of {patch_set.header.size_px} px, {who} learnt from {judge.size_px} px; "
                "train one at that size"
            )
    return judge


def _require_mpp(what: str, mpp: float, cohort: Cohort) -> None:
    if not cohort.is_at(mpp):
        raise MismatchError(
            f"{what}: is at {mpp:g} um/px, {cohort.folder} at {cohort.mpp:g}; make it anew from this cohort"
        )


def _require_cohort(what: str, fingerprint: str, cohort: Cohort) -> None:
    if fingerprint != cohort.fingerprint:
        raise MismatchError(
            f"{what}: was made from another cohort than {cohort.folder}, or before that was split anew; give "
            "the cohort that it was made from, or make it anew"
        )
