"""A learning curve: how a measure grows with the number of training patients, and what more of them could win.

Shapes: S = numbers of training patients, R = repeats, P = patients that were tested on, K = subtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from counterstain.seeding import numpy_generator

EXPONENTS = np.linspace(0.1, 2.0, 39)  # of the power law; slower and faster ones cannot be told from its ends
MIN_SIZES, MIN_REPEATS, MIN_PATIENTS = 4, 3, 4
STEEP = 0.01  # gain per doubling from which a curve is called steep: one point of Dice or recall
WIDEST = 0.05  # an interval of the gain that is wider says nothing
DRAWS = 500
LEVELS = (2.5, 97.5)

Measure = Callable[[np.ndarray], np.ndarray]  # count tables (…, K + 1, 2) -> values (…)


@dataclass(frozen=True, kw_only=True)
class Step:
    """From one number of training patients to the next."""

    fewer: int
    more: int
    per_doubling: float
    """Gain of the measure, brought to a doubling."""
    low: float
    high: float
    """95 % interval of it, over repeats and tested patients."""

    @property
    def steep(self) -> bool:
        """Whether the gain is a point or more and surely above 0."""
        return self.per_doubling >= STEEP and self.low > 0


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """What a power law, fitted to the curve, promises of twice the patients."""

    patients: int
    gain: float
    low: float
    high: float


def bootstrapped(counts: np.ndarray, measure: Measure, seed: int, draws: int = DRAWS) -> np.ndarray:
    """Draw repeats and tested patients with replacement and return the curve of each draw, (draws, S).

    Parameters
    ----------
    counts : (S, R, P, K + 1, 2) int array
        The same repeats and patients at all sizes, so that differences along a curve are paired.
    """
    rng = numpy_generator(seed, "learning curve")
    _, repeats, patients = counts.shape[:3]
    curves = []
    for _ in range(draws):
        drawn = counts[:, rng.integers(repeats, size=repeats)][:, :, rng.integers(patients, size=patients)]
        curves.append(measure(drawn.sum(axis=2)).mean(axis=1))
    return np.array(curves)


def steps(sizes: Sequence[int], curve: np.ndarray, draws: np.ndarray) -> list[Step]:
    """Return the gain from each size to the next, brought to a doubling.

    Parameters
    ----------
    sizes : sequence of int, rising
    curve : (S,) array
        Mean over repeats.
    draws : (n, S) array
        See :func:`bootstrapped`.
    """
    doublings = np.diff(np.log2(sizes))
    gains, drawn = np.diff(curve) / doublings, np.diff(draws, axis=1) / doublings
    low, high = np.nanpercentile(drawn, LEVELS, axis=0)
    return [
        Step(fewer=a, more=b, per_doubling=float(g), low=float(lo), high=float(hi))
        for a, b, g, lo, hi in zip(sizes[:-1], sizes[1:], gains, low, high, strict=True)
    ]


def fit_power_law(sizes: Sequence[int] | np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """Fit value = a - b n**-c by least squares, b at least 0 and a at most 1; return a, b, c.

    The usual form of learning curves (Figueroa et al. 2012; Hestness et al. 2017).
    """
    x = np.asarray(sizes, float) ** -EXPONENTS[:, None]  # (exponents, S)
    centred = x - x.mean(1, keepdims=True)
    b = np.maximum(-(centred @ values) / (centred**2).sum(1), 0)
    a = values.mean() + b * x.mean(1)
    beyond = a > 1
    b = np.where(beyond, (x @ (1 - values)) / (x**2).sum(1), b)
    a = np.where(beyond, 1.0, a)
    best = int(np.argmin(((a[:, None] - b[:, None] * x - values) ** 2).sum(1)))
    return float(a[best]), float(b[best]), float(EXPONENTS[best])


def extrapolate(
    sizes: Sequence[int], curve: np.ndarray, draws: np.ndarray, *, repeats: int, patients: int
) -> Extrapolation | str:
    """Say what twice the patients would win, with a 95 % interval, or why that cannot be told.

    The interval covers repeats and tested patients, and that the law may have been seen from too few points: each draw
    is fitted without one size, drawn at random. It does not cover patients unlike those at hand, and with three or four
    repeats it is a little narrow.
    """
    why = _too_little(sizes, curve, draws, repeats, patients)
    if why is not None:
        return why
    rng = numpy_generator(0, "sizes left out")
    whole = [draw for draw in draws if not np.isnan(draw).any()]
    gains = []
    for draw in whole:
        kept = np.delete(np.arange(len(sizes)), rng.integers(len(sizes)))
        gains.append(_gain(fit_power_law(np.take(sizes, kept), draw[kept]), sizes[-1]))
    low, high = np.percentile(gains, LEVELS)
    if high - low > WIDEST:
        return f"the interval, {low:+.3f} to {high:+.3f}, is too wide; give more repeats"
    gain = _gain(fit_power_law(sizes, curve), sizes[-1])
    return Extrapolation(patients=2 * sizes[-1], gain=gain, low=float(min(low, gain)), high=float(max(high, gain)))


def _too_little(sizes: Sequence[int], curve: np.ndarray, draws: np.ndarray, repeats: int, patients: int) -> str | None:
    """Return why a curve cannot be extrapolated, if so."""
    for needed, found, what in (
        (MIN_SIZES, len(sizes), "a law needs {} numbers of patients"),
        (MIN_REPEATS, repeats, "an interval needs {} repeats"),
        (MIN_PATIENTS, patients, "an interval needs {} tested patients"),
    ):
        if found < needed:
            return f"{what.format(needed)} or more, here are {found}"
    if np.isnan(curve).any():
        return "some points of the curve are missing"
    low, high = np.nanpercentile(draws[:, -1] - draws[:, -2], LEVELS)
    if high - low > 2 * WIDEST:
        return f"the last step of the curve, {low:+.3f} to {high:+.3f}, is too uncertain; give more repeats"
    return None


def in_words(name: str, found: Sequence[Step], promised: Extrapolation | str) -> list[str]:
    """Say in sentences where a curve is steep, and what more patients could win."""
    steep = [step for step in found if step.steep]
    said = [f"{name}: {_where(found, steep)}."]
    if isinstance(promised, str):
        return [*said, f"What more patients would win cannot be told: {promised}."]
    sure = "" if promised.low > 0 else ", so perhaps nothing"
    interval = f"95 % interval {promised.low:+.3f} to {promised.high:+.3f}{sure}"
    law = f"by the power law through the curve ({interval})"
    return [*said, f"{promised.patients} training patients would win {promised.gain:+.3f} {law}."]


def _where(found: Sequence[Step], steep: Sequence[Step]) -> str:
    last = found[-1]
    end = f"{last.per_doubling:+.3f} per doubling from {last.fewer} to {last.more} patients"
    if not steep:
        flat = "better data can win little that shows"
        open_ = "whether it is flat cannot be told from so few trainings and tested patients"
        return f"no step of the curve is surely a point or more, {end}; {flat if last.high <= STEEP else open_}"
    top = max(steep, key=lambda step: step.per_doubling)
    start = f"steepest from {top.fewer} to {top.more} patients, {top.per_doubling:+.3f} per doubling"
    if last.steep:
        return f"{start}; still steep at the end, {end}: there is room for better data"
    return f"{start}; flat at the end, {end}; look for the effect of better data at {steep[-1].more} patients or fewer"


def _gain(law: tuple[float, float, float], patients: int) -> float:
    _, b, c = law
    return float(b * patients**-c * (1 - 2**-c))
