"""What surrounds tumour nests: fibres, stroma cells, glands, vessels and fat, and what goes wrong at bench and scanner.

Shapes: H, W = rows and columns of the region, n = nuclei or structures of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from counterstain.data.phantom.canvas import (
    Canvas,
    Nuclei,
    Stains,
    Window,
    level_angle,
    lookup,
    make_nuclei,
    scatter,
    smoothstep,
    stamp,
    white_noise,
)

GLAND_NUCLEUS_UM, GLAND_SPACING_UM = 2.9, 6.6
BLOOD_CELL_UM, BLOOD_SPACING_UM = 2.6, 5.0
LYMPHOCYTE_RADIUS_UM = 2.9
WITHIN_NESTS_SHARE = 0.12  # of the lymphocytes at the edge of a nest that also lie in it
FIBRE_TABLE_SIDE = 64  # random values across and along fibres; wraps around
RATE_AREA_UM2 = 256.0**2  # rates of artefacts in SlideStyle are per such area
FOCUS_LOSS_UM = 1.8  # standard deviation of the blur where focus is lost
SPACING_UM = 78.0  # of the places where a structure or a group of them may lie
REACH_UM = 36.0  # the largest group
GLAND_RATE, FAT_RATE, VESSEL_RATE = 0.24, 0.10, 0.16  # share of the places, on the median slide
Member = tuple[str, np.ndarray, float, float]  # kind, offset in micrometres, radius, wall


@dataclass(frozen=True, kw_only=True)
class _Round:
    """A round structure with a wall."""

    kind: str  # gland, vessel or fat
    centre: np.ndarray  # (2,) row and column in pixels
    radius_um: float
    wall_um: float  # all of the radius = no lumen
    phase: float  # turns the waves of the outline

    def outline_um(self, angle: np.ndarray) -> np.ndarray:
        waves = 0.10 * np.cos(2 * angle + self.phase) + 0.06 * np.cos(3 * angle + 2 * self.phase)
        return np.asarray(self.radius_um * (1 + waves))


def _find_places(canvas: Canvas) -> Iterator[_Round]:
    """Yield every structure that finds room between the nests, also those that reach in from beyond the edges."""
    style, rng = canvas.style, canvas.rng("places")
    rates = np.array([GLAND_RATE * style.benign, FAT_RATE * style.fat, VESSEL_RATE])
    limits = np.cumsum(rates / max(rates.sum(), 1.0))
    centres = canvas.scatter(rng, SPACING_UM, jitter=0.3, margin_um=REACH_UM)
    kinds = rng.random(len(centres))
    rooms_um = np.minimum(lookup(canvas.outside_um, centres) + 4.0, REACH_UM)
    for place in np.flatnonzero(kinds < limits[2]).tolist():
        rng, room_um = canvas.rng("place", place), float(rooms_um[place])
        members = (_glands, _fat_cells, _vessels)[np.searchsorted(limits, kinds[place], side="right")]
        for kind, offset_um, radius_um, wall_um in members(rng, room_um):
            centre, phase = centres[place] + offset_um / canvas.mpp, rng.uniform(0, 2 * np.pi)
            if lookup(canvas.outside_um, centre[None])[0] > 0.8 * radius_um:
                yield _Round(kind=kind, centre=centre, radius_um=radius_um, wall_um=wall_um, phase=phase)


def _glands(rng: np.random.Generator, room_um: float) -> Iterator[Member]:
    if room_um <= 12:
        return
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


def draw_benign(canvas: Canvas, stains: Stains) -> np.ndarray:
    """Draw glands, vessels and fat into the background; return where nothing was drawn, (H, W) bool."""
    taken = np.zeros(canvas.shape, np.float32)
    outside = smoothstep(canvas.outside_um, 1.0, 4.0).astype(np.float32)
    structures = list(_find_places(canvas))
    blood = _blood(canvas, structures)
    for structure in structures:
        window, distance_um = _signed_distance(canvas, structure)
        if distance_um.size:
            coverage = smoothstep(-distance_um, -0.6 * canvas.mpp, 0.6 * canvas.mpp) * outside[window]
            shown = Stains(stains.haematoxylin[window], stains.dab[window])
            _fill(structure, distance_um, coverage, shown, blood[window])
            taken[window] = np.maximum(taken[window], coverage)
    for nuclei in _nuclei(canvas, structures):
        coverage, amount = stamp(nuclei, canvas.shape, canvas.mpp)
        stains.cover(coverage * outside, haematoxylin=amount * (1 + 0.1 * canvas.noise("grain")), dab=stains.dab)
    return taken < 0.3


def _fill(structure: _Round, distance_um: np.ndarray, coverage: np.ndarray, stains: Stains, blood: np.ndarray) -> None:
    """Draw the wall and the lumen of a structure into its window."""
    lumen = smoothstep(-distance_um - structure.wall_um, -0.7, 0.7)
    if structure.kind == "fat":
        stains.cover(coverage, haematoxylin=0.16 * np.exp(-np.square(distance_um)), dab=0.0)
    elif structure.kind == "vessel":
        wall, cells = 1 - lumen, lumen * blood
        stains.cover(coverage, haematoxylin=0.13 * wall + 0.07 * cells, dab=stains.dab * wall + 0.16 * cells)
    else:
        stains.cover(coverage, haematoxylin=0.13 * (1 - lumen) + 0.005, dab=stains.dab * (1 - lumen))


def _nuclei(canvas: Canvas, structures: list[_Round]) -> Iterator[Nuclei]:
    """Yield the nuclei of epithelium and of the inner skin of vessels."""
    rng = canvas.rng("benign nuclei")
    rings = [_ring(g, d, GLAND_SPACING_UM, canvas.mpp) for g in structures if g.kind == "gland" for d in _depths_um(g)]
    skins = [_ring(v, 1.0, 11.0, canvas.mpp) for v in structures if v.kind == "vessel"]
    if rings:
        points = np.concatenate([points for points, _ in rings])
        yield make_nuclei(rng, points, radius_um=GLAND_NUCLEUS_UM, spread=0.1, amount=0.5, stretch=(1.0, 1.6))
    if skins:
        points, angle = (np.concatenate(parts) for parts in zip(*skins, strict=True))
        yield make_nuclei(rng, points, radius_um=1.9, spread=0.15, amount=0.5, stretch=(2.0, 4.0), angle=angle)


def _depths_um(gland: _Round) -> list[float]:
    """Return how deep below the outline the rings of nuclei lie."""
    first = GLAND_NUCLEUS_UM + 0.6
    depths: list[float] = np.arange(first, max(gland.wall_um - 1.5, first + 0.1), 0.95 * GLAND_SPACING_UM).tolist()
    return depths


def _ring(structure: _Round, depth_um: float, spacing_um: float, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Return points inside the outline, (n, 2) in pixels, and the angle of the wall at each, (n,)."""
    radius_um = max(structure.radius_um - depth_um, 0.0)
    count = max(int(2 * np.pi * radius_um / spacing_um), 1)
    angle = np.arange(count) * (2 * np.pi / count) + 0.7 * depth_um + structure.phase
    reach = np.maximum(structure.outline_um(angle) - depth_um + 0.8 * np.sin(7 * angle + structure.phase), 0.0) / mpp
    points = structure.centre + np.stack([np.sin(angle), np.cos(angle)], axis=1) * reach[:, None]
    return points, angle + np.pi / 2


def _blood(canvas: Canvas, structures: list[_Round]) -> np.ndarray:
    """Return where red cells lie in and around vessels, (H, W) float32."""
    vessels = np.zeros(canvas.shape, bool)
    for vessel in (structure for structure in structures if structure.kind == "vessel"):
        vessels[_signed_distance(canvas, vessel)[0]] = True
    if not vessels.any():
        return vessels.astype(np.float32)
    rng = canvas.rng("blood")
    points = canvas.scatter(rng, BLOOD_SPACING_UM, jitter=0.35, margin_um=0.0)
    points = points[(rng.random(len(points)) < 0.7) & lookup(vessels, points)]
    cells = make_nuclei(rng, points, radius_um=BLOOD_CELL_UM, spread=0.08, amount=1.0, stretch=(1.0, 1.4))
    return stamp(cells, canvas.shape, canvas.mpp)[0]


def _signed_distance(canvas: Canvas, structure: _Round) -> tuple[Window, np.ndarray]:
    """Return a window and the distance to the outline in micrometres, negative inside, of float32."""
    reach = structure.radius_um * 1.2 / canvas.mpp + 2
    low = np.maximum(np.floor(structure.centre - reach), 0).astype(int)
    high = np.maximum(np.minimum(np.ceil(structure.centre + reach), canvas.shape).astype(int), low)
    y, x = (np.arange(low[i], high[i]) - structure.centre[i] for i in (0, 1))
    dy, dx = y[:, None] * canvas.mpp, x[None] * canvas.mpp
    distance_um = np.sqrt(dy**2 + dx**2) - structure.outline_um(np.arctan2(dy, dx))
    return (slice(low[0], high[0]), slice(low[1], high[1])), distance_um.astype(np.float32)


def draw_fibres(canvas: Canvas) -> tuple[Stains, np.ndarray]:
    """Draw the fibres that everything else lies on; also return the coordinate across them in um, (H, W) float32."""
    style, rng = canvas.style, canvas.rng("fibres")
    theta = rng.uniform(0, np.pi)
    y, x = (np.arange(n, dtype=np.float32) * np.float32(canvas.mpp) for n in canvas.shape)
    cos, sin = np.float32(np.cos(theta)), np.float32(np.sin(theta))
    along = cos * x + sin * y[:, None]
    across = cos * y[:, None] - sin * x
    long_waves = canvas.noise("long waves")
    across += np.float32(style.fibre_wave_um) * long_waves + 2 * canvas.noise("short waves")
    across -= 20 * np.exp(canvas.outside_um * np.float32(-1 / 14))  # fibres run along the outlines of nests
    fine = _fibre_texture(rng, across / 2.2, along / 26)
    crossing = _fibre_texture(rng, (across + 0.45 * along) / 3.1, (along - 0.45 * across) / 30)
    bundles = _fibre_texture(rng, across / 7.5, along / 55)
    oedema = canvas.noise("oedema")
    cracks = smoothstep(bundles + 0.5 * oedema + 0.4 * long_waves, 0.9, 1.9)
    density = 0.72 + 0.12 * fine + 0.09 * crossing - 0.1 * bundles - 0.12 * oedema + 0.06 * canvas.noise("grain")
    density = np.clip(density * (1 - 0.8 * cracks), 0.03, None)
    staining = smoothstep(canvas.noise("staining"), 0.2, 2.0)
    dab = (0.5 + 0.5 * density) * (style.dab_background + style.edge_staining * staining)
    return Stains(0.135 * np.float32(style.stroma_density) * density, dab + 0.02 * density), across


def draw_stroma_cells(canvas: Canvas, stains: Stains, across_um: np.ndarray, free: np.ndarray) -> None:
    """Draw spindle cells and lymphocytes where ``free``, an (H, W) boolean array, leaves room for them."""
    rng = canvas.rng("within nests")
    for nuclei, share_within in ((_fibroblasts(canvas, across_um), 0.0), (_lymphocytes(canvas), WITHIN_NESTS_SHARE)):
        within = rng.random(len(nuclei.points)) < share_within
        seen = nuclei.chosen(np.where(lookup(canvas.labels, nuclei.points) > 0, within, lookup(free, nuclei.points)))
        coverage, amount = stamp(seen, canvas.shape, canvas.mpp)
        texture = 1 + 0.12 * canvas.noise("grain")
        stains.cover(
            coverage, haematoxylin=np.maximum(amount * texture, stains.haematoxylin), dab=stains.dab * np.float32(0.7)
        )


def _fibre_texture(rng: np.random.Generator, across: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Interpolate a table of noise that repeats in both directions."""
    table = white_noise(rng, (FIBRE_TABLE_SIDE, FIBRE_TABLE_SIDE)).ravel()
    rows, columns = across, along + 0.15 * across
    y, x = (np.floor(values).astype(np.int32) for values in (rows, columns))
    v, u = (rows - y).astype(np.float32), (columns - x).astype(np.float32)
    here, below = ((y + i) % FIBRE_TABLE_SIDE * FIBRE_TABLE_SIDE for i in (0, 1))
    left, right = ((x + i) % FIBRE_TABLE_SIDE for i in (0, 1))
    upper = table[here + left] * (1 - u) + table[here + right] * u
    lower = table[below + left] * (1 - u) + table[below + right] * u
    return np.asarray(upper + v * (lower - upper)) * np.float32(1.4)


def _fibroblasts(canvas: Canvas, across_um: np.ndarray) -> Nuclei:
    rng = canvas.rng("fibroblasts")
    points = canvas.scatter(rng, 17.0, jitter=0.45, margin_um=6.0)
    points = points[rng.random(len(points)) < 0.55 * canvas.style.fibroblasts]
    return make_nuclei(
        rng, points, radius_um=2.5, spread=0.2, amount=0.42, lumpiness=0.04,
        stretch=(2.2, 6.0), angle=level_angle(across_um, points),
    )  # fmt: skip


def _lymphocytes(canvas: Canvas) -> Nuclei:
    rng = canvas.rng("lymphocytes")
    points = canvas.scatter(rng, 7.0, jitter=0.4, margin_um=4.0)
    crowd = lookup(canvas.noise("aggregates"), points)
    near_nests = np.exp(-lookup(canvas.outside_um, points) / 20.0)
    density = canvas.style.lymphocytes * (0.035 + 0.05 * near_nests + 0.9 * smoothstep(crowd, 1.1, 2.1))
    points = points[rng.random(len(points)) < density]
    return make_nuclei(
        rng, points, radius_um=LYMPHOCYTE_RADIUS_UM, spread=0.1, amount=0.72, stretch=(1.0, 1.25), lumpiness=0.03,
        rim=0.12,
    )  # fmt: skip


def draw_artefacts(canvas: Canvas, stains: Stains) -> None:
    """Draw smears, folds and precipitate upon the stains."""
    for number, centre in enumerate(_places(canvas, "smears", canvas.style.smears, reach_um=40.0)):
        rng = canvas.rng("smear", number)
        spot = _spot(canvas, centre, radius_um=rng.uniform(15, 60))
        streaks = smoothstep(canvas.noise("streaks") + 1.5 * spot, 0.2, 2.0)
        stains.dab[...] += rng.uniform(0.08, 0.35) * streaks * spot
    for number, centre in enumerate(_places(canvas, "folds", canvas.style.folds, reach_um=30.0)):
        rng = canvas.rng("fold", number)
        theta, width = rng.uniform(0, np.pi), rng.uniform(5, 12)
        y, x = canvas.axes_um(centre)
        across = np.float32(np.cos(theta)) * y - np.float32(np.sin(theta)) * x
        across += 12 * canvas.noise("vigour")
        fold = 1 + 0.9 * smoothstep(width - np.abs(across), -1.0, 2.5)
        for stain in (stains.haematoxylin, stains.dab):
            stain[...] = stain * fold + 0.03 * (fold - 1)
    for number, centre in enumerate(_places(canvas, "precipitate", canvas.style.precipitate, reach_um=10.0)):
        rng = canvas.rng("grains", number)
        points = centre + rng.normal(0, 14 / canvas.mpp, (int(rng.integers(2, 14)), 2))
        grains = make_nuclei(rng, points, radius_um=1.1, spread=0.45, amount=1.2, lumpiness=0.15, rim=0.0)
        coverage, amount = stamp(grains, canvas.shape, canvas.mpp)
        stains.cover(coverage, haematoxylin=stains.haematoxylin, dab=amount)


def focus_loss(canvas: Canvas) -> np.ndarray | None:
    """Return how far out of focus each pixel is, (H, W) float32 of 0..1, or None where all is sharp."""
    places = _places(canvas, "defocus", canvas.style.defocus, reach_um=60.0)
    spots = [_spot(canvas, centre, radius_um=55.0) for centre in places]
    return np.asarray(np.max(spots, axis=0)) if spots else None


def _places(canvas: Canvas, name: str, rate: float, *, reach_um: float) -> np.ndarray:
    """Draw where artefacts lie, with those whose middle is outside but which reach in, (n, 2) in pixels."""
    rng = canvas.rng(name)
    reach = reach_um / canvas.mpp
    extent = np.array(canvas.shape) + 2 * reach
    expected = rate * float(np.prod(extent)) * canvas.mpp**2 / RATE_AREA_UM2
    return np.asarray(rng.uniform(-reach, extent - reach, (int(rng.poisson(expected)), 2)))


def _spot(canvas: Canvas, centre: np.ndarray, *, radius_um: float) -> np.ndarray:
    y, x = canvas.axes_um(centre)
    return smoothstep(radius_um - np.sqrt(y * y + x * x), -0.4 * radius_um, 0.6 * radius_um)
