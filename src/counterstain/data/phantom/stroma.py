"""Stroma: wavy fibres that flow around nests, spindle cells between them, lymphocytes and their aggregates."""

from __future__ import annotations

import numpy as np

from counterstain.data.phantom.ground import Ground, Stains
from counterstain.data.phantom.noise import level_angle, look_up_wrapped, lookup, smoothstep, white_noise
from counterstain.data.phantom.nuclei import Nuclei, make_nuclei, stamp

LYMPHOCYTE_RADIUS_UM = 2.9
WITHIN_NESTS_SHARE = 0.12  # of the lymphocytes at the edge of a nest that also lie in it
FIBRE_TABLE = (64, 64)  # random values across and along fibres; wraps around


def draw_fibres(ground: Ground) -> tuple[Stains, np.ndarray]:
    """Draw the fibres that everything else lies on.

    Returns
    -------
    stains : Stains
    across_um : (H, W) float32 array
        Coordinate across the fibres, whose gradient gives spindle cells their direction.
    """
    style = ground.style
    rng = ground.rng("fibres")
    theta = rng.uniform(0, np.pi)
    y, x = (np.arange(n, dtype=np.float32) * np.float32(ground.mpp) for n in ground.shape)
    cos, sin = np.float32(np.cos(theta)), np.float32(np.sin(theta))
    along = cos * x + sin * y[:, None]
    across = cos * y[:, None] - sin * x
    long_waves = ground.noise("long waves")
    across += np.float32(style.fibre_wave_um) * long_waves + 2 * ground.noise("short waves")
    across -= 20 * np.exp(ground.outside_um * np.float32(-1 / 14))  # fibres run along the outlines of nests
    fine = _fibre_texture(rng, across / 2.2, along / 26)
    crossing = _fibre_texture(rng, (across + 0.45 * along) / 3.1, (along - 0.45 * across) / 30)
    bundles = _fibre_texture(rng, across / 7.5, along / 55)
    oedema = ground.noise("oedema")
    cracks = smoothstep(bundles + 0.5 * oedema + 0.4 * long_waves, 0.9, 1.9)
    density = 0.72 + 0.12 * fine + 0.09 * crossing - 0.1 * bundles - 0.12 * oedema + 0.06 * ground.noise("grain")
    density = np.clip(density * (1 - 0.8 * cracks), 0.03, None)
    staining = smoothstep(ground.noise("staining"), 0.2, 2.0)
    dab = (0.5 + 0.5 * density) * (style.dab_background + style.edge_staining * staining)
    return Stains(0.135 * np.float32(style.stroma_density) * density, dab + 0.02 * density), across


def draw_stroma_cells(ground: Ground, stains: Stains, across_um: np.ndarray, free: np.ndarray) -> None:
    """Draw spindle cells and lymphocytes where ``free``, an (H, W) boolean array, leaves room for them."""
    rng = ground.rng("within nests")
    for nuclei, share_within in ((_fibroblasts(ground, across_um), 0.0), (_lymphocytes(ground), WITHIN_NESTS_SHARE)):
        within = rng.random(len(nuclei.points)) < share_within
        seen = nuclei.chosen(np.where(lookup(ground.labels, nuclei.points) > 0, within, lookup(free, nuclei.points)))
        coverage, amount = stamp(seen, ground.shape, ground.mpp)
        texture = 1 + 0.12 * ground.noise("grain")
        stains.cover(
            coverage, haematoxylin=np.maximum(amount * texture, stains.haematoxylin), dab=stains.dab * np.float32(0.7)
        )


def _fibre_texture(rng: np.random.Generator, across: np.ndarray, along: np.ndarray) -> np.ndarray:
    table = white_noise(rng, FIBRE_TABLE)
    return look_up_wrapped(table, across, along + 0.15 * across) * np.float32(1.4)


def _fibroblasts(ground: Ground, across_um: np.ndarray) -> Nuclei:
    rng = ground.rng("fibroblasts")
    points = ground.scatter(rng, 17.0, jitter=0.45, margin_um=6.0)
    points = points[rng.random(len(points)) < 0.55 * ground.style.fibroblasts]
    return make_nuclei(
        rng,
        points,
        radius_um=2.5,
        spread=0.2,
        amount=0.42,
        stretch=(2.2, 6.0),
        angle=level_angle(across_um, points),
        lumpiness=0.04,
    )


def _lymphocytes(ground: Ground) -> Nuclei:
    rng = ground.rng("lymphocytes")
    points = ground.scatter(rng, 7.0, jitter=0.4, margin_um=4.0)
    crowd = lookup(ground.noise("aggregates"), points)
    near_nests = np.exp(-lookup(ground.outside_um, points) / 20.0)
    density = ground.style.lymphocytes * (0.035 + 0.05 * near_nests + 0.9 * smoothstep(crowd, 1.1, 2.1))
    points = points[rng.random(len(points)) < density]
    return make_nuclei(
        rng,
        points,
        radius_um=LYMPHOCYTE_RADIUS_UM,
        spread=0.1,
        amount=0.72,
        stretch=(1.0, 1.25),
        lumpiness=0.03,
        rim=0.12,
    )
