"""The review of a synthetic set: what people say of its patches, kept in the set and never deleted.

``review.jsonl`` of the set has a line per decision: ``index`` (number of the patch), ``decision`` (accept, reject,
unsure, or undo: the reviewer's last decision of the patch no longer counts), ``reviewer``, ``time`` (ISO 8601, UTC)
and ``set`` (what distinguishes the set from others). Of several decisions of one patch, the last that was not undone
counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd

from counterstain.data.patch_set import BY_HAND, HEADER_FILE, PatchSet, PatchSetHeader
from counterstain.errors import InputError, MismatchError, StorageError
from counterstain.journals import Record, held, now, person, records_of
from counterstain.storage import fingerprint, read_csv, read_json
from counterstain.taxonomy import IGNORE

REVIEW_FILE = "review.jsonl"
UNDO, UNDECIDED = "undo", "undecided"
Decision = Literal["accept", "reject", "unsure"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)
COLUMNS = ["index", "decision", "reviewer", "time"]


class Progress(NamedTuple):
    """How far a review is."""

    patches: int
    accepted: int
    rejected: int
    unsure: int

    @property
    def reviewed(self) -> int:
        """Patches with a decision."""
        return self.accepted + self.rejected + self.unsure

    def __str__(self) -> str:
        of_these = f"{self.accepted} accepted, {self.rejected} rejected, {self.unsure} unsure"
        return f"{self.reviewed} of {self.patches} patches reviewed: {of_these}"


class Review:
    """The decisions about the patches of a synthetic set.

    ``reviewer`` (a name or number) is needed to decide. ``audit`` is a folder of ``counterstain audit``, in which the
    set was audited: near copies of training tissue then come first. ``judged`` gives, for a set that was drawn without
    a filter, the share of each patch's instances that look to a judge as asked, by number
    (:func:`counterstain.audit.judge.agreement`); it is asked when it is needed.

    Examples
    --------
    >>> review = Review("synthetic", reviewer="ada")
    >>> review.decide(3, "reject")
    >>> review.decide(5, "unsure")
    >>> review.undo()
    5
    >>> review
    Review(synthetic: 1 of 64 patches reviewed: 0 accepted, 1 rejected, 0 unsure)
    >>> review.rejected
    (3,)
    >>> review.select(subtype="HER2 3+", decision="undecided")[:4]
    [0, 5, 7, 12]
    """

    def __init__(
        self,
        patches: str | Path | PatchSet,
        reviewer: str | None = None,
        *,
        audit: str | Path | None = None,
        judged: Callable[[], pd.Series] | None = None,
    ) -> None:
        self.patches = patches if isinstance(patches, PatchSet) else PatchSet.open(patches)
        self.reviewer = None if reviewer is None else person(reviewer, "reviewer")
        self.file = self.patches.folder / REVIEW_FILE
        self.audit = None if audit is None else Path(audit)
        self._judged = judged

    def __repr__(self) -> str:
        return f"Review({self.patches.folder}: {self.progress()})"

    def decide(self, index: int, decision: str) -> None:
        """Keep a decision about a patch: accept, reject or unsure. It is on the disk when this returns."""
        if decision not in DECISIONS:
            raise InputError(f"decision {decision!r}: expected {', '.join(DECISIONS)}")
        self.check([index])
        record = self._record(int(index), decision)
        with held(self.file) as (_, append):
            append(record)

    def check(self, numbers: Iterable[int]) -> None:
        """Raise InputError where the set has no patch of one of these numbers."""
        for index in numbers:
            if isinstance(index, bool) or index not in range(len(self.patches)):
                last = len(self.patches) - 1
                raise InputError(f"{self.patches.folder}: patch {index}: expected a number of 0 to {last}")

    def undo(self) -> int | None:
        """Take the last decision of this reviewer back, and return the number of its patch; None if there is none."""
        name = self._name
        with held(self.file) as (records, append):
            own = [record for record in self._standing(records) if record["reviewer"] == name]
            if not own:
                return None
            append(self._record(own[-1]["index"], UNDO))
            return int(own[-1]["index"])

    def history(self) -> list[Record]:
        """Return all lines of the file, oldest first, those that no longer count as well."""
        return self._checked(records_of(self.file))

    def decisions(self) -> pd.DataFrame:
        """Return what counts, a row per decided patch: index, decision, reviewer, time."""
        rows = [[record[name] for name in COLUMNS] for record in self._counted()]
        return pd.DataFrame(rows, columns=COLUMNS).astype({"index": "int64"})

    def progress(self) -> Progress:
        """Return how many patches were accepted, rejected and left unsure."""
        found = self.decisions()["decision"].value_counts()
        return Progress(len(self.patches), *(int(found.get(decision, 0)) for decision in DECISIONS))

    @property
    def rejected(self) -> tuple[int, ...]:
        """The numbers of the rejected patches, in ascending order."""
        found = self.decisions()
        return tuple(found.loc[found["decision"] == "reject", "index"].tolist())

    def provenance(self) -> dict[str, Any]:
        """Return what is recorded of a review by what was made with it: a hash of the decisions, and their counts."""
        decisions = self.decisions()[["index", "decision"]].to_numpy().tolist()
        return {"decisions": fingerprint(decisions), **self.progress()._asdict()}

    def table(self) -> pd.DataFrame:
        """Return a row per patch, near copies first where the set was audited.

        Columns: ``index``; ``region``, ``slide`` and ``patient`` of its mask; ``subtypes`` (names, as they were asked
        for); ``method`` (by hand: of its last drawing); ``agreement`` (share of its instances that look to the judge as
        asked; NaN without one); ``similarity`` (Pearson's correlation with the training tissue that it resembles most;
        NaN if not searched for); ``decision`` (undecided without one), ``reviewer``.
        """
        return self._table().assign(agreement=lambda table: table["index"].map(self.agreement))

    def _table(self) -> pd.DataFrame:
        table = self.patches.patches[["index", "region", "slide", "patient"]]
        known, subtypes = {record["index"]: record for record in self._counted()}, self._subtypes()
        undecided = {"decision": UNDECIDED, "reviewer": ""}
        table = table.assign(
            subtypes=pd.Series([subtypes.get(index, ()) for index in table["index"]], index=table.index, dtype=object),
            decision=[known.get(index, undecided)["decision"] for index in table["index"]],
            reviewer=[known.get(index, undecided)["reviewer"] for index in table["index"]],
            method=self.methods,
            similarity=table["index"].map(self.similarity),
        )
        return table.sort_values(["similarity", "index"], ascending=[False, True], ignore_index=True)

    def select(
        self,
        *,
        subtype: str | None = None,
        slide: str | None = None,
        method: str | None = None,
        agreed: bool | None = None,
        decision: str | Sequence[str] | None = None,
    ) -> list[int]:
        """Return the numbers of patches that have an instance of a subtype, are of a slide, drawn by a method, have a
        decision (undecided is one), and look to the judge entirely as asked or not; near copies first.

        Without a judge, ``agreed`` selects nothing.
        """
        table = self._table()
        if subtype is not None:
            name = self.patches.header.taxonomy.name_of(self.patches.header.taxonomy.id_of(subtype))
            table = table[table["subtypes"].map(lambda names: name in names)]
        if slide is not None:
            table = table[table["slide"] == slide]
        if method is not None:
            table = table[table["method"] == method]
        if agreed is not None:
            agreement = table["index"].map(self.agreement)
            table = table[agreement.notna() & ((agreement == 1) == agreed)]
        if decision is not None:
            wanted = [decision] if isinstance(decision, str) else list(decision)
            for unknown in set(wanted) - {*DECISIONS, UNDECIDED}:
                raise InputError(f"decision {unknown!r}: expected {', '.join((*DECISIONS, UNDECIDED))}")
            table = table[table["decision"].isin(wanted)]
        return [int(index) for index in table["index"]]

    def _counted(self) -> list[Record]:
        """Return the decision of each decided patch."""
        last = {record["index"]: record for record in self._standing(records_of(self.file))}
        return [last[index] for index in sorted(last)]

    @property
    def _name(self) -> str:
        if self.reviewer is None:
            raise InputError(f"{self.patches.folder}: a decision needs a reviewer; give a name or number")
        return self.reviewer

    def _record(self, index: int, decision: str) -> Record:
        mark = set_mark(self.patches.header)
        return {"index": index, "decision": decision, "reviewer": self._name, "time": now(), "set": mark}

    def _checked(self, records: Iterable[Record]) -> list[Record]:
        mark, checked = set_mark(self.patches.header), []
        for record in records:
            index, decision = record.get("index"), record.get("decision")
            if record.get("set") != mark:
                raise MismatchError(f"{self.file}: holds decisions about another synthetic set; move it away")
            if type(index) is not int or index not in range(len(self.patches)):
                raise StorageError(f"{self.file}: patch {index!r}: the set has {len(self.patches)}; correct the line")
            if decision not in (*DECISIONS, UNDO):
                known = ", ".join((*DECISIONS, UNDO))
                raise StorageError(f"{self.file}: decision {decision!r}: expected {known}; correct the line")
            checked.append(record | {name: str(record.get(name, "")) for name in ("reviewer", "time")})
        return checked

    def _standing(self, records: Iterable[Record]) -> list[Record]:
        """Return the decisions that were not undone, oldest first."""
        standing: list[Record] = []
        for record in self._checked(records):
            if record["decision"] != UNDO:
                standing.append(record)
                continue
            whose = (record["index"], record["reviewer"])
            for place in [i for i, one in enumerate(standing) if (one["index"], one["reviewer"]) == whose][-1:]:
                del standing[place]
        return standing

    def _subtypes(self) -> dict[int, tuple[str, ...]]:
        taxonomy, shown = self.patches.header.taxonomy, self.patches.instances
        shown = shown[shown["subtype"] != IGNORE]
        names: dict[int, set[int]] = {}
        for index, subtype in shown[["index", "subtype"]].to_numpy().tolist():
            names.setdefault(index, set()).add(subtype)
        return {index: tuple(map(taxonomy.name_of, sorted(found))) for index, found in names.items()}

    @cached_property
    def methods(self) -> pd.Series:
        """The method that drew each patch; of one drawn by hand, the last."""
        table = self.patches.patches
        if self.patches.header.method == BY_HAND:
            return table["steps"].map(lambda steps: str(json.loads(steps)[-1]["method"]))
        return pd.Series(self.patches.header.method, index=table.index)

    @cached_property
    def agreement(self) -> pd.Series:
        """Share of the instances of patches that look to the judge as asked, by number; empty without one."""
        judged = self.patches.judged
        if judged.empty and self._judged is not None:
            return self._judged()
        last = judged[judged["drawing"] == judged.groupby("index")["drawing"].transform("max")]
        return last.groupby("index")["agreed"].mean()

    @cached_property
    def similarity(self) -> pd.Series:
        """How similar patches are to the training tissue that they resemble most, by number; empty without an audit."""
        if self.audit is None:
            return pd.Series(dtype=float)
        known = read_json(self.audit / "audit.json").get("sets", {})
        own = set_mark(self.patches.header)
        taxonomy = {"taxonomy": self.patches.header.taxonomy.model_dump(mode="json")}
        names = [n for n, h in known.items() if set_mark(PatchSetHeader.model_validate(h | taxonomy)) == own]
        if not names:
            raise MismatchError(f"{self.audit}: this set was not audited there; it has {', '.join(known) or 'none'}")
        table = read_csv(self.audit / "copies.csv")
        found: pd.Series = table[table["images"] == names[0]].set_index("image")["similarity"]
        return found


def set_mark(header: PatchSetHeader) -> str:
    """Return what distinguishes a synthetic set from others; one that was made longer keeps it."""
    grows = {"patients_seen", "settings"} if header.method == BY_HAND else set()
    return fingerprint(header.model_dump(mode="json", exclude={"count", "version", *grows}))[:16]


def rejected_in(folder: Path, count: int) -> list[int]:
    """Return the rejected ones of the first ``count`` patches of a set; none without a review, or a set."""
    reviewed = (folder / HEADER_FILE).exists() and (folder / REVIEW_FILE).exists()
    return [number for number in Review(folder).rejected if number < count] if reviewed else []


def not_rejected(patches: PatchSet) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """Return the tables of patches and of instances of a set without what was rejected, and what that is.

    The latter is for the record: ``rejected`` (numbers) and ``review`` (see :meth:`Review.provenance`); empty where
    nothing was rejected. Raises InputError where everything was.
    """
    review = review_of(patches)
    if review is None or not (rejected := review.rejected):
        return {}, patches.patches, patches.instances
    if len(rejected) == len(patches):
        raise InputError(f"{patches.folder}: all patches are rejected; review them again, or draw another set")
    shown, instances = (table[~table["index"].isin(rejected)] for table in (patches.patches, patches.instances))
    return {"rejected": list(rejected), "review": review.provenance()}, shown, instances


def review_of(patches: PatchSet) -> Review | None:
    """Return the review of a set; None where nobody has begun one."""
    return Review(patches) if (patches.folder / REVIEW_FILE).exists() else None
