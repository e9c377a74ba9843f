"""From stains to the picture: light through the dyes (Beer-Lambert), optics, veil and camera."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from counterstain.data.phantom.artefacts import FOCUS_LOSS_UM, focus_loss
from counterstain.data.phantom.ground import Ground, Stains
from counterstain.data.phantom.noise import white_noise


def photograph(ground: Ground, stains: Stains) -> np.ndarray:
    """Return the picture of stained tissue.

    Dyes absorb as in Ruifrok & Johnston (2001): the optical density (to base 10) of a channel is the sum over dyes of
    amount times the dye's vector.

    Returns
    -------
    (H, W, 3) uint8 array
    """
    style = ground.style
    counter = stains.haematoxylin * np.float32(style.haematoxylin_strength)
    illumination = _illumination(ground)
    out_of_focus = focus_loss(ground)
    noise = ground.rng("camera")
    picture = np.empty((*ground.shape, 3), np.uint8)
    for channel, glass in enumerate(style.glass):
        density = counter * np.float32(style.haematoxylin_vector[channel])
        density += stains.dab * np.float32(style.dab_vector[channel])
        light = np.exp(density * np.float32(-np.log(10))) * np.float32(glass)
        light = _through_optics(ground, light, out_of_focus)
        light = (light * np.float32(1 - style.haze) + np.float32(0.93 * style.haze)) * illumination
        light += style.noise * (0.4 + 0.6 * light) * _grain(noise, ground.shape)
        picture[..., channel] = np.clip(np.rint(light * 255), 0, 255)
    return picture


def _through_optics(ground: Ground, light: np.ndarray, out_of_focus: np.ndarray | None) -> np.ndarray:
    blur_px = float(np.hypot(ground.style.blur_um / ground.mpp, 0.35))
    sharp = ndimage.gaussian_filter(light, blur_px, truncate=3.0)
    if out_of_focus is None:
        return np.asarray(sharp)
    blurred = ndimage.gaussian_filter(sharp, FOCUS_LOSS_UM / ground.mpp, truncate=2.5)
    return np.asarray(sharp + out_of_focus * (blurred - sharp))


def _grain(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.asarray((white_noise(rng, shape) + white_noise(rng, shape)) * np.float32(np.sqrt(0.5)))


def _illumination(ground: Ground) -> np.ndarray:
    rng = ground.rng("illumination")
    angle = rng.uniform(0, 2 * np.pi)
    y, x = (np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in ground.shape)
    slope = np.float32(np.sin(angle)) * y[:, None] + np.float32(np.cos(angle)) * x[None, :]
    return np.asarray(1 + np.float32(ground.style.illumination) * slope)
