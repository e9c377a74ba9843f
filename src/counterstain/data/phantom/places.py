"""Where glands, vessels and fat cells find room between the nests, and how large they are.

Shapes: n = structures of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from counterstain.data.phantom.ground import Ground
from counterstain.data.phantom.noise import lookup, scatter

SPACING_UM = 78.0  # of the places where a structure or a group of them may lie
REACH_UM = 36.0  # the largest group
GLAND_RATE, FAT_RATE, VESSEL_RATE = 0.24, 0.10, 0.16  # share of the places, on the median slide


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round structure with a wall."""

    kind: str
    """``gland``, ``vessel`` or ``fat``."""
    centre: np.ndarray  # (2,) row and column in pixels
    radius_um: float
    wall_um: float
    """Thickness of the wall; all of the radius = no lumen."""
    phase: float
    """Turns the waves of the outline."""

    def outline_um(self, angle: np.ndarray) -> np.ndarray:
        """Return the radius in each direction."""
        waves = 0.10 * np.cos(2 * angle + self.phase) + 0.06 * np.cos(3 * angle + 2 * self.phase)
        return np.asarray(self.radius_um * (1 + waves))


def find_places(ground: Ground) -> Iterator[Round]:
    """Yield every structure, those included that reach in from beyond the edges."""
    style = ground.style
    rates = np.array([GLAND_RATE * style.benign, FAT_RATE * style.fat, VESSEL_RATE])
    limits = np.cumsum(rates / max(rates.sum(), 1.0))
    rng = ground.rng("places")
    centres = ground.scatter(rng, SPACING_UM, jitter=0.3, margin_um=REACH_UM)
    kinds = rng.random(len(centres))
    rooms_um = np.minimum(lookup(ground.outside_um, centres) + 4.0, REACH_UM)
    for place in np.flatnonzero(kinds < limits[2]).tolist():
        rng, room_um = ground.rng("place", place), float(rooms_um[place])
        if kinds[place] < limits[0]:
            members = _glands(rng, room_um) if room_um > 12 else iter(())
        elif kinds[place] < limits[1]:
            members = _fat_cells(rng, room_um)
        else:
            members = _vessels(rng, room_um)
        for kind, offset_um, radius_um, wall_um in members:
            centre, phase = centres[place] + offset_um / ground.mpp, rng.uniform(0, 2 * np.pi)
            if lookup(ground.outside_um, centre[None])[0] > 0.8 * radius_um:
                yield Round(kind=kind, centre=centre, radius_um=radius_um, wall_um=wall_um, phase=phase)


Member = tuple[str, np.ndarray, float, float]  # kind, offset in micrometres, radius, wall


def _glands(rng: np.random.Generator, room_um: float) -> Iterator[Member]:
    kind, middle = rng.random(), np.zeros(2)
    if kind < 0.35:  # one duct
        yield "gland", middle, room_um * rng.uniform(0.6, 1), rng.uniform(8, 12)
    elif kind < 0.55:  # a duct that is filled with regular cells
        radius_um = room_um * rng.uniform(0.5, 0.9)
        yield "gland", middle, radius_um, radius_um
    else:  # a lobule
        size_um = rng.uniform(9, 13)
        for offset in _group(rng, room_um, 2.3 * size_um):
            yield "gland", offset, size_um * rng.uniform(0.8, 1.1), rng.uniform(6.5, size_um)


def _fat_cells(rng: np.random.Generator, room_um: float) -> Iterator[Member]:
    size_um = rng.uniform(14, 26)
    for offset in _group(rng, room_um, 2.05 * size_um):
        yield "fat", offset, size_um * rng.uniform(0.8, 1.02), 0.0


def _vessels(rng: np.random.Generator, room_um: float) -> Iterator[Member]:
    for offset in _group(rng, room_um, 30.0)[: int(rng.integers(1, 4))]:
        yield "vessel", offset, min(rng.uniform(4.5, 13), room_um), rng.uniform(1.5, 3.5)


def _group(rng: np.random.Generator, room_um: float, spacing_um: float) -> np.ndarray:
    """Return offsets from the middle of a group in micrometres, (n, 2)."""
    edge = int(2 * room_um)
    offsets = scatter(rng, (edge, edge), spacing_um, jitter=0.1) - room_um
    near = offsets[np.hypot(*offsets.T) < room_um - 0.3 * spacing_um]
    return near if len(near) else np.zeros((1, 2))
