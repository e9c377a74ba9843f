"""The arms of a study: what the name of one says, and which names there are.

A name is what an arm trains on, then what is done with it, joined by ``+``::

    tumor, subtype              real patches alone
    METHOD+AMOUNT               + AMOUNT per cent of synthetic patches (diffusion+100)
    METHOD+only                 as many synthetic patches as the dataset has, and no real ones
    …+weighted                  pixels weighted by the inverse frequency of their subtype
    …+stain                     stain jitter
    …+mixup                     blended patches
    …+copypaste                 instances pasted into the background of real patches
    METHOD+…+filtered           synthetic patches that a judge takes for what was asked
    METHOD+AMOUNT+pretrain      synthetic patches first, then real ones
    METHOD+AMOUNT+anneal        the share of synthetic patches falls to 0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from counterstain.errors import ConfigError
from counterstain.generators.methods import METHODS

Mode = Literal["tumor", "subtype"]
Variant = Literal["weighted", "stain", "mixup", "copypaste", "filtered", "pretrain", "anneal"]
MODES: dict[str, Mode] = {mode: mode for mode in get_args(Mode)}
VARIANTS: dict[str, Variant] = {variant: variant for variant in get_args(Variant)}
"""In the order in which a name lists them."""
OF_SYNTHETIC = ("filtered", "pretrain", "anneal")
ONLY = "only"
MOST_AMOUNT = 100.0


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of choosing training patches and training on them."""

    name: str
    mode: Mode = "subtype"
    """Where real patches are centred, see :class:`counterstain.data.sampling.SamplingConfig`."""
    method: str | None = None
    """Whose synthetic patches it trains on; None = real patches alone."""
    amount: float = 0.0
    """Synthetic patches as a multiple of the dataset size."""
    only: bool = False
    """Without real patches."""
    variants: tuple[Variant, ...] = ()

    @property
    def set_name(self) -> str | None:
        """The synthetic set that it trains on: a method, filtered or not."""
        if self.method is None:
            return None
        return f"{self.method}+filtered" if "filtered" in self.variants else self.method

    @property
    def ceiling(self) -> bool:
        """Whether its images come from a phantom's own renderer, which no real tissue has."""
        return self.method is not None and self.method in METHODS and METHODS[self.method].ceiling

    def record(self) -> dict[str, Any]:
        """Return it as plain values, for ``study.json``."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any] | str) -> Arm:
        """Read what :meth:`record` wrote, or the name of an arm that an earlier version wrote instead."""
        if not isinstance(record, str):
            return cls(**{**record, "variants": tuple(record["variants"])})
        try:
            return parse_arm(record)
        except ConfigError:  # of a version that had other arms
            return cls(name=record)


def method_arm(method: str, amount: float) -> Arm:
    """Return the arm of a method and an amount, 1.0 being +100 %."""
    return Arm(name=f"{method}+{amount * 100:g}", method=method, amount=amount)


def parse_arm(name: str) -> Arm:
    """Read the name of an arm.

    Raises
    ------
    ConfigError
        One line that says what is wrong with it, and lists the names that there are.
    """
    base, *words = name.split("+")
    if base in MODES:
        arm = Arm(name=base, mode=MODES[base])
    elif base in METHODS and words:
        arm = _of_method(name, base, words.pop(0))
    else:
        raise _wrong(name, f"{base!r} is not known" if base not in METHODS else "an amount is missing")
    unknown = [word for word in words if word not in VARIANTS]
    if unknown:
        raise _wrong(name, f"{unknown[0]!r} is not known")
    variants = tuple(variant for variant in VARIANTS.values() if variant in words)
    _check(name, arm, variants)
    canonical = "+".join((arm.name, *variants))
    if canonical != name:
        raise ConfigError(f"arm {name}: write it as {canonical}")
    return Arm(name=name, mode=arm.mode, method=arm.method, amount=arm.amount, only=arm.only, variants=variants)


def _of_method(name: str, method: str, amount: str) -> Arm:
    if amount == ONLY:
        return Arm(name=f"{method}+{ONLY}", method=method, amount=1.0, only=True)
    try:
        percent = float(amount)
    except ValueError:
        raise _wrong(name, f"{amount!r} is neither an amount nor {ONLY!r}") from None
    if not 0 < percent <= 100 * MOST_AMOUNT:
        raise _wrong(name, f"the amount must be above 0 and at most {100 * MOST_AMOUNT:g} per cent")
    return method_arm(method, percent / 100)


def _check(name: str, arm: Arm, variants: tuple[Variant, ...]) -> None:
    wrong = [variant for variant in variants if variant in OF_SYNTHETIC and arm.method is None]
    if wrong:
        raise _wrong(name, f"+{wrong[0]} is for synthetic patches")
    if "pretrain" in variants and "anneal" in variants:
        raise _wrong(name, "+pretrain and +anneal exclude each other")
    needs_real = [variant for variant in variants if variant in {"pretrain", "anneal", "copypaste"}]
    if arm.only and needs_real:
        raise _wrong(name, f"+{needs_real[0]} needs real patches")


def _wrong(name: str, why: str) -> ConfigError:
    forms = (
        f"{' or '.join(MODES)}, METHOD+AMOUNT (diffusion+100) or METHOD+{ONLY}, where METHOD is {', '.join(METHODS)}; "
        f"any of them with {', '.join(f'+{v}' for v in VARIANTS if v not in OF_SYNTHETIC)}; "
        "METHOD+… with +filtered; METHOD+AMOUNT with +pretrain or +anneal"
    )
    return ConfigError(f"arm {name}: {why}; possible are {forms}")
