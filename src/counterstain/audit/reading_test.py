"""A blind reading test: people say which patches are real and which are drawn, and which subtype they see.

TEST/ is what readers, or the program that shows it to them, need:
    test.json           what the test is, without its key; written last
    questions/0001.png  the patches, real and drawn in random order, all written by the same encoder
    answers/NAME.jsonl  the answers of a reader, only ever appended to; the first answer of a question counts
TEST.key.json, beside the folder, says which are drawn, which subtype each shows, and where it is from.

Both kinds are cut out at places that were chosen alike, no two overlap by more than a quarter, and for each drawn patch
there is a real one that shows the same subtypes, and most of the same: neither place nor composition tells them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import Field

import counterstain
from counterstain.config import Config, build
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet
from counterstain.data.patches import Patch, Source
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.data.split import check_no_leak
from counterstain.errors import ConfigError, InputError, MismatchError, StorageError
from counterstain.journals import Record, held, now, person, records_of
from counterstain.seeding import derive, numpy_generator
from counterstain.storage import claimed, name_on_disk, read_sealed, replacing, sha256_of, write_sealed
from counterstain.taxonomy import IGNORE, Taxonomy

TEST_FILE, QUESTIONS, ANSWERS, KEY_SUFFIX = "test.json", "questions", "answers", ".key.json"
MOST_SHARED = 0.25  # of its area that a patch may have in common with another
TRIES = 40  # real patches that are looked at for each one wanted
CONFIDENCES = range(1, 6)
KINDS = ("real", "drawn")
ANSWER_COLUMNS = {
    "reader": "str", "question": "int64", "drawn": "bool", "subtype": "str", "confidence": "Int64", "time": "str",
}  # fmt: skip
Stratum = tuple[int, tuple[int, ...]]  # subtype of most of a patch's area, and all subtypes that it shows


class ReadingTestHeader(Config):
    """What is known of a test without its key."""

    taxonomy: Taxonomy
    questions: Annotated[int, Field(ge=2)]
    size_px: int
    mpp: float
    method: str  # how the drawn half was drawn
    part: Literal["val", "test"]  # that real patches are of
    cohort: str  # its fingerprint
    key_sha256: str
    version: str


class Question(Config):
    """What the key says of a question."""

    drawn: bool
    subtype: str  # of most of its area
    subtypes: tuple[str, ...]  # all that it shows
    number: int  # of the patch in the synthetic set, or in the stream of real patches
    source: dict[str, Any]  # where the patch, or its mask, was cut out


@dataclass(frozen=True)
class ReadingTest:
    """A blind reading test, without its key.

    Examples
    --------
    >>> test = make_reading_test("cohort", synthetic="synthetic", out="reading", count=8)
    >>> test
    ReadingTest(reading: 8 questions of 48 px, drawn by oracle; no reader yet)
    >>> test.image(1).shape, test.subtypes[:2]
    ((48, 48, 3), ('HER2 0', 'HER2 1+'))
    >>> test.answer("ada", 1, drawn=True, subtype="HER2 0", confidence=4)
    >>> test.next_question("ada"), test.progress("ada")
    (2, (1, 8))
    >>> test.truth("ada", 1).drawn in {True, False}
    True
    """

    folder: Path
    header: ReadingTestHeader
    key_file: Path

    @classmethod
    def open(cls, folder: str | Path, key: str | Path | None = None) -> ReadingTest:
        """Open a test; ``key`` is TEST.key.json beside its folder if not given, and is read only when it is needed.

        Raises InputError where there is no test.
        """
        folder = Path(folder)
        if not (folder / TEST_FILE).exists():
            raise InputError(f"{folder}: no reading test ({TEST_FILE} is missing); make one with 'reading-test make'")
        header = build(ReadingTestHeader, read_sealed(folder / TEST_FILE), folder / TEST_FILE)
        return cls(folder, header, key_of(folder) if key is None else Path(key))

    def __len__(self) -> int:
        return self.header.questions

    def __repr__(self) -> str:
        readers = ", ".join(self.readers()) or "no reader yet"
        h = self.header
        return f"ReadingTest({self.folder}: {len(self)} questions of {h.size_px} px, drawn by {h.method}; {readers})"

    @property
    def subtypes(self) -> tuple[str, ...]:
        """The subtypes that a reader chooses from."""
        return self.header.taxonomy.names

    def picture(self, question: int) -> Path:
        """Return the file of a question, 1, 2, …"""
        if isinstance(question, bool) or question not in range(1, len(self) + 1):
            raise InputError(f"{self.folder}: question {question}: expected a number of 1 to {len(self)}")
        return self.folder / QUESTIONS / f"{int(question):04d}.png"

    def image(self, question: int) -> np.ndarray:
        """Return the patch of a question, (H, W, 3) uint8."""
        path = self.picture(question)
        try:
            with Image.open(path) as picture:
                return np.asarray(picture.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's of a broken PNG is a SyntaxError
            raise StorageError(f"{path}: missing or damaged ({error}); make the test again") from error

    def answer(self, reader: str, question: int, *, drawn: bool, subtype: str, confidence: int | None = None) -> None:
        """Keep an answer: is the patch drawn, which subtype does most of it show, and how sure is the reader (1 to 5)?

        It is on the disk when this returns, and final: raises InputError where the reader has answered the question.
        """
        if not isinstance(drawn, bool | np.bool_):
            raise InputError(f"drawn {drawn!r}: expected True (drawn) or False (real)")
        if subtype not in self.subtypes:
            raise InputError(f"subtype {subtype!r}: expected one of {', '.join(self.subtypes)}")
        if confidence is not None and (isinstance(confidence, bool) or confidence not in CONFIDENCES):
            raise InputError(f"confidence {confidence!r}: expected a whole number of 1 (a guess) to 5 (certain)")
        number = int(self.picture(question).stem)
        record: Record = {"reader": person(reader, "reader"), "question": number, "drawn": bool(drawn)}
        record |= {"subtype": subtype, "confidence": None if confidence is None else int(confidence), "time": now()}
        with held(self._file_of(reader)) as (records, append):
            if any(known.get("question") == number for known in records):
                raise InputError(f"{self.folder}: {record['reader']} has answered question {number}; answers are final")
            append(record | {"test": self.header.key_sha256[:16]})

    def answers(self, reader: str | None = None) -> pd.DataFrame:
        """Return the answers that count, of all readers or of one: reader, question, drawn, subtype, confidence, time.

        Raises StorageError where a file holds something that is no answer, MismatchError where it is of another test.
        """
        files = sorted((self.folder / ANSWERS).glob("*.jsonl")) if reader is None else [self._file_of(reader)]
        rows: dict[tuple[str, int], Record] = {}
        for file in files:
            for record in records_of(file):
                checked = self._checked(record, file)
                rows.setdefault((checked["reader"], checked["question"]), checked)
        table = pd.DataFrame([*rows.values()], columns=list(ANSWER_COLUMNS)).astype(ANSWER_COLUMNS)
        return table.sort_values(["reader", "question"], ignore_index=True)

    def readers(self) -> list[str]:
        """Return who has answered a question, by name."""
        return list(dict.fromkeys(self.answers()["reader"]))

    def progress(self, reader: str) -> tuple[int, int]:
        """Return how many questions a reader has answered, and how many there are."""
        return len(self.answers(reader)), len(self)

    def next_question(self, reader: str) -> int | None:
        """Return the first question that a reader has not answered; None where all are."""
        answered = {*self.answers(reader)["question"]}
        return next((number for number in range(1, len(self) + 1) if number not in answered), None)

    def truth(self, reader: str, question: int) -> Question:
        """Return what the key says of a question that a reader has answered; raises InputError before that."""
        self.picture(question)
        if question not in {*self.answers(reader)["question"]}:
            raise InputError(f"{self.folder}: {reader} has not answered question {question} yet")
        return self.key()[question - 1]

    def key(self) -> list[Question]:
        """Return the key, question by question; raises InputError where its file is missing, MismatchError of another
        test.
        """
        if not self.key_file.exists():
            raise InputError(f"{self.key_file}: no such key; give the one that was written beside the test with --key")
        if sha256_of(self.key_file) != self.header.key_sha256:
            raise MismatchError(f"{self.key_file}: is the key of another test than {self.folder}, or was changed")
        return [build(Question, question, self.key_file) for question in read_sealed(self.key_file)["questions"]]

    def _file_of(self, reader: str) -> Path:
        return self.folder / ANSWERS / f"{name_on_disk(person(reader, 'reader'))}.jsonl"

    def _checked(self, record: Record, file: Path) -> Record:
        if record.get("test") != self.header.key_sha256[:16]:
            raise MismatchError(f"{file}: holds answers to another reading test; move it away")
        confidence = record.get("confidence")
        sound = (
            isinstance(record.get("reader"), str)
            and type(record.get("question")) is int
            and record["question"] in range(1, len(self) + 1)
            and isinstance(record.get("drawn"), bool)
            and record.get("subtype") in self.subtypes
            and (confidence is None or (type(confidence) is int and confidence in CONFIDENCES))
        )
        if not sound:
            raise StorageError(f"{file}: question {record.get('question')!r}: no answer to this test; correct the line")
        return {name: record.get(name) for name in ANSWER_COLUMNS}


def key_of(folder: Path) -> Path:
    """Return where the key of a test goes: beside its folder, which can then be given away without it."""
    place = folder.resolve()
    return place.with_name(place.name + KEY_SUFFIX)


def write_reading_test(
    cohort: Cohort, synthetic: PatchSet, out: Path, *, part: str | None = None, count: int = 40, seed: int = 0
) -> ReadingTest:
    """Make a test of ``count`` patches, half of them real, of a held-out part, and half of them from a synthetic set.

    ``part`` (val or test) is that of the set's masks if not given, or test where these are of training tissue. A
    finished test is left as it is.

    Raises InputError where the count is odd, or there are not as many patches that fit together; MismatchError where
    the set is not of the cohort, or ``out`` holds another test; LeakageError where the set's generator saw the part.
    """
    part = part or (synthetic.header.part if synthetic.header.part != "train" else "test")
    _require_testable(cohort, synthetic, part, count)
    choice = {"cohort": cohort.fingerprint, "synthetic": synthetic.header.model_dump(mode="json"), "part": part}
    with claimed(out, "reading test", choice | {"count": count, "seed": seed}):
        if (out / TEST_FILE).exists():
            return ReadingTest.open(out)
        pairs = _Pairs(cohort, synthetic, part, seed).choose(count // 2)
    questions = [question for pair in pairs for question in pair]
    order = numpy_generator(seed, "reading test", "order").permutation(count)
    shown = [questions[i] for i in order]
    (out / QUESTIONS).mkdir(exist_ok=True)
    for number, question in enumerate(shown, start=1):
        with replacing(out / QUESTIONS / f"{number:04d}.png") as partial:
            Image.fromarray(question.image).save(partial, format="PNG")
    write_sealed(key_of(out), {"questions": [question.known.model_dump(mode="json") for question in shown]})
    header = ReadingTestHeader(
        taxonomy=cohort.taxonomy,
        questions=count,
        size_px=synthetic.header.size_px,
        mpp=cohort.mpp,
        method=synthetic.header.method,
        part="val" if part == "val" else "test",
        cohort=cohort.fingerprint,
        key_sha256=sha256_of(key_of(out)),
        version=counterstain.__version__,
    )
    write_sealed(out / TEST_FILE, header.model_dump(mode="json"))
    return ReadingTest.open(out)


def _require_testable(cohort: Cohort, synthetic: PatchSet, part: str, count: int) -> None:
    header, folder = synthetic.header, synthetic.folder
    if part not in {"val", "test"}:
        raise ConfigError(f"split {part!r}: expected val or test; readers are tested on tissue that was held out")
    if count < 2 or count % 2:
        raise ConfigError(f"count {count}: expected an even number of 2 or more, half of the patches are real")
    if header.taxonomy != cohort.taxonomy or not cohort.is_at(header.mpp) or header.cohort != cohort.fingerprint:
        raise MismatchError(
            f"{folder}: was not made from {cohort.folder} as it is; give the cohort that it was made from"
        )
    if header.part == "train":
        check_no_leak(header.patients_seen, cohort, f"synthetic set {folder}")


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A patch that may be asked about."""

    drawn: bool
    stratum: Stratum
    number: int
    source: Source


@dataclass(frozen=True)
class _Shown:
    """A patch that is asked about."""

    image: np.ndarray  # (H, W, 3) uint8
    known: Question


@dataclass
class _Pairs:
    """Chooses pairs of a drawn and a real patch of equal composition, subtypes as equally often as they allow."""

    cohort: Cohort
    synthetic: PatchSet
    part: str
    seed: int
    taken: list[Source] = field(default_factory=list)

    def choose(self, count: int) -> list[tuple[_Shown, _Shown]]:
        drawn: dict[int, list[_Candidate]] = {}
        for candidate in self._drawn():
            drawn.setdefault(candidate.stratum[0], []).append(candidate)
        real, waiting = self._real(TRIES * count), list[_Candidate]()
        pairs: list[tuple[_Candidate, _Candidate]] = []
        chosen = Counter[int]()
        while len(pairs) < count and drawn:
            subtype = min(drawn, key=lambda one: (chosen[one], one))
            if not drawn[subtype]:
                del drawn[subtype]
                continue
            candidate = drawn[subtype].pop()
            if (match := self._match(candidate, real, waiting)) is not None:
                pairs.append((candidate, match))
                chosen[subtype] += 1
        if len(pairs) < count:
            raise InputError(
                f"{self.synthetic.folder}: {2 * len(pairs)} questions are possible, {2 * count} were asked for: each "
                f"drawn patch needs a real one of the {self.part} part that shows the same subtypes, and none may "
                "overlap by more than a quarter; give a smaller --count or a larger synthetic set"
            )
        return [(self._shown(one), self._shown(other)) for one, other in pairs]

    def _match(self, drawn: _Candidate, real: Iterator[_Candidate], waiting: list[_Candidate]) -> _Candidate | None:
        """Find a real patch for a drawn one: among those looked at already, then among further ones."""
        if not self._is_free(drawn.source):
            return None

        def fits(candidate: _Candidate) -> bool:
            apart = not self._overlap(candidate.source, drawn.source) and self._is_free(candidate.source)
            return candidate.stratum == drawn.stratum and apart

        for i, candidate in enumerate(waiting):
            if fits(candidate):
                del waiting[i]
                self.taken += [drawn.source, candidate.source]
                return candidate
        for candidate in real:
            if fits(candidate):
                self.taken += [drawn.source, candidate.source]
                return candidate
            waiting.append(candidate)
        return None

    def _drawn(self) -> Iterator[_Candidate]:
        """Yield the patches of the set that show tissue of a known subtype, in random order."""
        order = numpy_generator(self.seed, "reading test", "drawn").permutation(len(self.synthetic))
        sources = self.synthetic.patches.set_index("index")[list(Source.__dataclass_fields__)]
        shown = dict(iter(self.synthetic.instances.groupby("index")))
        for number in order.tolist():
            if number in shown:
                areas = Counter[int]()
                for subtype, area in shown[number][["subtype", "area_px"]].to_numpy().tolist():
                    areas[subtype] += area
                if (stratum := _stratum(areas)) is not None:
                    source = Source(**sources.loc[number].to_dict())
                    yield _Candidate(drawn=True, stratum=stratum, number=number, source=source)

    def _real(self, most: int) -> Iterator[_Candidate]:
        for number in range(most):
            patch = self._sampler[number]
            areas = Counter[int]()
            for instance, area in patch.areas_px.items():
                areas[patch.subtypes[instance]] += area
            if (stratum := _stratum(areas)) is not None:
                yield _Candidate(drawn=False, stratum=stratum, number=number, source=patch.source)

    @cached_property
    def _sampler(self) -> PatchSampler:
        given = self.synthetic.header.settings.get("synthesis", {}).get("sampling", {})
        config = build(SamplingConfig, given, self.synthetic.folder)
        size_px = self.synthetic.header.size_px
        return PatchSampler(self.cohort, self.part, size_px, config, derive(self.seed, "reading test", "real"))

    def _is_free(self, source: Source) -> bool:
        return not any(self._overlap(source, other) for other in self.taken)

    def _overlap(self, one: Source, other: Source) -> bool:
        size = self.synthetic.header.size_px
        if one.region != other.region:
            return False
        rows, columns = (max(0, size - abs(a - b)) for a, b in ((one.y_px, other.y_px), (one.x_px, other.x_px)))
        return rows * columns > MOST_SHARED * size**2

    def _shown(self, candidate: _Candidate) -> _Shown:
        patch: Patch = self.synthetic[candidate.number] if candidate.drawn else self._sampler[candidate.number]
        most, shown = candidate.stratum
        known = Question(
            drawn=candidate.drawn,
            subtype=self.cohort.taxonomy.name_of(most),
            subtypes=tuple(map(self.cohort.taxonomy.name_of, shown)),
            number=candidate.number,
            source=asdict(candidate.source),
        )
        return _Shown(patch.image, known)


def _stratum(areas_px: Mapping[int, int]) -> Stratum | None:
    """Return the composition of a patch from the area of each subtype; None where there is nothing to ask about."""
    if not areas_px or IGNORE in areas_px:
        return None
    most = max(areas_px, key=lambda subtype: (areas_px[subtype], -subtype))
    return most, tuple(sorted(areas_px))
