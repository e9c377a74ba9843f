"""A blind reading test: people say which patches are real and which are drawn, and which subtype they see.

TEST/ is what readers, or the program that shows it to them, need:
    test.json           what the test is, without its key; written last
    questions/0001.png  the patches, real and drawn in random order, all written by the same encoder
    answers/NAME.jsonl  the answers of a reader, only ever appended to; the first answer of a question counts
TEST.key.json, beside the folder, says which are drawn, which subtype each shows, and where it is from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import Field

from counterstain.config import Config, build
from counterstain.errors import InputError, MismatchError, StorageError
from counterstain.journals import Record, held, now, person, records_of
from counterstain.storage import disk_errors_named, name_on_disk, read_sealed, sha256_of
from counterstain.taxonomy import Taxonomy

TEST_FILE, QUESTIONS, ANSWERS, KEY_SUFFIX = "test.json", "questions", "answers", ".key.json"
CONFIDENCES = range(1, 6)
ANSWER_COLUMNS = {
    "reader": "str", "question": "int64", "drawn": "bool", "subtype": "str", "confidence": "Int64", "time": "str",
}  # fmt: skip


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
        with disk_errors_named(self.folder):
            if (self.folder / TEST_FILE).exists():
                (self.folder / ANSWERS).mkdir(exist_ok=True)
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
