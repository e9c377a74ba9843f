"""Which patients are in train, val and test, or in which fold, stratified by score, and the check of leaks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from counterstain.config import Config
from counterstain.data.cohort import PACKS_AT, PARTS, Cohort, packs_of
from counterstain.data.composition import missing_subtypes
from counterstain.data.patches import BAND_PX, ImageKey
from counterstain.data.pseudonyms import MARK, recogniser
from counterstain.errors import InputError, LeakageError, MismatchError
from counterstain.remote import Place
from counterstain.seeding import numpy_generator
from counterstain.storage import read_json, replacing, write_json
from counterstain.taxonomy import first_alike, name_key

NOBODY = "none"  # where a file of patients is asked for
PATIENTS_SEEN_FILE = "patients_seen.txt"  # beside exported generated images
IMPORT_FILE = "import.json"
SAME_IMAGE = "patients_with_one_image"  # pairs of patients in it
NAMED = 3  # patients that a message names
RETRAIN = "train the generator on this cohort's training part only, or restore the split that it was trained on"
BARCODE = re.compile(r"tcga-\w\w-\w{4}(?=[-.]|$)")
SPELLINGS = "import the cohort again with one spelling"
TABLES = ("regions.parquet", "instances.parquet", "cohort.json")  # the last one makes a cohort of the folder


def check_no_leak(
    patients_seen: Iterable[str],
    cohort: Cohort,
    what: str,
    *,
    splits: Iterable[str] = ("val", "test"),
    remedy: str = RETRAIN,
) -> None:
    """Raise LeakageError where a checkpoint, or what it made, has seen a patient of the splits (``all``: of any).

    Spellings of one patient count as one (:func:`patient_key`); pseudonyms are recognised where their key is here. The
    message says ``what`` it is, for example ``the judge FOLDER``, and the ``remedy``.
    """
    named = list(patients_seen)
    hidden, seen = recogniser(named, what), {patient_key(patient) for patient in named}
    for split in splits:
        patients = cohort.regions["patient"].astype(str).unique() if split == "all" else cohort.patients(split)
        leaked = sorted(name for name in patients if (key := patient_key(name)) in seen or hidden(key))
        if leaked:
            shown = ", ".join(leaked[:NAMED]) + (f" and {len(leaked) - NAMED} more" if len(leaked) > NAMED else "")
            where = "" if split == "all" else f"the {split} split of "
            raise LeakageError(f"{what} has seen {shown} of {where}{cohort.folder}; {remedy}")


def patient_key(name: str) -> str:
    """Return what all spellings of a patient share: those of one :func:`name_key`, of other leading zeros and of a
    hyphen before the number (``"Pat 01"``, ``"pat-1"``), and the barcodes of a patient's slides in TCGA
    (``TCGA-A1-A0SB-01Z-00-DX1``). Pseudonyms have one spelling.
    """
    if name.startswith(f"{MARK}:"):
        return name
    key = name_key(name)
    barcode = BARCODE.match(key)
    return barcode[0] if barcode else re.sub(r"(?<=[^\W\d_])[-_](?=\d)|(?<![\d.])0+(?=\d)", "", key)


def same_patient(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two names that are spellings of one patient."""
    return first_alike(names, patient_key)


def tissue_of(cohort: Cohort) -> tuple[str, ...]:
    """Return the hashes of the images in the training part of a cohort."""
    keys = {_key_of(cohort, position) for position in cohort.positions("train").tolist()}
    return tuple(sorted(key for key in keys if key is not None))


def _key_of(cohort: Cohort, position: int) -> str | None:
    height, width = (int(cohort.regions[edge].iloc[position]) for edge in ("height_px", "width_px"))
    key = ImageKey(height, width)
    for top in range(0, height, BAND_PX):
        key.add(cohort.cut(position, top, 0, min(BAND_PX, height - top), width).image)
    return key.value


def read_patients_seen(path: Path) -> tuple[str, ...]:
    """Read a text file with one patient per line; raises InputError where there is no text or no patient."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a text file with one patient per line") from error
    patients = tuple(line.strip() for line in lines if line.strip())
    if not patients:
        raise InputError(f"{path}: names no patient")
    return patients


Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SplitConfig(Config):
    """How many patients each part gets: counts (24, 8, 8) or shares that sum to 1 (0.6, 0.2, 0.2)."""

    train: Amount = 0.6
    """Patients to train on."""
    val: Amount = 0.2
    """Patients to choose hyper-parameters and checkpoints with."""
    test: Amount = 0.2
    """Patients that only the final evaluation sees."""
    seed: int = 0
    """Another seed distributes the patients of a score differently."""


def split_patients(scores: Mapping[str, str | None], amounts: Mapping[str, float], seed: int) -> dict[str, str]:
    """Distribute patients over parts, each part with its share of every score: patient -> part.

    ``scores`` has every patient's score (None counts as one), ``amounts`` for each part the number of patients (all
    whole numbers) or their share (all at most 1, in all 1). Sizes of parts are exact; how many patients of a score are
    in a part is the exact proportion, rounded up or down. Raises InputError where the amounts do not fit.
    """
    totals, by_score = _totals(len(scores), amounts), _by_score(scores)
    table = _rounded([len(members) for members in by_score.values()], list(totals.values()), seed)
    split: dict[str, str] = {}
    for (score, members), counts in zip(by_score.items(), table.tolist(), strict=True):
        shuffled = numpy_generator(seed, "split", score).permutation(np.array(members, dtype=object))
        split |= dict(zip(shuffled, np.repeat(list(totals), counts).tolist(), strict=True))
    return split


def _by_score(scores: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Return the patients of each score, all sorted; "" stands for none."""
    names = sorted({score or "" for score in scores.values()})
    return {name: sorted(patient for patient, score in scores.items() if (score or "") == name) for name in names}


def split_cohort(cohort: Cohort, config: SplitConfig, *, force: bool = False) -> tuple[Cohort, list[str]]:
    """Split a cohort and store the split; also return a warning for every part that lacks a subtype.

    ``force`` replaces a split that is there already; what was trained on the old one has still seen its patients.
    Raises MismatchError where the cohort has another split, and InputError where the amounts do not fit.
    """
    _check_names(cohort)
    split = split_patients(patient_scores(cohort), {part: getattr(config, part) for part in PARTS}, config.seed)
    _check_images(cohort, split)
    if cohort.regions["split"].notna().any() and not force:
        found = dict(zip(cohort.regions["patient"], cohort.regions["split"], strict=True))
        if found != split:
            sizes = ", ".join(f"{part} {len(cohort.patients(part))}" for part in PARTS)
            raise MismatchError(
                f"{cohort.folder}: has another split already ({sizes}); give --force to replace it, and train anew "
                "what was trained on it"
            )
    else:
        cohort = cohort.write_split(split)
    return cohort, missing_subtypes(cohort)


def _check_names(cohort: Cohort) -> None:
    if spelt := same_patient(sorted(cohort.regions["patient"].unique())):
        raise InputError(f"{cohort.folder}: patients {spelt[0]!r} and {spelt[1]!r} are probably one; {SPELLINGS}")


def _check_images(cohort: Cohort, split: Mapping[str, str]) -> None:
    for one, other in _with_one_image(cohort):
        places = [split.get(patient, "no split") for patient in (one, other)]
        if places[0] != places[1]:
            raise InputError(
                f"{cohort.folder}: patients {one} and {other} have the same image but would be in {places[0]} and "
                f"{places[1]}; give them one name in the table and import it again"
            )


def _with_one_image(cohort: Cohort) -> list[tuple[str, str]]:
    file = cohort.folder / IMPORT_FILE
    return [(one, other) for one, other in read_json(file).get(SAME_IMAGE, ())] if file.exists() else []


def patient_scores(cohort: Cohort) -> dict[str, str | None]:
    """Return every patient's score: the commonest among the slides, of equally common ones the first by name."""
    scores: dict[str, str | None] = {}
    for patient, score in cohort.regions.drop_duplicates("slide").groupby("patient", sort=True)["score"]:
        commonest = score.dropna().mode()
        scores[str(patient)] = str(commonest.iloc[0]) if len(commonest) else None
    return scores


def split_into_folds(
    scores: Mapping[str, str | None], folds: int, validation: float, seed: int
) -> list[dict[str, str]]:
    """Return the split of every fold of a cross-validation: patient -> part.

    Each patient is in the test part of one fold; folds have the same number of patients, and of each score, to within
    one (scikit-learn's ``StratifiedKFold`` refuses more folds than the commonest score has patients). Those that
    validate (:func:`validating`) come from the next folds, so that they are stratified too and serve about equally
    often; the rest trains. Raises InputError where nobody would.
    """
    count, number = len(scores), validating(len(scores), validation)
    largest = -(-count // folds)
    if folds > count or largest + number >= count:
        raise InputError(
            f"{folds} folds of {count} patients: {largest} to test and {number} to validate leave nobody to train "
            "on; give fewer folds, a smaller validation, or more patients"
        )
    place = {patient: number for number, patient in enumerate(order_patients(scores, seed))}
    dealt = sorted(scores, key=lambda patient: (scores[patient] or "", place[patient]))
    tested = sorted((sorted(dealt[k::folds], key=place.__getitem__) for k in range(folds)), key=lambda f: place[f[0]])
    ring, end, splits = [patient for members in tested for patient in members], 0, []
    for members in tested:
        end += len(members)
        others = [ring[(end + n) % count] for n in range(count - len(members))]
        left, chosen = Counter(scores[patient] for patient in others), list[str]()
        for least in (2, 1):  # the last patient of a score trains, as long as others can validate
            for patient in others:
                if len(chosen) < number and patient not in chosen and left[scores[patient]] >= least:
                    chosen.append(patient)
                    left[scores[patient]] -= 1
        parts = dict.fromkeys(members, "test") | dict.fromkeys(chosen, "val")
        splits.append({patient: parts.get(patient, "train") for patient in sorted(scores)})
    return splits


def validating(patients: int, validation: float) -> int:
    """Return how many patients validate a fold, given their number or share of all (rounded down): one at least."""
    return max(1, int(validation if validation >= 1 else patients * validation + 1e-9))


def folds_of(cohort: Cohort, folds: int, validation: float, seed: int) -> list[dict[str, str]]:
    """Return the split of every fold of a cohort, whatever its own split, as :func:`split_into_folds` does.

    Raises InputError where a patient has two names or an image two patients, or a generator has redrawn the cohort: its
    images show patients whom a fold would test.
    """
    _check_foldable(cohort)
    splits = split_into_folds(patient_scores(cohort), folds, validation, seed)
    for split in splits:
        _check_images(cohort, split)
    return splits


def _check_foldable(cohort: Cohort) -> None:
    if cohort.source.get("patients_seen"):
        raise InputError(
            f"{cohort.folder}: was redrawn by a generator that saw its patients; give folds of the original"
        )
    _check_names(cohort)


def split_of_fit(cohort: Cohort, fits: int, fit: int, seed: int) -> dict[str, str]:
    """Return the split for cross-fitting on training patients: patient -> split; test patients are in none.

    Training patients are dealt into ``fits`` parts, stratified by score; those of one (1, 2, …) are tested, validation
    patients stay. Raises InputError as :func:`folds_of` does, and where there are fewer patients than parts.
    """
    _check_foldable(cohort)
    training = cohort.patients("train")
    if len(training) < fits:
        raise InputError(
            f"{cohort.folder}: {len(training)} training patients cannot be dealt into {fits} parts for cross-fitting; "
            "set variants.cross_fit lower"
        )
    ordered = order_patients({name: score for name, score in patient_scores(cohort).items() if name in training}, seed)
    split = dict.fromkeys(ordered, "train") | dict.fromkeys(ordered[fit - 1 :: fits], "test")
    split |= dict.fromkeys(cohort.patients("val"), "val")
    _check_images(cohort, split)
    return split


def check_disjoint(cohort: Cohort) -> None:
    """Raise InputError where a patient, under one spelling or two, is in two parts."""
    pairs = cohort.regions[["patient", "split"]].dropna().drop_duplicates()
    for _, rows in pairs.groupby(pairs["patient"].map(patient_key)):
        parts, names = sorted(rows["split"].unique()), sorted(rows["patient"].unique())
        if len(parts) > 1:
            again = f"run 'counterstain split {cohort.folder} --force'" if len(names) == 1 else SPELLINGS
            raise InputError(
                f"{cohort.folder}: patient {' or '.join(names)} is in two parts, {' and '.join(parts)}; {again}"
            )


def _totals(count: int, amounts: Mapping[str, float]) -> dict[str, int]:
    """Return the number of patients of each part; shares are rounded by largest remainder."""
    given = " + ".join(f"{amount:g}" for amount in amounts.values())
    total = sum(amounts.values())
    if all(float(amount).is_integer() for amount in amounts.values()) and total != 1:
        if total != count:
            raise InputError(
                f"{given} = {total:g} patients, but the cohort has {count}; give counts that sum to {count}"
            )
        return {part: int(amount) for part, amount in amounts.items()}
    if abs(total - 1) > 1e-6 or max(amounts.values()) > 1:
        raise InputError(
            f"{given} = {total:g}: expected shares that sum to 1 (0.6 0.2 0.2), or whole numbers that sum to the "
            f"{count} patients of the cohort"
        )
    exact = {part: count * amount for part, amount in amounts.items()}
    totals = {part: int(value + 1e-9) for part, value in exact.items()}
    by_remainder = sorted(totals, key=lambda part: totals[part] - exact[part])  # stable: train before val before test
    for part in by_remainder[: count - sum(totals.values())]:
        totals[part] += 1
    empty = [part for part, amount in amounts.items() if amount > 0 and totals[part] == 0]
    if empty:
        raise InputError(f"{given} of {count} patients leaves {empty[0]} empty; give counts, or more patients")
    return totals


def _rounded(rows: Sequence[int], columns: Sequence[int], seed: int) -> np.ndarray:
    """Fill a table of whole numbers from the sums of its rows and columns, each cell its proportion rounded up or down.

    Which cells are rounded up is a transport problem, whose best solution is always whole. Cells with the largest
    remainders are preferred; equal ones are decided by the seed.
    """
    from scipy.optimize import linprog  # takes as long to load as all else here

    lower, remainder = np.divmod(np.outer(rows, columns), sum(rows))
    cells = np.eye(lower.size).reshape(*lower.shape, -1)
    tie_break = numpy_generator(seed, "round").random(lower.size) * 1e-3
    solution = linprog(
        -(remainder.ravel() / sum(rows) + tie_break),
        A_eq=np.concatenate([cells.sum(axis=1), cells.sum(axis=0)]),
        b_eq=np.concatenate([rows - lower.sum(axis=1), columns - lower.sum(axis=0)]),
        bounds=np.stack([np.zeros(lower.size), remainder.ravel() > 0], axis=1),
    )
    assert solution.success, solution.message
    table: np.ndarray = lower + np.rint(solution.x).astype(np.int64).reshape(lower.shape)
    return table


def order_patients(scores: Mapping[str, str | None], seed: int) -> list[str]:
    """Order patients so that the first n are a stratified choice, for any n; larger choices contain smaller ones.

    Among the first n each score (None counts as one) has its share of n, to within one patient.
    """
    waiting = {
        score: numpy_generator(seed, "training patients", score).permutation(members).tolist()
        for score, members in _by_score(scores).items()
    }
    sizes = {score: len(members) for score, members in waiting.items()}
    ties = dict(zip(sizes, numpy_generator(seed, "scores").permutation(len(sizes)).tolist(), strict=True))
    ordered: list[str] = []
    for number in range(1, len(scores) + 1):
        lacks = {s: sizes[s] / len(scores) * number - (sizes[s] - len(left)) for s, left in waiting.items() if left}
        ordered.append(waiting[max(lacks, key=lambda score: (lacks[score], ties[score]))].pop())
    return ordered


def keep_training_patients(cohort: Cohort, count: int, seed: int) -> Cohort:
    """Take all but ``count`` training patients out of the split, stratified by score; val and test stay as they are."""
    scores = patient_scores(cohort)
    kept = order_patients({patient: scores[patient] for patient in training_patients(cohort, count)}, seed)[:count]
    parts = {"train": kept, "val": cohort.patients("val"), "test": cohort.patients("test")}
    return cohort.write_split({patient: part for part, patients in parts.items() for patient in patients})


def training_patients(cohort: Cohort, count: int) -> list[str]:
    """Return the training patients, ``count`` at least or InputError; those whom a generator saw are none of them."""
    patients = sorted({*cohort.regions.loc[cohort.regions["split"] == "train", "patient"]})
    if count > len(patients):
        raise InputError(
            f"{cohort.folder}: {count} training patients are asked for, its training part has {len(patients)}; "
            f"give {len(patients)} at most"
        )
    return patients


def link_cohort(cohort: Cohort, folder: Path) -> Cohort:
    """Make a cohort with its own tables and the pixels of another, which must stay where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    link_packs(cohort.folder, folder)
    for name in (*([IMPORT_FILE] if (cohort.folder / IMPORT_FILE).exists() else []), *TABLES):
        with replacing(folder / name) as partial:
            partial.write_bytes((cohort.folder / name).read_bytes())
    return Cohort.open(folder)


def link_packs(whole: Place, folder: Path) -> None:
    """Point a cohort made by :func:`link_cohort` to the pixels of the whole one, which may have been moved.

    A copy of it that followed the link has the pixels itself, and keeps them.
    """
    packs, elsewhere = folder / "packs", folder / PACKS_AT
    place = packs_of(whole).resolve()
    if packs.readlink() == place if packs.is_symlink() else packs.exists():
        return
    for link in (packs, elsewhere):
        link.unlink(missing_ok=True)
    if isinstance(place, Path):
        packs.symlink_to(place, target_is_directory=True)
    else:
        write_json(elsewhere, {"url": str(place)})
