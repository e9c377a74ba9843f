"""A stream of training patches that mixes real and synthetic ones in a given ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Literal

from pydantic import Field

from counterstain.config import Config
from counterstain.data.patches import Patch
from counterstain.data.sampling import PatchSource, SamplingConfig, vary
from counterstain.errors import InputError
from counterstain.seeding import numpy_generator


class MixingConfig(Config):
    """What an amount of synthetic patches means."""

    epoch_patches: Annotated[int, Field(ge=1)] = 4000
    """The dataset size N: an amount of 1 (+100 %) is N synthetic patches."""
    steps: Literal["equal", "per_epoch"] = "equal"
    """``equal``: the same number of optimiser steps for any amount, so that no arm wins by more updates;
    ``per_epoch``: 1 + amount times as many."""
    schedule: Literal["constant", "anneal", "pretrain"] = "constant"
    """How the share of synthetic patches goes over the training: ``constant``; ``anneal`` lets it fall linearly to 0,
    from twice the constant share; above a constant share of a half it stays at 1 until the fall sees as many in all.
    ``pretrain`` trains on synthetic patches alone at first, then on real ones alone."""
    pretrain_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the steps that ``pretrain`` spends on synthetic patches."""


class MixedPatches:
    """A random-access stream in which each position is synthetic with a given probability.

    Position i holds real patch number i unless it is synthetic, so streams of different amounts share their real
    patches, and a stream without synthetic ones is the real stream itself. A synthetic position holds a patch of
    the set, one of these ``numbers``, drawn uniformly and then mirrored, turned and stained like real ones. ``share``
    maps a position to the probability of a synthetic patch.
    """

    def __init__(
        self,
        real: PatchSource,
        synthetic: Sequence[Patch],
        sampling: SamplingConfig,
        *,
        numbers: Sequence[int],
        share: Callable[[int], float],
        seed: int,
    ) -> None:
        self._real, self._synthetic, self._sampling = real, synthetic, sampling
        self._numbers, self._share, self._seed = numbers, share, seed

    def is_synthetic(self, index: int) -> bool:
        """Whether a position of the stream holds a synthetic patch."""
        return bool(numpy_generator(self._seed, "synthetic", index).random() < self._share(index))

    def __getitem__(self, index: int) -> Patch:
        if not self.is_synthetic(index):
            return self._real[index]
        rng = numpy_generator(self._seed, "synthetic patch", index)
        return vary(self._synthetic[self._numbers[int(rng.integers(len(self._numbers)))]], self._sampling, rng)


def synthetic_count(amount: float, config: MixingConfig) -> int:
    """Return how many synthetic patches an amount means: ``amount`` x ``epoch_patches``.

    Raises InputError where the amount is negative, not a number, or so small that it is no patch at all.
    """
    if not 0 <= amount < float("inf"):
        raise InputError(f"amount {amount}: expected 0 or more, where 1.0 is +100 % of {config.epoch_patches} patches")
    count = round(amount * config.epoch_patches)
    if amount and not count:
        raise InputError(f"amount {amount}: is less than one of {config.epoch_patches} patches; give 0 or a larger one")
    return count


def synthetic_share(amount: float, share: float | None = None) -> float:
    """Return the probability of a synthetic patch: ``share`` where given, otherwise amount / (1 + amount).

    Raises InputError where the share is not within 0 to 1.
    """
    if share is None:
        return amount / (1 + amount)
    if not 0 <= share <= 1:
        raise InputError(f"share {share}: expected 0 (real patches alone) to 1 (synthetic patches alone)")
    return share


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareSchedule:
    """The function position -> probability of a synthetic patch, as ``config.schedule`` asks for it."""

    share: float  # what a constant schedule has, see :func:`synthetic_share`
    steps: int
    batch_size: int
    config: MixingConfig

    def __call__(self, index: int) -> float:
        """Return the probability at a position of the stream."""
        return self.of_step(index // self.batch_size)

    def of_step(self, step: int) -> float:
        """Return the probability in a step (0, 1, …) of the training."""
        if self.config.schedule == "constant" or not self.share:
            return self.share
        if self.config.schedule == "anneal":
            left = 1 - step / self.steps
            return 2 * self.share * left if 2 * self.share <= 1 else min(1.0, left / max(2 - 2 * self.share, 1e-9))
        return float(step < self.config.pretrain_share * self.steps)

    def mean(self) -> float:
        """Return the mean probability over the training."""
        if self.config.schedule == "constant":
            return self.share
        return fmean(self.of_step(step) for step in range(self.steps))


def training_steps(steps: int, amount: float, config: MixingConfig) -> int:
    """Return the optimiser steps of an arm whose baseline takes ``steps``."""
    return steps if config.steps == "equal" else round(steps * (1 + amount))
