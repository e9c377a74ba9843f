"""What a breast holds besides tumour and stroma: glands and ducts of small regular cells, vessels, fat.

Shapes: H, W = rows and columns of the region, n = nuclei.
"""

from __future__ import annotations

import numpy as np

from counterstain.data.phantom.ground import Ground, Stains
from counterstain.data.phantom.noise import lookup, smoothstep
from counterstain.data.phantom.nuclei import Nuclei, make_nuclei, stamp
from counterstain.data.phantom.places import Round, find_places

GLAND_NUCLEUS_UM, GLAND_SPACING_UM = 2.9, 6.6
BLOOD_CELL_UM, BLOOD_SPACING_UM = 2.6, 5.0

Window = tuple[slice, slice]


def draw_benign(ground: Ground, stains: Stains) -> np.ndarray:
    """Draw glands, vessels and fat into the background.

    Returns
    -------
    (H, W) boolean array
        Where nothing was drawn.
    """
    taken = np.zeros(ground.shape, np.float32)
    outside = smoothstep(ground.outside_um, 1.0, 4.0).astype(np.float32)
    structures = list(find_places(ground))
    blood = _blood(ground, structures)
    for structure in structures:
        window, distance_um = _signed_distance(ground, structure)
        if distance_um.size:
            coverage = smoothstep(-distance_um, -0.6 * ground.mpp, 0.6 * ground.mpp) * outside[window]
            _fill(
                structure, distance_um, coverage, Stains(stains.haematoxylin[window], stains.dab[window]), blood[window]
            )
            taken[window] = np.maximum(taken[window], coverage)
    for nuclei in _nuclei(ground, structures):
        coverage, amount = stamp(nuclei, ground.shape, ground.mpp)
        stains.cover(coverage * outside, haematoxylin=amount * (1 + 0.1 * ground.noise("grain")), dab=stains.dab)
    return taken < 0.3


def _fill(structure: Round, distance_um: np.ndarray, coverage: np.ndarray, stains: Stains, blood: np.ndarray) -> None:
    """Draw the wall and the lumen of a structure into its window."""
    lumen = smoothstep(-distance_um - structure.wall_um, -0.7, 0.7)
    if structure.kind == "fat":
        stains.cover(coverage, haematoxylin=0.16 * np.exp(-np.square(distance_um)), dab=0.0)
    elif structure.kind == "vessel":
        wall, cells = 1 - lumen, lumen * blood
        stains.cover(coverage, haematoxylin=0.13 * wall + 0.07 * cells, dab=stains.dab * wall + 0.16 * cells)
    else:
        stains.cover(coverage, haematoxylin=0.13 * (1 - lumen) + 0.005, dab=stains.dab * (1 - lumen))


def _nuclei(ground: Ground, structures: list[Round]) -> list[Nuclei]:
    """Return the nuclei of epithelium and of the inner skin of vessels."""
    rng = ground.rng("benign nuclei")
    rings = [ring for gland in structures if gland.kind == "gland" for ring in _epithelium(gland, ground.mpp)]
    skins = [_ring(v, 1.0, 11.0, ground.mpp) for v in structures if v.kind == "vessel"]
    kinds = []
    if rings:
        points = np.concatenate([points for points, _ in rings])
        kinds.append(make_nuclei(rng, points, radius_um=GLAND_NUCLEUS_UM, spread=0.1, amount=0.5, stretch=(1.0, 1.6)))
    if skins:
        points, angle = (np.concatenate(parts) for parts in zip(*skins, strict=True))
        kinds.append(make_nuclei(rng, points, radius_um=1.9, spread=0.15, amount=0.5, stretch=(2.0, 4.0), angle=angle))
    return kinds


def _epithelium(gland: Round, mpp: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return rings of nuclei from the outline inwards."""
    first = GLAND_NUCLEUS_UM + 0.6
    depths = np.arange(first, max(gland.wall_um - 1.5, first + 0.1), 0.95 * GLAND_SPACING_UM)
    return [_ring(gland, depth, GLAND_SPACING_UM, mpp) for depth in depths.tolist()]


def _ring(structure: Round, depth_um: float, spacing_um: float, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Return points inside the outline, (n, 2) in pixels, and the angle of the wall at each, (n,)."""
    radius_um = max(structure.radius_um - depth_um, 0.0)
    count = max(int(2 * np.pi * radius_um / spacing_um), 1)
    angle = np.arange(count) * (2 * np.pi / count) + 0.7 * depth_um + structure.phase
    reach = np.maximum(structure.outline_um(angle) - depth_um + 0.8 * np.sin(7 * angle + structure.phase), 0.0) / mpp
    points = structure.centre + np.stack([np.sin(angle), np.cos(angle)], axis=1) * reach[:, None]
    return points, angle + np.pi / 2


def _blood(ground: Ground, structures: list[Round]) -> np.ndarray:
    """Return where red cells lie in and around vessels, (H, W) float32."""
    vessels = np.zeros(ground.shape, bool)
    for structure in structures:
        if structure.kind == "vessel":
            vessels[_signed_distance(ground, structure)[0]] = True
    if not vessels.any():
        return vessels.astype(np.float32)
    rng = ground.rng("blood")
    points = ground.scatter(rng, BLOOD_SPACING_UM, jitter=0.35, margin_um=0.0)
    points = points[(rng.random(len(points)) < 0.7) & lookup(vessels, points)]
    cells = make_nuclei(rng, points, radius_um=BLOOD_CELL_UM, spread=0.08, amount=1.0, stretch=(1.0, 1.4))
    return stamp(cells, ground.shape, ground.mpp)[0]


def _signed_distance(ground: Ground, structure: Round) -> tuple[Window, np.ndarray]:
    """Return a window and the distance to the outline in micrometres, negative inside, of float32."""
    reach = structure.radius_um * 1.2 / ground.mpp + 2
    low = np.maximum(np.floor(structure.centre - reach), 0).astype(int)
    high = np.maximum(np.minimum(np.ceil(structure.centre + reach), ground.shape).astype(int), low)
    y, x = (np.arange(low[i], high[i]) - structure.centre[i] for i in (0, 1))
    dy, dx = y[:, None] * ground.mpp, x[None] * ground.mpp
    distance_um = np.sqrt(dy**2 + dx**2) - structure.outline_um(np.arctan2(dy, dx))
    return (slice(low[0], high[0]), slice(low[1], high[1])), distance_um.astype(np.float32)
