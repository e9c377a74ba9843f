"""The arms of a study: what each trains on, and how users write one.

A name is what an arm trains on, then what is done with it, joined by ``+``::

    tumor, subtype              real patches alone
    METHOD+AMOUNT               + AMOUNT per cent of synthetic patches (diffusion+100)
    METHOD+auto                 + the one of the study's amounts that cross-fitting chooses
    METHOD+only                 as many synthetic patches as the dataset has, and no real ones
    …+weighted                  pixels weighted by the inverse frequency of their subtype
    …+stain                     stain jitter
    …+mixup                     blended patches
    …+copypaste                 instances pasted into the background of real patches
    METHOD+…+layouts            synthetic patches into which instances of other slides are moved and drawn there
    METHOD+…+layouts+kept       … while their own instances keep their subtype
    METHOD+…+hard               more synthetic patches of subtypes and slides that cross-fitting finds hard
    METHOD+…+filtered           synthetic patches that a judge takes for what was asked
    METHOD+…+novel              synthetic patches that are not too near to training tissue
    METHOD+AMOUNT+reviewed      without the synthetic patches that a review of the study's set rejected
    METHOD+AMOUNT+pretrain      synthetic patches first, then real ones
    METHOD+AMOUNT+anneal        the share of synthetic patches falls to 0
    METHOD+…+masked             synthetic pixels on which the subtype arm disagrees strongly are ignored
    METHOD+…+relabelled         labels at borders of synthetic instances follow an average of the segmenter

Names are read in a study's file and in results of earlier versions; everything else passes :class:`Arm` on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from counterstain.errors import ConfigError
from counterstain.generators.methods import METHODS
from counterstain.progress import PERCENT

Mode = Literal["tumor", "subtype"]
Variant = Literal[
    "weighted", "stain", "mixup", "copypaste", "layouts", "kept", "hard", "filtered", "novel", "reviewed", "pretrain",
    "anneal", "masked", "relabelled",
]  # fmt: skip
MODES: tuple[Mode, ...] = get_args(Mode)
VARIANTS: tuple[Variant, ...] = get_args(Variant)
"""In the order in which a name lists them."""
WORDS: dict[Variant, str] = {
    "weighted": "weighted loss",
    "stain": "stain jitter",
    "mixup": "mixup",
    "copypaste": "copy-paste",
    "layouts": "new layouts",
    "kept": "own instances kept",
    "hard": "hard masks first",
    "filtered": "filtered",
    "novel": "novel",
    "reviewed": "reviewed",
    "pretrain": "pre-training",
    "anneal": "annealed",
    "masked": "masked",
    "relabelled": "borders relabelled",
}
OF_SETS = ("layouts", "kept", "hard", "filtered", "novel")
"""Those that change the synthetic set."""
OF_SYNTHETIC = (*OF_SETS, "reviewed", "pretrain", "anneal", "masked", "relabelled")
EXCLUDE_EACH_OTHER = (("pretrain", "anneal"), ("mixup", "masked"), ("mixup", "relabelled"))
ONLY, AUTO = "only", "auto"
MOST_PERCENT = 10_000


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of choosing training patches and training on them.

    Examples
    --------
    >>> Arm(method="spade", amount=0.5, variants=("filtered",)).name
    'spade+50+filtered'
    >>> [Arm(mode="tumor"), Arm(method="spade", amount=0.5)]
    [Arm(tumor), Arm(spade+50)]
    """

    name: str = ""  # as it is written in tables and files; made from the rest where it is not given
    mode: Mode = "subtype"  # where real patches are centred, see :class:`counterstain.data.sampling.SamplingConfig`
    method: str | None = None  # what draws its synthetic patches; None = no synthetic patches
    amount: float = 0.0  # synthetic patches as a multiple of the dataset size
    only: bool = False  # without real patches
    auto: bool = False  # whether cross-fitting chooses one of the study's amounts, instead of amount
    variants: tuple[Variant, ...] = ()

    def __post_init__(self) -> None:
        if not self.name:
            how_many = ONLY if self.only else AUTO if self.auto else f"{self.amount * 100:g}"
            base = [self.mode] if self.method is None else [self.method, how_many]
            object.__setattr__(self, "name", "+".join((*base, *self.variants)))

    def __repr__(self) -> str:
        return f"Arm({self.name})"

    @property
    def label(self) -> str:
        """As texts and tables write it (``subtype-sampled``, ``diffusion +100 %, filtered``)."""
        if self.method is None:
            trained_on = f"{self.mode}-sampled"
        elif self.auto:
            trained_on = f"{self.method} +{AUTO}"
        elif self.amount == 0:  # of a version whose names this one cannot read
            return self.name
        else:
            trained_on = f"{self.method} only" if self.only else f"{self.method} +{100 * self.amount:g}{PERCENT}"
        return ", ".join([trained_on, *(WORDS[variant] for variant in self.variants)])

    @property
    def ceiling(self) -> bool:
        """Whether the phantom's own renderer draws its patches, better than any generator could."""
        method = METHODS.get(self.method or "")
        return method is not None and method.ceiling

    @property
    def set_name(self) -> str | None:
        """The synthetic set that it trains on: a method, and what changes the set."""
        if self.method is None:
            return None
        return "+".join((self.method, *(variant for variant in self.variants if variant in OF_SETS)))


def read_arm(name: str) -> Arm:
    """Return the arm that a ``study.json`` of an earlier version names."""
    try:
        return parse_arm(name)
    except ConfigError:  # a method or a variant that this version does not know
        return Arm(name=name, method=None if name in MODES else name.partition("+")[0])


def parse_arm(name: str) -> Arm:
    """Read the name of an arm as a user wrote it.

    Raises ConfigError with one line that says what is wrong with it, and lists the names that there are.
    """
    base, *words = name.split("+")
    if base in MODES:
        chosen: dict[str, Any] = {"mode": base}
    elif base in METHODS and words:
        chosen = {"method": base} | _amount(name, words.pop(0))
    else:
        raise _wrong(
            name,
            f"{base!r} is not known{_near(base, (*MODES, *METHODS))}"
            if base not in METHODS
            else "an amount is missing",
        )
    for word in words:
        if word not in VARIANTS:
            raise _wrong(name, f"{word!r} is not known{_near(word, VARIANTS, '+')}")
    arm = Arm(**chosen, variants=tuple(variant for variant in VARIANTS if variant in words))
    _check_variants(arm, name)
    if arm.name != name:
        raise ConfigError(f"arm {name}: write it as {arm.name}")
    return arm


def _check_variants(arm: Arm, name: str) -> None:
    for variant in arm.variants:
        if variant in OF_SYNTHETIC and arm.method is None:
            raise _wrong(name, f"+{variant} is for synthetic patches")
        if variant in {"pretrain", "anneal", "copypaste"} and arm.only:
            raise _wrong(name, f"+{variant} needs real patches")
    if "reviewed" in arm.variants and arm.auto:
        raise _wrong(name, "+reviewed needs an amount: cross-fitting draws sets that nobody has reviewed")
    if "kept" in arm.variants and "layouts" not in arm.variants:
        raise _wrong(name, "+kept needs +layouts, or nothing would be drawn")
    for one, other in EXCLUDE_EACH_OTHER:
        if {one, other} <= set(arm.variants):
            raise _wrong(name, f"+{one} and +{other} exclude each other")


def _amount(name: str, word: str) -> dict[str, Any]:
    if word == ONLY:
        return {"amount": 1.0, "only": True}
    if word == AUTO:
        return {"auto": True}
    try:
        percent = float(word)
    except ValueError:
        raise _wrong(name, f"{word!r} is no amount, nor {AUTO!r} or {ONLY!r}") from None
    if not 0 < percent <= MOST_PERCENT:
        raise _wrong(name, f"the amount must be above 0 and at most {MOST_PERCENT} per cent")
    return {"amount": percent / 100}


def _near(word: str, known: Iterable[str], sign: str = "") -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {sign}{near[0]}?" if near else ""


def _wrong(name: str, why: str) -> ConfigError:
    any_arm = ", ".join(f"+{variant}" for variant in VARIANTS if variant not in OF_SYNTHETIC)
    of_synthetic = ", ".join(f"+{variant}" for variant in OF_SYNTHETIC)
    return ConfigError(
        f"arm {name}: {why}; possible are {' or '.join(MODES)}, METHOD+AMOUNT (diffusion+100), METHOD+{AUTO} or "
        f"METHOD+{ONLY}, where METHOD is {', '.join(METHODS)}; any of them with {any_arm}; METHOD+… with "
        f"{of_synthetic}, of which +pretrain and +anneal need an AMOUNT"
    )
