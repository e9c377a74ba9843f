"""From stains to the picture: light through the dyes (Beer-Lambert), optics, veil and camera."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from counterstain.data.phantom.artefacts import defocus
from counterstain.data.phantom.ground import Ground, Stains


def photograph(ground: Ground, stains: Stains) -> np.ndarray:
    """Return the picture of stained tissue.

    Dyes absorb as in Ruifrok & Johnston (2001): the optical density (to base 10) of a channel is the sum over dyes of
    amount times the dye's vector.

    Returns
    -------
    (H, W, 3) uint8 array
    """
    style = ground.style
    dyes = np.array([style.haematoxylin_vector, style.dab_vector], np.float32)
    counter = stains.haematoxylin * np.float32(style.haematoxylin_strength)
    density = counter[..., None] * dyes[0] + stains.dab[..., None] * dyes[1]
    light = np.exp(density * np.float32(-np.log(10))) * np.array(style.glass, np.float32)
    blur_px = float(np.hypot(style.blur_um / ground.mpp, 0.35))
    light = ndimage.gaussian_filter(light, (blur_px, blur_px, 0), truncate=3.0)
    light = defocus(ground, light)
    light = light * (1 - style.haze) + style.haze * np.float32(0.93)
    light = light * _illumination(ground)[..., None]
    noise = ground.rng("camera").standard_normal(light.shape, dtype=np.float32)
    light = light + style.noise * noise * (0.4 + 0.6 * light)
    return np.asarray(np.clip(np.rint(light * 255), 0, 255), np.uint8)


def _illumination(ground: Ground) -> np.ndarray:
    rng = ground.rng("illumination")
    angle = rng.uniform(0, 2 * np.pi)
    y, x = (np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in ground.shape)
    return np.asarray(1 + ground.style.illumination * (np.sin(angle) * y[:, None] + np.cos(angle) * x[None, :]))
