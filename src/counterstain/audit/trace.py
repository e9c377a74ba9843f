"""Can a drawn image be traced to a patient? Copies, membership and re-identification, tested over patients.

Drawn images share with real ones what their masks tell: where instances lie. So texture is compared, from which that
is taken out (:func:`counterstain.audit.copies.texture_of`), at any place and in any orientation; of inpainted images
only what was redrawn. How close an image comes to training tissue is put in relation to how close it comes to tissue
of patients that nobody trained on, and compared with real patches of such patients.

Every test holds its rate of false alarms over patients, never over patches; together they hold :data:`ALPHA` (Holm).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.spatial.distance import cdist

from counterstain.audit.audit import drawn_alone, kept_subtypes, require_judge, require_made_from
from counterstain.audit.copies import LEAST, TURNS, CopySearch, Match
from counterstain.audit.fidelity import Features
from counterstain.audit.judge import describe, load_judge
from counterstain.audit.trace_result import ALPHA, PAIRS, TOP, Row, Trace, copies, holm, reidentified, told_apart
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet
from counterstain.data.patches import Patch, turn
from counterstain.data.relabel import redrawn_pixels
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.errors import InputError, LeakageError, MismatchError
from counterstain.generators.interface import DenoisingGenerator, load_generator
from counterstain.generators.methods import METHODS
from counterstain.seeding import derive, numpy_generator

PER_PATIENT = 32  # real patches of each patient on which the denoiser's loss is taken
WINDOWS = 64  # of each patient's tissue, at most, whose features are compared
COLUMNS = ("image", "patient", "closeness", "p", "copy", "training_similarity", "training_patient", "training_region",
           "y_px", "x_px", "flipped", "quarter_turns", "held_out_similarity", "held_out_patient", "rank",
           "in_place")  # fmt: skip


def trace_set(
    patch_set: PatchSet,
    cohort: Cohort,
    *,
    generator: DenoisingGenerator | None = None,
    features: tuple[str, Features] | None = None,
    patches: int = 200,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> Trace:
    """Test whether the images of a set, and the ``generator`` that drew them, can be traced to training patients.

    The first ``patches`` images are compared with all tissue of the cohort, and so are as many real patches of held-out
    patients (validation and test). ``features`` is their name with the function. ``advance`` is called with the number
    of images done. Raises MismatchError where set and cohort do not belong together, LeakageError for a set of held-out
    masks, InputError where training or held-out patients are fewer than two, or compared images are of fewer.
    """
    require_traceable(patch_set, cohort)
    compared = _Compared.of(patch_set, cohort, min(patches, len(patch_set)), seed)
    rows, controls, matches = [], [], []
    for number in compared.numbers:
        if (pair := compared.look(number)) is not None:
            rows.append(pair[0])
            controls.append(pair[1])
            matches.append(pair[2])
        advance(1)
    if not rows:
        raise InputError(f"{patch_set.folder}: none of its images is redrawn in a tenth of its pixels or more")
    images, real = pd.DataFrame(rows), pd.DataFrame(controls)
    if min(images["patient"].nunique(), real["patient"].nunique()) < 2:
        raise InputError(
            f"{patch_set.folder}: only one training or one held-out patient is among the compared images; give more "
            "--patches"
        )
    images["p"] = stats.logistic.sf(images["closeness"], *stats.logistic.fit(real["closeness"]))
    images["copy"] = images["p"] * len(images) < ALPHA
    scores = pd.concat([images["closeness"], real["closeness"]])
    patients = pd.concat([images["patient"], real["patient"]])
    tests = [
        copies(images["p"], images["copy"]),
        told_apart("closeness", scores, patients, np.arange(len(scores)) < len(images), seed),
        reidentified(images["patient"], images["nearest"], images["rank"], seed),
    ]
    if generator is not None:
        losses = patient_losses(generator, cohort, patch_set.header.size_px, compared.sampling, seed)
        tests.append(membership(losses, compared.train, seed))
    figures = {"images": len(images)} | _beside(images, compared)
    if features is not None:
        figures |= _by_features(*features, compared, seed)
    order = images["closeness"].to_numpy().argsort()[::-1]
    return Trace(
        name=patch_set.folder.name,
        images=images.iloc[order][list(COLUMNS)].reset_index(drop=True),
        tests=holm(tests, {"re-identification"} if compared.shown else set()),
        figures=figures,
        by_design=compared.by_design(),
        pairs=compared.pictures([(int(images["image"].iloc[i]), *matches[i]) for i in order[:PAIRS].tolist()]),
    )


def require_traceable(patch_set: PatchSet, cohort: Cohort) -> tuple[list[str], list[str]]:
    """Check that a set and a cohort belong together; return the training and the held-out patients with tissue.

    Raises what :func:`trace_set` does.
    """
    require_made_from(cohort, str(patch_set.folder), patch_set.header)
    if patch_set.header.part != "train":
        raise LeakageError(f"{patch_set.folder}: holds masks of {patch_set.header.part}; trace a set of train")
    split = cohort.regions.groupby("patient")["split"].first()
    train = sorted(str(patient) for patient in split.index[split == "train"])
    held = sorted(str(patient) for patient in split.index[split.isin(["val", "test"])])
    if min(len(train), len(held)) < 2:
        raise InputError(
            f"{cohort.folder}: {len(train)} training and {len(held)} held-out patients; a trace needs two of each at "
            "least: split the cohort so that val and test have two together"
        )
    if unknown := sorted(patch_set.patients - {*train}):
        raise MismatchError(
            f"{patch_set.folder}: patient {unknown[0]} is no training patient of {cohort.folder}; shared sets have "
            "pseudonyms: trace the original"
        )
    return train, held


def _beside(images: pd.DataFrame, compared: _Compared) -> dict[str, Any]:
    """Return what is told beside the tests."""
    return {
        "training_patients": len(compared.train),
        "held_out_patients": len(compared.held),
        "chance": 1 / len(compared.train),
        "top5": float((images["rank"] <= TOP).mean()),
        "chance_top5": min(1.0, TOP / len(compared.train)),
        "in_place": float(images["in_place"].mean()),
    }


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """Drawn images, each beside a real patch of a held-out patient that is compared in the same pixels."""

    patch_set: PatchSet
    patches: Any  # of the set; instances that were not drawn are to be ignored
    numbers: Sequence[int]
    controls: Sequence[Patch]
    search: CopySearch
    train: Sequence[str]
    held: Sequence[str]
    kept: Collection[int] | None  # subtypes whose instances inpainting left alone; None = all was drawn
    shown: Mapping[int, set[str]]  # patients whose nuclei an image has, by number
    sampling: SamplingConfig
    cohort: Cohort

    @classmethod
    def of(cls, patch_set: PatchSet, cohort: Cohort, count: int, seed: int) -> _Compared:
        """Choose what is compared."""
        header = patch_set.header
        parts = [part for part in ("val", "test") if (cohort.regions["split"] == part).any()]
        by_part = {part: cohort.patients(part) for part in parts}
        train, held = require_traceable(patch_set, cohort)
        kept, settings = kept_subtypes(patch_set), header.settings["synthesis"]["sampling"]
        sampling = SamplingConfig(mode=settings["mode"], background_share=settings["background_share"])
        samplers = [PatchSampler(cohort, p, header.size_px, sampling, derive(seed, "trace", p)) for p in parts]
        dealt = np.repeat(np.arange(len(parts)), [len(by_part[part]) for part in parts])
        method = METHODS.get(header.method)
        origins = patch_set.origins(range(count)) if "counterstain" in header.settings else {}
        return cls(
            patch_set=patch_set,
            patches=drawn_alone(patch_set),
            numbers=range(count),
            controls=[samplers[dealt[i % len(dealt)]][i] for i in range(count)],
            search=CopySearch(cohort, header.size_px, parts=("train", *parts), texture=True),
            train=train,
            held=held,
            kept=kept if method is not None and method.inpaints else None,
            shown={number: {source.patient for source in sources} for number, sources in origins.items()},
            sampling=sampling,
            cohort=cohort,
        )

    def look(self, number: int) -> tuple[dict[str, Any], dict[str, Any], tuple[Match, Match]] | None:
        """Compare an image and its control; None where too little of the image was drawn."""
        drawn, real = self.patches[number], self.controls[number]
        mask = None if self.kept is None else redrawn_pixels(drawn.instances, drawn.subtypes, self.kept)
        found, other = self.search.by_patient(drawn, mask), self.search.by_patient(real, mask)
        if not found:
            return None
        own = drawn.source.patient
        train = [patient for patient in self.train if patient not in self.shown.get(number, ())]
        held = [patient for patient in self.held if patient != real.source.patient]
        near, apart, closeness = _nearest(found, train, held)
        match = found[near]
        place = found[own]
        row = {
            "image": number, "patient": own, "closeness": closeness,
            "training_similarity": match.similarity, "training_patient": near,
            "training_region": self.search.name_of(match), "y_px": match.y_px, "x_px": match.x_px,
            "flipped": match.flipped, "quarter_turns": match.quarter_turns,
            "held_out_similarity": found[apart].similarity, "held_out_patient": apart,
            "rank": 1 + sum(found[patient].similarity > place.similarity for patient in self.train),
            "in_place": self._in_place(place, drawn),
            "nearest": max(self.train, key=lambda patient: found[patient].similarity),
        }  # fmt: skip
        control = {"patient": real.source.patient, "closeness": _nearest(other, train, held)[2]}
        return row, control, (match, found[apart])

    def _in_place(self, match: Match, drawn: Patch) -> bool:
        """Whether a match overlaps the patch that the mask was cut out of, in its orientation, by more than half."""
        source, reach = drawn.source, self.patch_set.header.size_px // 4
        same = self.search.name_of(match) == source.region and match.flipped == source.flipped
        near = abs(match.y_px - source.y_px) <= reach and abs(match.x_px - source.x_px) <= reach
        return same and near and match.quarter_turns == source.quarter_turns

    def by_design(self) -> tuple[str, ...]:
        """Say what images share with real tissue."""
        header, told = self.patch_set.header, ["By design, masks are outlines of training patients' tissue."]
        if self.kept is not None:
            told.append("Inpainting keeps real tissue around what it redraws; only what was redrawn was compared.")
        if self.shown:
            told.append(
                "The images keep the nuclei of real patches: their own patients were left out of copies and closeness, "
                "and re-identification is by design, no alarm."
            )
        if header.settings["synthesis"].get("style", {}).get("source") == "own":
            told.append("Images are in the style of the slide that their mask is from.")
        return tuple(told)

    def pictures(self, rows: Sequence[tuple[int, Match, Match]]) -> dict[str, list[np.ndarray]]:
        """Return images with the tissue of their matches."""
        return {
            "drawn": [self.patch_set[number].image for number, _, _ in rows],
            "nearest training": [self.search.crop(match) for _, match, _ in rows],
            "nearest held-out": [self.search.crop(match) for _, _, match in rows],
        }


def _nearest(found: Mapping[str, Match], train: Sequence[str], held: Sequence[str]) -> tuple[str, str, float]:
    near, apart = (max(some, key=lambda patient: found[patient].similarity) for some in (train, held))
    ratio = max(found[near].similarity, LEAST) / max(found[apart].similarity, LEAST)
    return near, apart, float(np.log(ratio))


def patient_losses(
    generator: DenoisingGenerator, cohort: Cohort, size_px: int, sampling: SamplingConfig, seed: int
) -> pd.Series:
    """Return the denoiser's loss by patient, over patches and timesteps, which count alike: about 1.

    Patches lie as they do in their regions, the one way that no training leaves out.
    """
    losses, sampling = {}, sampling.model_copy(update={"flip": False, "quarter_turns": False})
    for part in sorted(cohort.regions["split"].dropna().unique().tolist()):
        regions = cohort.regions[cohort.regions["split"] == part]
        for patient, table in regions.groupby("patient"):
            slides = dict.fromkeys(table["slide"].astype(str), 1.0)
            own = derive(seed, "membership", str(patient))
            sampler = PatchSampler(cohort, part, size_px, sampling, own, slides=slides)
            losses[str(patient)] = generator.patch_losses([sampler[i] for i in range(PER_PATIENT)], seed).mean(0)
    table = pd.DataFrame.from_dict(losses, orient="index")
    return (table / table.mean()).mean(axis=1)


def membership(losses: pd.Series, train: Collection[str], seed: int) -> Row:
    """Test whether the denoiser's losses, by patient, tell its training patients from others."""
    return told_apart("membership", -losses, pd.Series(losses.index), losses.index.isin(list(train)), seed)


# Local features: what a network sees in windows of half the step of a patch, whichever way they are turned.


def _by_features(name: str, features: Features, compared: _Compared, seed: int) -> dict[str, Any]:
    """Compare images as the tests do, in features; the patients of masks are left out, as features know masks."""
    tissue = {patient: _described(features, _windows(compared, patient, seed)) for patient in _patients(compared)}
    every = np.concatenate(list(tissue.values()))
    spread = every.std(0).clip(1e-6)
    drawn = [compared.patches[number] for number in compared.numbers]
    distances = [
        {who: cdist(_described(features, some) / spread, of / spread).min(1) for who, of in tissue.items()}
        for some in (drawn, compared.controls)
    ]
    closeness: tuple[list[float], list[float]] = ([], [])
    first = 0
    for i, (image, real) in enumerate(zip(drawn, compared.controls, strict=True)):
        own, other = image.source.patient, real.source.patient
        train = [patient for patient in compared.train if patient != own]
        held = [patient for patient in compared.held if patient != other]
        for some, of in zip(closeness, distances, strict=True):
            some.append(float(np.log(min(of[p][i] for p in held) / max(min(of[p][i] for p in train), 1e-9))))
        first += distances[0][own][i] == min(distances[0][patient][i] for patient in compared.train)
    closer = stats.mannwhitneyu(*closeness).statistic / len(drawn) ** 2
    return {"features": name, "features_closer": float(closer), "features_first": first / len(drawn)}


def _patients(compared: _Compared) -> list[str]:
    return [*compared.train, *compared.held]


def _windows(compared: _Compared, patient: str, seed: int) -> list[Patch]:
    size_px, regions = compared.patch_set.header.size_px, compared.cohort.regions
    places = [
        (position, y, x)
        for position in np.flatnonzero(regions["patient"] == patient).tolist()
        for y in range(0, int(regions["height_px"].iloc[position]) - size_px + 1, size_px // 2)
        for x in range(0, int(regions["width_px"].iloc[position]) - size_px + 1, size_px // 2)
    ]
    chosen = numpy_generator(seed, "trace", patient).permutation(len(places))[:WINDOWS]
    return [
        compared.cohort.patch(position, y, x, size_px)
        for position, y, x in (places[i] for i in sorted(chosen.tolist()))
    ]


def _described(features: Features, patches: Sequence[Patch]) -> np.ndarray:
    """Return the features of patches, means over all ways to turn them, (n, d)."""
    every = [
        features([replace(p, image=turn(p.image, flipped=flipped, quarter_turns=turns)) for p in patches])
        for flipped, turns in TURNS
    ]
    return np.asarray(np.mean(every, axis=0))


def denoiser_of(patch_set: PatchSet, cohort: Cohort, checkpoint: Path) -> DenoisingGenerator:
    """Open the generator that drew a set.

    Raises InputError where its method has no denoiser, MismatchError where the set was drawn by another checkpoint.
    """
    header = patch_set.header
    method = METHODS.get(header.method)
    if method is None or method.kind is None:
        raise InputError(f"{patch_set.folder}: method {header.method} has no checkpoint to test; give no --generator")
    generator = load_generator(header.method, checkpoint, cohort)
    if not isinstance(generator, DenoisingGenerator):
        raise InputError(f"{checkpoint}: method {header.method} has no denoiser to test; give no --generator")
    if generator.header is not None and generator.header.sha256 != header.generator:
        raise MismatchError(
            f"{checkpoint}: is not the generator of {patch_set.folder}, which is {header.generator[:12]}; give that one"
        )
    return generator


def judge_features(folder: Path, cohort: Cohort, size_px: int) -> tuple[str, tuple[str, Features]]:
    """Return the hash of a judge, and its features with their name.

    Raises MismatchError where it is of another cohort or size, LeakageError where it saw a held-out patient.
    """
    header = require_judge(folder, cohort)
    if header.size_px != size_px:
        raise MismatchError(f"{folder}: the judge learnt from {header.size_px} px, the set has {size_px} px")
    judge, _ = load_judge(folder)
    return header.sha256, ("the judge", lambda patches: describe(judge, patches))
