"""The subtypes of a tissue class: their ids, names, colours and which of them count; scores made of their shares."""

from __future__ import annotations

import colorsys
import difflib
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import yaml
from pydantic import Field, model_validator

from counterstain.config import Config, build, read_yaml
from counterstain.errors import ConfigError, InputError, TaxonomyError

BACKGROUND = 0
IGNORE = 255  # label of pixels that are left out of sampling and of counts
NO_NAMES = ("none", "null", "nan", "na", "n/a", "bg")
MINUS = "\u2212"
MEANINGS = {"background": BACKGROUND, "ignore": IGNORE}  # what pixels can be that are no subtype
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # characters that names must not have

SHORTEST_NEAR, NEAR = 6, 0.83  # letters of a name; share of letters that two names have in common
LONGEST_SHORT = 3  # letters of words that differ even by one: II and III, a and b

# Okabe and Ito (2008), "Color universal design", without black; told apart with every kind of colour-blindness.
_COLOUR_BLIND_SAFE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")

NameStr = Annotated[str, Field(min_length=1, max_length=80)]
Merge = str | Mapping[str, Sequence[str]]  # one of a taxonomy's merges, or new subtype -> names; others stay


class Subtype(Config):
    """One subtype of the tissue class.

    Examples
    --------
    >>> Subtype(id=1, name="HER2 0", colour="#0072b2").counted
    True
    """

    id: Annotated[int, Field(ge=1, le=254)]
    """Value in label masks; the subtypes of a taxonomy are numbered 1, 2, 3, …"""
    name: NameStr
    """As users write it, for example ``HER2 1+``."""
    colour: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]
    """In figures and overlays, as ``#rrggbb``."""
    counted: bool = True
    """Whether its recall enters the subtype variance."""


class ScoreStep(Config):
    """A line of a score rule: the score where some subtypes together exceed a share of the counted tissue."""

    score: NameStr
    """The score of a slide, such as ``3+``."""
    subtypes: Annotated[tuple[NameStr, ...], Field(min_length=1)]
    """The subtypes whose shares are added up."""
    above: Annotated[float, Field(ge=0, lt=1)]
    """The share that they must exceed, 0 to 1."""


class ScoreRule(Config):
    """How a slide is scored by the shares of its subtypes: by the first of ``steps`` that holds, from the top.

    Examples
    --------
    >>> rule = Taxonomy.named("her2").score_rule("2018")
    >>> rule.scores
    ('0', '1+', '2+', '3+')
    >>> rule.levels(np.array([[60, 25, 3, 12, 500.0]]), Taxonomy.named("her2")).tolist()  # 12 % 3+ outside the ducts
    [3]
    """

    counted: Annotated[tuple[NameStr, ...], Field(min_length=1)]
    """The subtypes that a score is made of; others, such as in situ growth, are left out."""
    steps: Annotated[tuple[ScoreStep, ...], Field(min_length=1)]
    """From the highest score to the lowest; a score may have several."""
    otherwise: NameStr
    """The score where no step holds: the lowest."""

    @model_validator(mode="after")
    def _steps_fit_together(self) -> Self:
        scores = [step.score for step in self.steps]
        for number, step in enumerate(self.steps):
            what, above = f"step {number + 1} ({step.score})", self.steps[:number]
            if missing := [name for name in step.subtypes if name not in self.counted]:
                raise ValueError(f"{what} names {missing[0]!r}, which is not among counted")
            if len({*step.subtypes}) < len(step.subtypes):
                raise ValueError(f"{what} names a subtype twice")
            if step.score in scores[:number] and scores[number - 1] != step.score:
                raise ValueError(f"{what} is above {scores[number - 1]} too; list scores from the highest down")
            if any({*step.subtypes} <= {*first.subtypes} and step.above >= first.above for first in above):
                raise ValueError(f"{what} never holds, because a step above it holds whenever it would")
        if self.otherwise in scores and scores[-1] != self.otherwise:
            raise ValueError(f"otherwise ({self.otherwise}) is above {scores[-1]} too; it is the lowest score")
        return self

    @cached_property
    def scores(self) -> tuple[str, ...]:
        """All scores, from the lowest to the highest."""
        return tuple(dict.fromkeys([self.otherwise, *(step.score for step in reversed(self.steps))]))

    def levels(self, amounts: np.ndarray, taxonomy: Taxonomy) -> np.ndarray:
        """Return the place in ``scores`` of each row of ``amounts`` (n, K) by subtype; -1 where none is counted."""
        held = np.zeros(amounts.shape)
        held[:, [taxonomy.id_of(name) - 1 for name in self.counted]] = 1
        total = (amounts * held).sum(1)
        found = np.where(total > 0, 0, -1)
        for step in reversed(self.steps):
            part = amounts[:, [taxonomy.id_of(name) - 1 for name in step.subtypes]].sum(1)
            found[part > step.above * total] = self.scores.index(step.score)
        return found


class Taxonomy(Config):
    """A tissue class and its subtypes.

    Examples
    --------
    >>> her2 = Taxonomy.named("her2")
    >>> her2.names
    ('HER2 0', 'HER2 1+', 'HER2 2+', 'HER2 3+', 'LCIS/DCIS')
    >>> her2.merged("stained").names
    ('non-stained', 'stained', 'LCIS/DCIS')
    >>> her2
    Taxonomy(her2: tumour; HER2 0, HER2 1+, HER2 2+, HER2 3+, LCIS/DCIS)
    """

    name: NameStr
    """Short name, part of every checkpoint and patch set."""
    tissue_class: NameStr = "tumour"
    """What all subtypes together are called."""
    subtypes: Annotated[tuple[Subtype, ...], Field(min_length=1, max_length=254)]
    """The subtypes in the order of their ids."""
    merges: dict[NameStr, dict[NameStr, tuple[NameStr, ...]]] = Field(default_factory=dict)
    """Coarser taxonomies: merge name -> new subtype -> the names it is made of."""
    score_rules: Annotated[dict[NameStr, ScoreRule], Field(exclude_if=lambda rules: not rules)] = Field(
        default_factory=dict
    )
    """Rules by which ``counterstain score`` scores slides, by name; the first is the default."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = []
        if [s.id for s in self.subtypes] != list(range(1, len(self.subtypes) + 1)):
            faults.append(f"subtype ids must be 1, 2, … in this order, found {[s.id for s in self.subtypes]}")
        if len(set(self.names)) != len(self.names):
            faults.append(f"subtype names must differ, found {list(self.names)}")
        for merge, groups in self.merges.items():
            members = [name for group in groups.values() for name in group]
            if sorted(members) != sorted(self.names):
                faults.append(f"merge {merge!r} must hold every subtype once, found {members}")
        for name, rule in self.score_rules.items():
            if unknown := [subtype for subtype in rule.counted if subtype not in self.names]:
                faults.append(f"score rule {name!r} counts {unknown[0]!r}, which is no subtype")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @classmethod
    def named(cls, name: str) -> Taxonomy:
        """Load a built-in taxonomy (``her2``)."""
        file = _built_in(name)
        if not file.is_file():
            raise TaxonomyError(f"taxonomy {name!r}: not built in (her2 is); give the path of a YAML file")
        # Its score rules stay with the program, so that cohorts are the same as before there were any.
        return build(cls, _read_built_in(file, without="score_rules"), f"taxonomy {name}")

    @classmethod
    def load(cls, name_or_path: str | Path) -> Taxonomy:
        """Load a built-in taxonomy by name or any taxonomy from a YAML file."""
        path = Path(name_or_path)
        if path.suffix in {".yaml", ".yml"} or (path.is_file() and not _built_in(str(name_or_path)).is_file()):
            taxonomy = build(cls, read_yaml(path), path)
            check_names(taxonomy.names, path)
            return taxonomy
        return cls.named(str(name_or_path))

    def __repr__(self) -> str:
        return f"Taxonomy({self.name}: {self.tissue_class}; {', '.join(self.names)})"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names in the order of the ids."""
        return tuple(s.name for s in self.subtypes)

    @property
    def num_labels(self) -> int:
        """Labels of a mask: background and every subtype."""
        return len(self.subtypes) + 1

    @property
    def counted_ids(self) -> tuple[int, ...]:
        """Ids of the subtypes whose recalls enter the subtype variance."""
        return tuple(s.id for s in self.subtypes if s.counted)

    def id_of(self, subtype: str | int) -> int:
        """Return the id of a subtype, given its name or its id (255 = ignore).

        Raises TaxonomyError where there is no such subtype.
        """
        if subtype in self.names:
            return self.names.index(str(subtype)) + 1
        if subtype not in (*range(1, self.num_labels), IGNORE):
            raise TaxonomyError(f"unknown subtype {subtype!r}; {self.name} has {', '.join(self.names)}")
        return int(subtype)

    def name_of(self, subtype: int) -> str:
        """Return the name of an id (``background`` for 0, ``ignore`` for 255); raises TaxonomyError for another."""
        names = {label: name for name, label in MEANINGS.items()} | dict(enumerate(self.names, start=1))
        if subtype not in names:
            raise TaxonomyError(f"unknown subtype {subtype!r}; {self.name} has 1 to {len(self.names)}, 0 and {IGNORE}")
        return names[subtype]

    @cached_property
    def palette(self) -> np.ndarray:
        """Colours by label, (256, 3) uint8; background white, ignore grey."""
        return palette_of(s.colour for s in self.subtypes)

    def merged(self, merge: Merge) -> Taxonomy:
        """Return the coarser taxonomy of one of ``merges``, or of new subtype -> names; ids are in its order."""
        groups = self._groups(merge)
        members = {new: [self.subtypes[self.id_of(name) - 1] for name in names] for new, names in groups.items()}
        return Taxonomy(
            name=f"{self.name}:{merge if isinstance(merge, str) else '+'.join(merge)}"[:80],
            tissue_class=self.tissue_class,
            subtypes=tuple(
                Subtype(id=i, name=new, colour=old[-1].colour, counted=any(s.counted for s in old))
                for i, (new, old) in enumerate(members.items(), start=1)
            ),
        )

    def merge_lookup(self, merge: Merge) -> np.ndarray:
        """Return the new label of every old label, (256,) uint8."""
        lookup = np.arange(256, dtype=np.uint8)
        for new, names in enumerate(self._groups(merge).values(), start=1):
            lookup[[self.id_of(name) for name in names]] = new
        return lookup

    def score_rule(self, name: str | Path | None = None) -> ScoreRule:
        """Return a score rule by its name, or that of a YAML file; by default the first one.

        Raises InputError where there is no such rule, TaxonomyError or ConfigError where a file's does not fit.
        """
        if name is not None and Path(name).suffix in {".yaml", ".yml"}:
            rule = build(ScoreRule, read_yaml(Path(name)), name)
            for subtype in rule.counted:
                self.id_of(subtype)
            return rule
        rules = self._rules()
        if not rules:
            raise InputError(f"taxonomy {self.name}: has no score rules; give --rule FILE, see docs/score.md")
        if name is not None and name not in rules:
            raise InputError(f"--rule {name}: unknown; {self.name} has {', '.join(rules)}, or give a YAML file")
        return rules[str(name)] if name is not None else next(iter(rules.values()))

    def _rules(self) -> dict[str, ScoreRule]:
        file = _built_in(self.name)
        if self.score_rules or not file.is_file():
            return self.score_rules
        built_in = build(Taxonomy, _read_built_in(file), self.name)
        return built_in.score_rules if built_in.names == self.names else {}

    def _groups(self, merge: Merge) -> Mapping[str, Sequence[str]]:
        if isinstance(merge, str):
            if merge not in self.merges:
                raise InputError(f"unknown merge {merge!r}; {self.name} has {', '.join(self.merges) or 'none'}")
            return self.merges[merge]
        named = [name for names in merge.values() for name in names]
        if unknown := [name for name in named if name not in self.names]:
            raise InputError(f"merge: unknown subtype {unknown[0]!r}; {self.name} has {', '.join(self.names)}")
        groups = {**merge, **{name: (name,) for name in self.names if name not in named}}
        if sorted(name for names in groups.values() for name in names) != sorted(self.names) or not all(merge.values()):
            raise InputError(f"merge: give each subtype once, and each group at least one; found {dict(merge)}")
        return groups


def check_names(names: Iterable[str], source: str | Path, *, near: bool = False) -> None:
    """Raise ConfigError where names that users gave cannot be those of subtypes, or two are one in two spellings."""
    names = list(names)
    for name in names:
        if name in MEANINGS or CONTROL.search(name):
            raise ConfigError(f"{source}: {name!r} cannot be the name of a subtype; give it another")
        if name.casefold() in NO_NAMES:
            raise ConfigError(
                f"{source}: {name!r} says that there is no subtype; write background or ignore, or its name"
            )
    if found := alike([*MEANINGS, *names], near=near):
        remedy = "use one spelling" + (", or list both in a file and give --taxonomy FILE" if near else "")
        raise ConfigError(f"{source}: {found[0]!r} and {found[1]!r} are probably one name; {remedy}")


def name_key(name: str) -> str:
    """Return what the spellings of a name share that differ by case, spaces, invisible signs, dashes or Unicode form.

    So do whole numbers with the ``.0`` of a spreadsheet. A space between two digits stays: 1 01 is not 101.
    """
    plain = " ".join(unicodedata.normalize("NFKC", name).casefold().replace(MINUS, "-").split())
    kinds = [(sign, unicodedata.category(sign)) for sign in plain]
    visible = "".join("-" if kind == "Pd" else sign for sign, kind in kinds if kind not in {"Cf", "Cc"})
    return re.sub(r"^(\d+)\.0+$", r"\1", re.sub(r"(?<!\d) | (?!\d)", "", visible))


def first_alike(names: Iterable[str], key: Callable[[str], str]) -> tuple[str, str] | None:
    """Return the first two names of one key."""
    known: dict[str, str] = {}
    for name in names:
        first = known.setdefault(key(name), name)
        if first != name:
            return first, name
    return None


def alike(names: Iterable[str], *, near: bool = True) -> tuple[str, str] | None:
    """Return the first two names that are probably one name, spelt in two ways; None where there are none.

    They differ by case, spaces, hyphens between letters or Unicode form; with ``near`` also by a letter or two. Names
    with other digits or signs (``HER2 1+``, ``HER2 2+``), short ones (LCIS, DCIS) and those with a prefix (typical,
    atypical) differ.
    """
    names = list(names)
    found = first_alike(names, lambda name: re.sub(r"(?<=[^\W\d_])[-_](?=[^\W\d_])", "", name_key(name)))
    pairs = itertools.combinations(names, 2) if near else ()
    return found or next((pair for pair in pairs if is_near(*pair)), None)


def is_near(first: str, second: str) -> bool:
    """Whether two names differ by a letter or two of their longer words, as they do where one is misspelt."""
    (words, rest), (others, other_rest) = _words(first), _words(second)
    if rest != other_rest or max(len(words), len(others)) < SHORTEST_NEAR:
        return False
    if words.endswith(others) or others.endswith(words):  # a prefix: typical, atypical
        return words == others
    return difflib.SequenceMatcher(None, words, others).ratio() > NEAR


def _words(name: str) -> tuple[str, list[str]]:
    """Return the longer words of a name as one, and everything else in it that tells names apart."""
    parts = re.findall(r"[^\W\d_]+|[^\s_-]", unicodedata.normalize("NFKC", name).casefold())
    short = [part for part in parts if len(part) <= LONGEST_SHORT]
    return "".join(part for part in parts if len(part) > LONGEST_SHORT), short


def _built_in(name: str) -> Traversable:
    return resources.files("counterstain") / "presets" / f"taxonomy_{name}.yaml"


def _read_built_in(file: Traversable, without: str | None = None) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key != without}


def palette_of(colours: Iterable[str]) -> np.ndarray:
    """Return colours by label, (256, 3) uint8: background white, ``#rrggbb`` for 1, 2, 3, …, ignore grey."""
    palette = np.full((256, 3), 255, np.uint8)
    palette[IGNORE] = 128
    for label, colour in enumerate(colours, start=1):
        palette[label] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return palette


def colours(count: int) -> list[str]:
    """Return distinct colours as ``#rrggbb``; told apart with colour-blindness as far as there are seven at most."""
    if count <= len(_COLOUR_BLIND_SAFE):
        return list(_COLOUR_BLIND_SAFE[:count])
    hues = [colorsys.hls_to_rgb(i / count, (0.35, 0.6)[i % 2], 0.75) for i in range(count)]
    return ["#" + "".join(f"{round(255 * channel):02x}" for channel in hue) for hue in hues]
