"""How well a first stage gives images back: PSNR, SSIM, LPIPS where it is had, and the use of the codebook.

Shapes: n = images, H, W = rows and columns in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.codebook import usage_of
from counterstain.generators.conditioning import to_tensor

Distance = Callable[[Tensor, Tensor], Tensor]  # two batches (n, 3, H, W), -1..1 -> (n, 1, 1, 1)
RANGE = 2.0  # of values in -1..1
WINDOW_PX, WINDOW_SIGMA_PX = 11, 1.5
K1, K2 = 0.01, 0.03
BATCH = 8


def psnr(drawn: Tensor, real: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each pair of (n, 3, H, W), -1..1: (n,)."""
    squared = (drawn - real).pow(2).flatten(1).mean(1).clamp(min=1e-10)
    return 10 * torch.log10(RANGE**2 / squared)


def ssim(drawn: Tensor, real: Tensor) -> Tensor:
    """Return the structural similarity of each pair of (n, 3, H, W), -1..1: (n,).

    Wang et al. (2004) with their Gaussian window, channel by channel, where the whole window is inside the image.
    """
    x, y = drawn.double(), real.double()
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1)


@torch.no_grad()
def reconstruction_figures(model: Autoencoder, images: np.ndarray, lpips: Distance | None = None) -> dict[str, float]:
    """Encode and decode images, and compare.

    Parameters
    ----------
    model : Autoencoder
        In evaluation mode.
    images : (n, H, W, 3) uint8
    lpips : callable, optional

    Returns
    -------
    dict
        ``psnr`` (dB, larger is better), ``ssim`` (at most 1), ``lpips`` (0 is best), ``codebook_usage`` (share of the
        codes that all images together use) and ``codebook_perplexity``; the last three where there are such.
    """
    found: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
    chosen = []
    for first in range(0, len(images), BATCH):
        real = to_tensor(torch.from_numpy(images[first : first + BATCH]).to(model.device))
        latents = model.encode(real)
        drawn = model.decode(latents).float().clamp(-1, 1)
        found["psnr"].append(psnr(drawn, real))
        found["ssim"].append(ssim(drawn, real))
        if lpips is not None:
            found.setdefault("lpips", []).append(lpips(drawn, real).flatten())
        if model.config.kind == "vq":
            network: Any = model.network
            chosen.append(network.quantize(latents)[2][2].flatten())
    figures = {name: float(torch.cat(values).mean()) for name, values in found.items()}
    if chosen:
        used, perplexity = usage_of(torch.cat(chosen), model.config.codebook_size)
        figures |= {"codebook_usage": used, "codebook_perplexity": perplexity}
    return figures


def _blurred(images: Tensor) -> Tensor:
    offsets = torch.arange(WINDOW_PX, dtype=images.dtype, device=images.device) - WINDOW_PX // 2
    window = torch.exp(-0.5 * (offsets / WINDOW_SIGMA_PX) ** 2)
    window = (window / window.sum()).expand(images.shape[1], 1, -1)
    rows = functional.conv2d(images, window[:, :, :, None], groups=images.shape[1])
    return functional.conv2d(rows, window[:, :, None, :], groups=images.shape[1])
