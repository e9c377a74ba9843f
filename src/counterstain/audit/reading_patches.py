"""The patches of a blind reading test: pairs of a drawn and a real one of equal composition, in random order.

Both kinds are cut out at places that were chosen alike, no two overlap by more than a quarter, and for each drawn patch
there is a real one that shows the same subtypes, and most of the same: neither place nor composition tells them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

import counterstain
from counterstain.audit.reading_test import (
    QUESTIONS,
    TEST_FILE,
    Question,
    ReadingTest,
    ReadingTestHeader,
    key_of,
)
from counterstain.config import build
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet
from counterstain.data.patches import Patch, Source
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.data.split import check_no_leak
from counterstain.errors import ConfigError, InputError, MismatchError
from counterstain.seeding import derive, numpy_generator
from counterstain.storage import claimed, replacing, sha256_of, write_sealed
from counterstain.taxonomy import IGNORE

LEAST_SHARE = 0.05  # of its area that a patch must show of the subtype that is asked for
MOST_SHARED = 0.25  # of its area that a patch may have in common with another
TRIES = 40  # real patches that are looked at for each one wanted
Stratum = tuple[int, tuple[int, ...]]  # subtype of most of a patch's area, and all subtypes that it shows


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
                if (stratum := _stratum(areas, self.synthetic.header.size_px)) is not None:
                    source = Source(**sources.loc[number].to_dict())
                    yield _Candidate(drawn=True, stratum=stratum, number=number, source=source)

    def _real(self, most: int) -> Iterator[_Candidate]:
        for number in range(most):
            patch = self._sampler[number]
            areas = Counter[int]()
            for instance, area in patch.areas_px.items():
                areas[patch.subtypes[instance]] += area
            if (stratum := _stratum(areas, self.synthetic.header.size_px)) is not None:
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


def _stratum(areas_px: Mapping[int, int], size_px: int) -> Stratum | None:
    """Return the composition of a patch from the area of each subtype; None where there is nothing to ask about."""
    if not areas_px or IGNORE in areas_px:
        return None
    most = max(areas_px, key=lambda subtype: (areas_px[subtype], -subtype))
    return (most, tuple(sorted(areas_px))) if areas_px[most] >= LEAST_SHARE * size_px**2 else None
