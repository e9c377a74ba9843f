"""What surrounds tumour nests: fibres, stroma cells, glands, vessels and fat, and what goes wrong at bench and scanner.

Shapes: H, W = rows and columns of the region, n = nuclei.
"""

from __future__ import annotations

import numpy as np

from counterstain.data.phantom.canvas import (
    Canvas,
    Stains,
    level_angle,
    look_up_wrapped,
    lookup,
    smoothstep,
    white_noise,
)
from counterstain.data.phantom.layout import Round, Window, find_places
from counterstain.data.phantom.nests import Nuclei, make_nuclei, stamp

GLAND_NUCLEUS_UM, GLAND_SPACING_UM = 2.9, 6.6
BLOOD_CELL_UM, BLOOD_SPACING_UM = 2.6, 5.0

LYMPHOCYTE_RADIUS_UM = 2.9
WITHIN_NESTS_SHARE = 0.12  # of the lymphocytes at the edge of a nest that also lie in it
FIBRE_TABLE = (64, 64)  # random values across and along fibres; wraps around
RATE_AREA_UM2 = 256.0**2  # rates of artefacts in SlideStyle are per such area
FOCUS_LOSS_UM = 1.8  # standard deviation of the blur where focus is lost


def draw_benign(canvas: Canvas, stains: Stains) -> np.ndarray:
    """Draw glands, vessels and fat into the background; return where nothing was drawn, (H, W) bool."""
    taken = np.zeros(canvas.shape, np.float32)
    outside = smoothstep(canvas.outside_um, 1.0, 4.0).astype(np.float32)
    structures = list(find_places(canvas))
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


def _nuclei(canvas: Canvas, structures: list[Round]) -> list[Nuclei]:
    """Return the nuclei of epithelium and of the inner skin of vessels."""
    rng = canvas.rng("benign nuclei")
    rings = [ring for gland in structures if gland.kind == "gland" for ring in _epithelium(gland, canvas.mpp)]
    skins = [_ring(v, 1.0, 11.0, canvas.mpp) for v in structures if v.kind == "vessel"]
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


def _blood(canvas: Canvas, structures: list[Round]) -> np.ndarray:
    """Return where red cells lie in and around vessels, (H, W) float32."""
    vessels = np.zeros(canvas.shape, bool)
    for structure in structures:
        if structure.kind == "vessel":
            vessels[_signed_distance(canvas, structure)[0]] = True
    if not vessels.any():
        return vessels.astype(np.float32)
    rng = canvas.rng("blood")
    points = canvas.scatter(rng, BLOOD_SPACING_UM, jitter=0.35, margin_um=0.0)
    points = points[(rng.random(len(points)) < 0.7) & lookup(vessels, points)]
    cells = make_nuclei(rng, points, radius_um=BLOOD_CELL_UM, spread=0.08, amount=1.0, stretch=(1.0, 1.4))
    return stamp(cells, canvas.shape, canvas.mpp)[0]


def _signed_distance(canvas: Canvas, structure: Round) -> tuple[Window, np.ndarray]:
    """Return a window and the distance to the outline in micrometres, negative inside, of float32."""
    reach = structure.radius_um * 1.2 / canvas.mpp + 2
    low = np.maximum(np.floor(structure.centre - reach), 0).astype(int)
    high = np.maximum(np.minimum(np.ceil(structure.centre + reach), canvas.shape).astype(int), low)
    y, x = (np.arange(low[i], high[i]) - structure.centre[i] for i in (0, 1))
    dy, dx = y[:, None] * canvas.mpp, x[None] * canvas.mpp
    distance_um = np.sqrt(dy**2 + dx**2) - structure.outline_um(np.arctan2(dy, dx))
    return (slice(low[0], high[0]), slice(low[1], high[1])), distance_um.astype(np.float32)


def draw_fibres(canvas: Canvas) -> tuple[Stains, np.ndarray]:
    """Draw the fibres that everything else lies on.

    Also returns the coordinate across them in micrometres, (H, W) float32: its gradient gives spindle cells their
    direction.
    """
    style = canvas.style
    rng = canvas.rng("fibres")
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
    table = white_noise(rng, FIBRE_TABLE)
    return look_up_wrapped(table, across, along + 0.15 * across) * np.float32(1.4)


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
    _draw_smears(canvas, stains)
    _draw_folds(canvas, stains)
    _draw_precipitate(canvas, stains)


def focus_loss(canvas: Canvas) -> np.ndarray | None:
    """Return how far out of focus each pixel is, (H, W) float32 of 0..1, or None where all is sharp."""
    places = _places(canvas, "defocus", canvas.style.defocus, reach_um=60.0)
    if not len(places):
        return None
    return np.asarray(np.max([_spot(canvas, centre, radius_um=55.0) for centre in places], axis=0))


def _draw_smears(canvas: Canvas, stains: Stains) -> None:
    for number, centre in enumerate(_places(canvas, "smears", canvas.style.smears, reach_um=40.0)):
        rng = canvas.rng("smear", number)
        spot = _spot(canvas, centre, radius_um=rng.uniform(15, 60))
        streaks = smoothstep(canvas.noise("streaks") + 1.5 * spot, 0.2, 2.0)
        stains.dab[...] += rng.uniform(0.08, 0.35) * streaks * spot


def _draw_folds(canvas: Canvas, stains: Stains) -> None:
    for number, centre in enumerate(_places(canvas, "folds", canvas.style.folds, reach_um=30.0)):
        rng = canvas.rng("fold", number)
        theta, width = rng.uniform(0, np.pi), rng.uniform(5, 12)
        y, x = canvas.axes_um(centre)
        across = np.float32(np.cos(theta)) * y - np.float32(np.sin(theta)) * x
        across += 12 * canvas.noise("vigour")
        fold = 1 + 0.9 * smoothstep(width - np.abs(across), -1.0, 2.5)
        for stain in (stains.haematoxylin, stains.dab):
            stain[...] = stain * fold + 0.03 * (fold - 1)


def _draw_precipitate(canvas: Canvas, stains: Stains) -> None:
    for number, centre in enumerate(_places(canvas, "precipitate", canvas.style.precipitate, reach_um=10.0)):
        rng = canvas.rng("grains", number)
        points = centre + rng.normal(0, 14 / canvas.mpp, (int(rng.integers(2, 14)), 2))
        grains = make_nuclei(rng, points, radius_um=1.1, spread=0.45, amount=1.2, lumpiness=0.15, rim=0.0)
        coverage, amount = stamp(grains, canvas.shape, canvas.mpp)
        stains.cover(coverage, haematoxylin=stains.haematoxylin, dab=amount)


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
