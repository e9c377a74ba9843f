"""Audit synthetic sets of a cohort beside real patches, and write the findings as tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from counterstain.audit.copies import CopyCheck, CopySearch, Match
from counterstain.audit.fidelity import JUDGE, timm_name
from counterstain.audit.findings import (
    FEWEST_PATCHES,
    HALVES,
    HELD_OUT,
    REFERENCES,
    Audit,
    AuditConfig,
    Evaluator,
    Findings,
)
from counterstain.audit.judge import load_judge
from counterstain.checkpoints import CheckpointHeader, read_header, require_taxonomy
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet, PatchSetHeader
from counterstain.data.patches import Patch
from counterstain.data.sampling import PatchSampler, PatchSource, SamplingConfig
from counterstain.data.split import check_no_leak
from counterstain.errors import InputError, MismatchError
from counterstain.generators.methods import METHODS
from counterstain.seeding import derive, numpy_generator
from counterstain.segmentation.timm_networks import identity
from counterstain.storage import replacing, write_csv, write_json, write_text
from counterstain.taxonomy import IGNORE

MOST_DRAWN = 50  # patches drawn for each one wanted, before half of the patients count as almost without tissue
PAIRS, EXAMPLES = 12, 12
SHOWN_PX = 128  # smaller patches are enlarged, by a whole number, to about this
GAP_PX = 4
FONT_PX = 13
LINE_PX = 17
INK, FRAME = (26, 26, 26), (200, 200, 200)


@dataclass(frozen=True)
class Chosen(Sequence[Patch]):
    """Some patches of an endless or long source, read when they are asked for."""

    source: PatchSource
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.source[self.numbers[index]]


def real_patches(cohort: Cohort, part: str, size_px: int, count: int, seed: int) -> Chosen:
    """Cut patches out of one part of a cohort, subtypes equally often."""
    return Chosen(PatchSampler(cohort, part, size_px, SamplingConfig(), derive(seed, "audit", part)), range(count))


def training_halves(cohort: Cohort, size_px: int, count: int, seed: int) -> tuple[Chosen, Chosen]:
    """Cut ``count`` patches out of each of two halves of the training patients, alike in their slides' scores.

    Raises InputError where there is one training patient only, or half of them have next to no tissue.
    """
    sampler = PatchSampler(cohort, "train", size_px, SamplingConfig(), derive(seed, "audit", "halves"))
    first = _every_second_patient(cohort, seed)
    numbers: tuple[list[int], list[int]] = ([], [])
    for i in range(MOST_DRAWN * count):
        half = numbers[0 if sampler[i].source.patient in first else 1]
        if len(half) < count:
            half.append(i)
        if all(len(half) == count for half in numbers):
            return Chosen(sampler, numbers[0]), Chosen(sampler, numbers[1])
    raise InputError(f"{cohort.folder}: the training part cannot be halved by patient; it needs two patients at least")


def _every_second_patient(cohort: Cohort, seed: int) -> set[str]:
    """Return half of the training patients: every second one, those of one score beside each other."""
    training = cohort.regions.iloc[cohort.positions("train")]
    scores = training.assign(score=training["score"].astype(str)).groupby("patient")["score"].min()
    shuffled = numpy_generator(seed, "audit", "half").permutation(len(scores))
    table = pd.DataFrame({"score": scores.to_numpy()[shuffled]}, index=scores.index.to_numpy()[shuffled])
    return set(table.sort_values("score", kind="stable").index[::2])


def require_auditable(sets: Mapping[str, PatchSet], cohort: Cohort, judge_folder: Path) -> CheckpointHeader:
    """Check that a judge, sets and a cohort belong together; return what is known about the judge.

    Raises MismatchError where the judge or a set is of another cohort, taxonomy, size or resolution; LeakageError where
    the judge saw a validation or test patient; InputError where a set has fewer than 50 patches, or the name of a row
    of real patches.
    """
    judge, who = require_judge(judge_folder, cohort), f"the judge {judge_folder}"
    for name, patch_set in sets.items():
        kept_subtypes(patch_set)
        if name in REFERENCES:
            raise InputError(f"{patch_set.folder}: {name!r} is the name of a row of real patches; rename the folder")
        if len(patch_set) < FEWEST_PATCHES:
            raise InputError(f"{name}: {len(patch_set)} patches are too few to audit; {FEWEST_PATCHES} are the least")
        if patch_set.header.taxonomy != cohort.taxonomy:
            raise MismatchError(
                f"{name}: has other subtypes than {cohort.folder}; give the cohort that it was made from"
            )
        require_made_from(cohort, name, patch_set.header)
        if patch_set.header.size_px != judge.size_px:
            raise MismatchError(
                f"{name}: has patches of {patch_set.header.size_px} px, {who} learnt from {judge.size_px} px; "
                f"train one at that size (train judge --set size_px={patch_set.header.size_px})"
            )
    return judge


def require_judge(folder: Path, cohort: Cohort) -> CheckpointHeader:
    """Return what is known about a judge; raises as :func:`require_auditable` does where it does not fit a cohort."""
    judge, who = read_header(folder), f"the judge {folder}"
    require_taxonomy(folder, judge, cohort.taxonomy)
    require_made_from(cohort, who, judge)
    check_no_leak(judge.patients_seen, cohort, who)
    return judge


def require_made_from(cohort: Cohort, what: str, header: CheckpointHeader | PatchSetHeader) -> None:
    """Raise MismatchError unless a judge or a set was made from a cohort, as it is split now."""
    if not cohort.is_at(header.mpp):
        raise MismatchError(
            f"{what}: is at {header.mpp:g} um/px, {cohort.folder} at {cohort.mpp:g}; make it anew from this cohort"
        )
    if header.cohort != cohort.fingerprint:
        raise MismatchError(
            f"{what}: was made from another cohort than {cohort.folder}, or before that was split anew; give "
            "the cohort that it was made from, or make it anew"
        )


def audit_sets(
    sets: Mapping[str, PatchSet],
    cohort: Cohort,
    judge_folder: Path,
    config: AuditConfig,
    advance: Callable[[int], None] = lambda _: None,
) -> Audit:
    """Audit synthetic sets, given by name, side by side.

    They are compared with the training part of the cohort that their masks come from. Two rows of real patches stand
    beside them. Two halves of the training patients say how far real tissue of other patients is from real tissue: no
    smaller difference means anything. The held-out patches are of other patients too, but their instances keep their
    subtypes, while the masks of a set are of training patients, relabelled. So they are landmarks, not bounds: a
    perfect generator may be nearer to the training patches.

    ``advance`` is called with 1 when the training halves, the held-out patches or a set are done. Raises what
    :func:`require_auditable` does, and InputError where the file of weights cannot be used.
    """
    size_px = require_auditable(sets, cohort, judge_folder).size_px
    count = min([config.patches, *(len(patch_set) for patch_set in sets.values())])
    judge, _ = load_judge(judge_folder, config.device)
    evaluator = Evaluator(judge, cohort.taxonomy, config)
    halves = training_halves(cohort, size_px, count, config.seed)
    findings = [evaluator.measure(HALVES, halves[1], evaluator.reference(halves[0]))]
    advance(1)
    training = evaluator.reference(real_patches(cohort, "train", size_px, count, config.seed))
    held_out = real_patches(cohort, "val", size_px, count, config.seed)
    check = CopyCheck(CopySearch(cohort, size_px), held_out, config.copies)
    findings.append(evaluator.measure(HELD_OUT, held_out, training, copies=check.look(held_out)))
    advance(1)
    for name, patch_set in sets.items():
        patches, kept = Chosen(drawn_alone(patch_set), range(count)), kept_subtypes(patch_set)
        method = METHODS.get(patch_set.header.method)
        drawn = kept if method is not None and method.inpaints else None
        shown = patch_set.origins(range(count)) if "counterstain" in patch_set.header.settings else {}
        copies = check.look(patches, drawn, shown=shown)
        findings.append(evaluator.measure(name, patches, training, kept=kept, copies=copies))
        advance(1)
    own = config.features == JUDGE
    return Audit(findings=tuple(findings), training_patches=training.patches, search=check.search, judge_features=own)


@dataclass(frozen=True)
class _MovedAlone:
    """A set of new layouts in which own instances were not drawn: they are to be ignored."""

    patch_set: PatchSet
    moved: Mapping[int, Collection[int]]

    def __getitem__(self, index: int) -> Patch:
        patch, moved = self.patch_set[index], self.moved.get(index, ())
        return replace(patch, subtypes={i: known if i in moved else IGNORE for i, known in patch.subtypes.items()})


def drawn_alone(patch_set: PatchSet) -> PatchSource:
    """Return the patches of a set; of new layouts, own instances that were not drawn are to be ignored."""
    layouts = patch_set.header.settings["synthesis"].get("layouts") or {}
    if layouts.get("relabel", True):
        return patch_set
    moved: Any = patch_set.moved.groupby("index")["instance"].agg(set)
    return _MovedAlone(patch_set, moved.to_dict())


def kept_subtypes(patch_set: PatchSet) -> frozenset[int]:
    """Return the subtypes, 255 among them, whose instances relabelling left alone; inpainting does not draw these."""
    try:
        names = list(patch_set.header.settings["synthesis"]["relabel"]["keep"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{patch_set.folder}: does not say which subtypes relabelling kept; draw it with 'counterstain synthesize'"
        ) from error
    return frozenset({IGNORE, *(patch_set.header.taxonomy.id_of(name) for name in names)})


def audit_identity(
    sets: Mapping[str, PatchSet], cohort: Cohort, judge_folder: Path, config: AuditConfig
) -> dict[str, Any]:
    """Return all that an audit's results follow from, for :func:`counterstain.storage.claim`."""
    if config.weights is not None and not config.weights.is_file():
        raise InputError(f"{config.weights}: no such weights file")
    return {
        "cohort": cohort.fingerprint,
        "judge": read_header(judge_folder).sha256,
        "weights": None if config.features == JUDGE else identity(timm_name(config.features), config.weights),
        "settings": config.model_dump(mode="json", exclude={"device", "batch_size", "weights"}),
        "sets": _headers(sets),
    }


def _headers(sets: Mapping[str, PatchSet]) -> dict[str, Any]:
    return {name: s.header.model_dump(mode="json", exclude={"taxonomy"}) for name, s in sets.items()}


def write_audit(audit: Audit, sets: dict[str, PatchSet], config: AuditConfig, out: Path) -> None:
    """Write ``audit.csv`` (a row per kind of images), ``confusion.csv``, ``nearest.csv``, ``copies.csv``,
    ``audit.json`` (settings and sets), ``audit.txt`` (what the figures mean), and for each set ``SET-nearest.png``
    (drawn images above the sampled training patches nearest to them), ``SET-copies.png`` (above the training tissue
    that they resemble most) and ``SET-examples.png`` (below the subtypes that were asked for).
    """
    write_csv(out / "audit.csv", audit.table())
    asked = {f.name: f.confusion.rename_axis("asked").reset_index() for f in audit.findings}
    seen = {name: table.melt("asked", var_name="seen", value_name="instances") for name, table in asked.items()}
    write_csv(out / "confusion.csv", _joined(seen))
    write_csv(out / "copies.csv", _joined({f.name: f.copies.table for f in audit.findings}))
    write_csv(out / "nearest.csv", _joined({f.name: f.nearest for f in audit.findings}))
    write_json(out / "audit.json", {"settings": config.model_dump(mode="json"), "sets": _headers(sets)})
    write_text(out / "audit.txt", "\n".join(audit.in_words()) + "\n")
    for findings in audit.findings:
        if findings.name not in REFERENCES:
            patch_set = sets[findings.name]
            pictures = {"nearest": _nearest(findings, patch_set, audit), "examples": _examples(patch_set)}
            if len(findings.copies.table):
                pictures["copies"] = _most_similar(findings, patch_set, audit)
            for name, picture in pictures.items():
                with replacing(out / f"{findings.name}-{name}.png") as partial:
                    picture.save(partial, format="PNG")


def _joined(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    named = [table.assign(images=name) for name, table in tables.items()]
    return pd.concat([table for table in named if len(table)] or named[:1], ignore_index=True)


def _nearest(findings: Findings, patch_set: PatchSet, audit: Audit) -> Image.Image:
    rows = findings.nearest.head(PAIRS)
    drawn = [patch_set[int(i)].image for i in rows["image"]]
    real = [audit.training_patches[int(i)].image for i in rows["training_patch"]]
    captions = [f"{distance:.2f}" for distance in rows["distance"]]
    return sheet({"drawn": drawn, "nearest training patch": real}, captions)


def _most_similar(findings: Findings, patch_set: PatchSet, audit: Audit) -> Image.Image:
    rows = findings.copies.table.head(PAIRS).to_dict("records")
    matches = [Match(**{name: row[name] for name in Match.__dataclass_fields__}) for row in rows]
    drawn = [patch_set[int(row["image"])].image for row in rows]
    captions = [f"{match.similarity:.2f}\n{audit.search.name_of(match)}" for match in matches]
    return sheet({"drawn": drawn, "most similar training tissue": [audit.search.crop(m) for m in matches]}, captions)


def _examples(patch_set: PatchSet) -> Image.Image:
    patches = [patch_set[i] for i in range(min(EXAMPLES, len(patch_set)))]
    taxonomy = patch_set.header.taxonomy
    labels = [taxonomy.palette[patch.label_mask] for patch in patches]
    captions = ["\n".join(map(taxonomy.name_of, sorted(set(patch.subtypes.values())))) for patch in patches]
    return sheet({"asked": labels, "drawn": [patch.image for patch in patches]}, captions)


def sheet(rows: Mapping[str, Sequence[np.ndarray]], captions: Sequence[str] = ()) -> Image.Image:
    """Lay named rows of patches, (H, W, 3) uint8 and all of one size, out below each other.

    Captions stand above the columns, in lines that are cut off at their width. Patches are copied pixel by pixel; those
    below 128 px are enlarged by a whole number.
    """
    font = ImageFont.load_default(FONT_PX)
    height, width = next(iter(rows.values()))[0].shape[:2]
    factor = max(1, round(SHOWN_PX / max(height, width)))
    step_y, step_x = height * factor + GAP_PX, width * factor + GAP_PX
    left = round(max(font.getlength(name) for name in rows)) + 2 * GAP_PX
    top = LINE_PX * max((caption.count("\n") + 1 for caption in captions), default=0) + GAP_PX
    columns = max(len(patches) for patches in rows.values())
    canvas = Image.new("RGB", (left + columns * step_x, top + len(rows) * step_y), "white")
    draw = ImageDraw.Draw(canvas)
    for column, caption in enumerate(captions):
        for number, line in enumerate(caption.split("\n")):
            place = (left + column * step_x, number * LINE_PX + GAP_PX // 2)
            draw.text(place, _cut(line, width * factor, font), fill=INK, font=font)
    for row, (name, patches) in enumerate(rows.items()):
        y = top + row * step_y
        draw.text((GAP_PX, y + (step_y - GAP_PX) // 2), name, fill=INK, font=font, anchor="lm")
        for column, patch in enumerate(patches):
            large = patch.repeat(factor, 0).repeat(factor, 1)
            x = left + column * step_x
            draw.rectangle((x - 1, y - 1, x + step_x - GAP_PX, y + step_y - GAP_PX), outline=FRAME)
            canvas.paste(Image.fromarray(large), (x, y))
    return canvas


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
