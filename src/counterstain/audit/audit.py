"""Audit a synthetic set: fidelity, adherence to the asked subtypes, and copies of training patches.

Two rows of real patches stand beside the sets. Two halves of the training patients say how far real tissue of other
patients is from real tissue: below that no difference means anything. The held-out patches are other patients as well,
whose instances keep their subtypes; the masks of a set are of training patients, relabelled. So they are landmarks, not
bounds: a perfect generator may be nearer to the training patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from counterstain.audit.copies import CopyCheck, CopySearch
from counterstain.audit.findings import HALVES, HELD_OUT, Audit
from counterstain.audit.inputs import require_auditable
from counterstain.audit.judge import load_judge
from counterstain.audit.real import Chosen, real_patches, training_halves
from counterstain.audit.redrawn import kept_subtypes
from counterstain.audit.ruler import AuditConfig, Ruler
from counterstain.checkpoints import read_header
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet
from counterstain.errors import InputError
from counterstain.storage import sha256_of


def audit_sets(
    sets: Mapping[str, PatchSet],
    cohort: Cohort,
    judge_folder: Path,
    config: AuditConfig,
    advance: Callable[[int], None] = lambda _: None,
) -> Audit:
    """Audit synthetic sets of one cohort side by side.

    Parameters
    ----------
    sets : mapping
        Name -> set.
    cohort : Cohort
        Where the sets' masks come from; its training part is what they are compared with.
    judge_folder : Path
        Checkpoint of a judge that was trained on this cohort.
    advance : callable
        Called with 1 when the training halves, the held-out patches or a set are done.

    Raises
    ------
    MismatchError
        The judge or a set is of another cohort, taxonomy, size or resolution.
    LeakageError
        The judge saw a validation or test patient.
    InputError
        A set has fewer than 50 patches, or the file of weights cannot be used.
    """
    size_px = require_auditable(sets, cohort, judge_folder).size_px
    count = min([config.patches, *(len(patch_set) for patch_set in sets.values())])
    judge, _ = load_judge(judge_folder, config.device)
    ruler = Ruler(judge, cohort.taxonomy, config)
    halves = training_halves(cohort, size_px, count, config.seed)
    findings = [ruler.measure(HALVES, halves[1], ruler.reference(halves[0]))]
    advance(1)
    training = ruler.reference(real_patches(cohort, "train", size_px, count, config.seed))
    held_out = real_patches(cohort, "val", size_px, count, config.seed)
    check = CopyCheck(CopySearch(cohort, size_px), held_out, config.copies)
    findings.append(ruler.measure(HELD_OUT, held_out, training, copies=check.look(held_out)))
    advance(1)
    for name, patch_set in sets.items():
        patches, kept = Chosen(patch_set, range(count)), kept_subtypes(patch_set)
        drawn = kept if patch_set.header.method == "inpainting" else None
        copies = check.look(patches, drawn, own_tissue="counterstain" not in patch_set.header.settings)
        findings.append(ruler.measure(name, patches, training, kept=kept, copies=copies))
        advance(1)
    return Audit(findings=tuple(findings), training_patches=training.patches, search=check.search)


def audit_identity(
    sets: Mapping[str, PatchSet], cohort: Cohort, judge_folder: Path, config: AuditConfig
) -> dict[str, Any]:
    """Return all that an audit's results follow from, for :func:`counterstain.storage.claim`."""
    if config.weights is not None and not config.weights.is_file():
        raise InputError(f"{config.weights}: no such weights file")
    settings = config.model_dump(mode="json", exclude={"device", "batch_size", "weights"})
    return {
        "cohort": cohort.fingerprint,
        "judge": read_header(judge_folder).sha256,
        "weights": None if config.weights is None else sha256_of(config.weights),
        "settings": settings,
        "sets": {name: s.header.model_dump(mode="json", exclude={"taxonomy"}) for name, s in sets.items()},
    }
