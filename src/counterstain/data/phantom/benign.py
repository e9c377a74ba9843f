"""What a breast holds besides tumour and stroma: glands and ducts of small regular cells, fat, gaps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from counterstain.data.phantom.ground import Ground, Stains
from counterstain.data.phantom.noise import lookup, scatter, smoothstep
from counterstain.data.phantom.nuclei import make_nuclei, stamp

SPACING_UM = 78.0  # of the places where a gland or a group of fat cells may lie
REACH_UM = 36.0
BENIGN_RADIUS_UM = 2.9
BENIGN_SPACING_UM = 6.6


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round structure: a gland, a duct or a fat cell."""

    centre: np.ndarray  # (2,) row and column in pixels
    radius_um: float
    wall_um: float
    """Thickness of the epithelium; all of the radius = no lumen."""
    number: int


def draw_benign(ground: Ground, stains: Stains) -> np.ndarray:
    """Draw glands and fat into the background.

    Returns
    -------
    (H, W) boolean array
        Where nothing was drawn.
    """
    taken = np.zeros(ground.shape, np.float32)
    outside = smoothstep(ground.outside_um, 1.0, 4.0).astype(np.float32)
    glands: list[np.ndarray] = []
    for kind, structure in _structures(ground):
        window, distance = _signed_distance(ground, structure)
        if not distance.size:
            continue
        coverage = smoothstep(-distance, -0.6 * ground.mpp, 0.6 * ground.mpp) * outside[window]
        view = Stains(stains.haematoxylin[window], stains.dab[window])
        lumen = smoothstep(-distance - structure.wall_um, -0.7, 0.7)
        if kind == "fat":
            rim = np.exp(-((distance / 1.0) ** 2)) * 0.16
            view.cover(coverage, haematoxylin=rim, dab=0.0)
        else:
            view.cover(coverage, haematoxylin=0.13 * (1 - lumen) + 0.005, dab=stains.dab[window] * (1 - lumen))
            glands.append(_gland_nuclei(ground, structure))
        taken[window] = np.maximum(taken[window], coverage)
    if glands:
        _draw_epithelium(ground, stains, np.concatenate(glands), outside)
    return taken < 0.3


def _draw_epithelium(ground: Ground, stains: Stains, points: np.ndarray, outside: np.ndarray) -> None:
    nuclei = make_nuclei(
        ground.rng("benign nuclei"), points, radius_um=BENIGN_RADIUS_UM, spread=0.1, amount=0.5, stretch=(1.0, 1.6)
    )
    coverage, amount = stamp(nuclei, ground.shape, ground.mpp)
    texture = 1 + 0.1 * ground.noise("benign chromatin", 1.2)
    stains.cover(coverage * outside, haematoxylin=amount * texture, dab=stains.dab)


def _structures(ground: Ground) -> Iterator[tuple[str, Round]]:
    """Yield every round structure that finds room between the nests."""
    style = ground.style
    for place, centre in enumerate(ground.scatter("places", SPACING_UM, jitter=0.3, margin_um=REACH_UM)):
        rng = ground.rng("place", place)
        room_um = min(float(lookup(ground.outside_um, centre[None])[0]) + 4.0, REACH_UM)
        kind = rng.random()
        fat = min(0.10 * style.fat, 0.5)
        gland = min(0.22 * style.benign, 0.5)
        if kind < fat:
            yield from (("fat", cell) for cell in _fat_lobule(ground, rng, centre, room_um))
        elif kind < fat + gland and room_um > 12:
            yield from (("gland", acinus) for acinus in _glands(ground, rng, centre, room_um))


def _fat_lobule(ground: Ground, rng: np.random.Generator, centre: np.ndarray, room_um: float) -> Iterator[Round]:
    size_um = rng.uniform(14, 26)
    for number, offset in enumerate(_group(rng, room_um, 2.05 * size_um)):
        yield Round(
            centre=centre + offset / ground.mpp, radius_um=size_um * rng.uniform(0.8, 1.02), wall_um=0.0, number=number
        )


def _glands(ground: Ground, rng: np.random.Generator, centre: np.ndarray, room_um: float) -> Iterator[Round]:
    kind = rng.random()
    if kind < 0.35:  # one duct
        yield Round(centre=centre, radius_um=room_um * rng.uniform(0.6, 1), wall_um=rng.uniform(8, 12), number=0)
    elif kind < 0.55:  # a duct that is filled with regular cells
        radius = room_um * rng.uniform(0.5, 0.9)
        yield Round(centre=centre, radius_um=radius, wall_um=radius, number=0)
    else:  # a lobule
        size_um = rng.uniform(9, 13)
        for number, offset in enumerate(_group(rng, room_um, 2.3 * size_um)):
            yield Round(
                centre=centre + offset / ground.mpp,
                radius_um=size_um * rng.uniform(0.8, 1.1),
                wall_um=rng.uniform(6.5, size_um),
                number=number,
            )


def _group(rng: np.random.Generator, room_um: float, spacing_um: float) -> np.ndarray:
    """Return offsets from the middle of a group in micrometres, (n, 2)."""
    edge = int(2 * room_um)
    offsets = scatter(rng, (edge, edge), spacing_um, jitter=0.1) - room_um
    near = offsets[np.hypot(*offsets.T) < room_um - 0.3 * spacing_um]
    return near if len(near) else np.zeros((1, 2))


def _signed_distance(ground: Ground, structure: Round) -> tuple[tuple[slice, slice], np.ndarray]:
    """Return a window and the distance to the wavy outline of a structure in micrometres, negative inside."""
    reach = structure.radius_um * 1.35 / ground.mpp + 2
    low = np.maximum(np.floor(structure.centre - reach), 0).astype(int)
    high = np.maximum(np.minimum(np.ceil(structure.centre + reach), ground.shape).astype(int), low)
    window = (slice(low[0], high[0]), slice(low[1], high[1]))
    y, x = np.ogrid[window]
    dy, dx = ((y - structure.centre[0]) * ground.mpp, (x - structure.centre[1]) * ground.mpp)
    distance = np.sqrt(dy**2 + dx**2)
    phase = 2.4 * structure.number + structure.radius_um
    angle = np.arctan2(dy, dx)
    waves = 0.10 * np.cos(2 * angle + phase) + 0.06 * np.cos(3 * angle + 2 * phase)
    return window, (distance - structure.radius_um * (1 + waves)).astype(np.float32)


def _gland_nuclei(ground: Ground, gland: Round) -> np.ndarray:
    """Return the positions of nuclei in one or more rings along the wall, (n, 2) in pixels."""
    rings: list[np.ndarray] = []
    depth = BENIGN_RADIUS_UM + 0.6
    phase = 2.4 * gland.number + gland.radius_um
    while depth < gland.wall_um - 1.5 or not rings:
        radius = gland.radius_um - depth
        if radius < 1.5:
            rings.append(gland.centre[None])
            break
        count = max(int(2 * np.pi * radius / BENIGN_SPACING_UM), 1)
        angle = np.arange(count) * (2 * np.pi / count) + 0.7 * depth + phase
        waves = gland.radius_um * (0.10 * np.cos(2 * angle + phase) + 0.06 * np.cos(3 * angle + 2 * phase))
        shaken = radius + waves + 0.8 * np.sin(angle * 7 + phase)
        rings.append(gland.centre + np.stack([np.sin(angle), np.cos(angle)], axis=1) * shaken[:, None] / ground.mpp)
        depth += BENIGN_SPACING_UM * 0.95
    return np.concatenate(rings)
