"""What is watched while a generator trains, logged beside the losses.

A first stage: how well it reconstructs images. SPADE: style codes that change nothing (the VAE's latents have
collapsed), white images and repeated texture, both of which Öttl et al. (2023) saw in images of their GAN.

Shapes: n = images or masks, k = codes for one mask, H, W = rows and columns in pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from counterstain.data.cohort import Cohort
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.errors import InputError
from counterstain.generators.autoencoder import Autoencoder, usage_of
from counterstain.generators.conditioning import to_tensor
from counterstain.generators.interface import DrawRequest
from counterstain.generators.spade import Spade, SpadeGenerator
from counterstain.seeding import derive
from counterstain.training import Monitor

Distance = Callable[[Tensor, Tensor], Tensor]  # two batches (n, 3, H, W), -1..1 -> (n, 1, 1, 1)
RANGE = 2.0  # of values in -1..1
WINDOW_PX = 11  # of SSIM
HIGHEST_PSNR = 106.0  # dB; two equal images have no finite one
BATCH = 8  # images
MONITORED_CODES = 4  # style codes that each mask is drawn with
FAINTEST_DIVERSITY = 1.0  # grey levels: less than a display shows
LARGEST_WHITE_SHARE = 0.1
STRONGEST_REPETITION = 0.35  # a repeated tile is 1; tissue of the phantom is 0.17 at 128 px, 0.25 at 64 px
PEAKS = 30  # of the autocorrelation that are looked at
FLAT = 1.0  # grey levels: an image whose details vary less has no texture
WHITE_LEVEL = 235.0  # mean grey level of an image without tissue


def psnr(drawn: Tensor, real: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, 106 at most, of each pair of (n, 3, H, W), -1..1: (n,)."""
    ratio = peak_signal_noise_ratio(drawn, real, data_range=RANGE, dim=(1, 2, 3), reduction="none")
    return ratio.clamp(max=HIGHEST_PSNR)


def ssim(drawn: Tensor, real: Tensor) -> Tensor:
    """Return the structural similarity of each pair of (n, 3, H, W), -1..1, where whole windows fit in: (n,).

    Wang et al. (2004) with their Gaussian window of 11 pixels, channel by channel.
    """
    _, maps = structural_similarity_index_measure(
        drawn.double(), real.double(), sigma=1.5, data_range=RANGE, reduction="none", return_full_image=True
    )
    return maps[..., WINDOW_PX // 2 : -(WINDOW_PX // 2), WINDOW_PX // 2 : -(WINDOW_PX // 2)].flatten(1).mean(1)


@torch.no_grad()
def reconstruction_figures(model: Autoencoder, images: np.ndarray, lpips: Distance | None = None) -> dict[str, float]:
    """Encode and decode images, (n, H, W, 3) uint8, by a model in evaluation mode, and compare.

    Returns ``psnr`` (dB, larger is better), ``ssim`` (at most 1) and, where there are such, ``lpips`` (0 is best),
    ``codebook_usage`` (share of the codes that all images together use) and ``codebook_perplexity``.
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


def code_diversity(images: np.ndarray) -> float:
    """Return how much the style code changes what is drawn for one mask; 0 = z has collapsed.

    Of images (n, k, H, W, 3) uint8 with the same mask along the second axis, the standard deviation between codes in
    grey levels (0..255), averaged over pixels, channels and masks.
    """
    return float(images.astype(np.float32).std(axis=1, ddof=1).mean())


def white_share(images: np.ndarray) -> float:
    """Return the share of images (n, H, W, 3) uint8 without tissue, by their mean grey level."""
    return float((images.mean(axis=(1, 2, 3)) > WHITE_LEVEL).mean())


def repetition(images: np.ndarray) -> np.ndarray:
    """Return how strongly each image (n, H, W, 3) uint8 repeats itself at some distance, (n,) float.

    1 = the image is a tile, laid side by side; 0.2 to 0.3 = tissue, by how few cells it shows; noise is below.

    The largest peak of the autocorrelation: the grey level without what varies over more than an eighth of the edge,
    brought to equal contrast everywhere, is correlated with itself, at distances up to half of the edge, over the
    pixels that overlap. A peak counts by its height above the lowest point on the way to it: a border correlates with
    itself all along, and does not repeat.
    """
    return np.array([_strongest_peak(image.mean(axis=2)) for image in images])


def warnings_of(figures: Mapping[str, float]) -> list[str]:
    """Say in a sentence each what is wrong with the figures of :func:`watch_spade`.

    White images and repetition that real patches show as well (``real_…``) are no fault of the generator.
    """
    found = []
    if figures.get("code_diversity", np.inf) < FAINTEST_DIVERSITY:
        found.append(
            f"the style code changes images by {figures['code_diversity']:.2f} grey levels only: z has collapsed"
        )
    white = figures.get("white_share", 0.0)
    if white > LARGEST_WHITE_SHARE + figures.get("real_white_share", 0.0):
        found.append(f"{white:.0%} of the images are near white")
    repeated = figures.get("repetition", 0.0)
    if repeated > max(STRONGEST_REPETITION, 1.5 * figures.get("real_repetition", 0.0)):
        found.append(f"texture repeats itself (autocorrelation {repeated:.2f})")
    return found


def _strongest_peak(grey: np.ndarray) -> float:
    """Return the height of the highest peak of the autocorrelation of (H, W), but for the one in the middle."""
    width = min(grey.shape) / 16
    fine = grey - ndimage.gaussian_filter(grey, width)
    if fine.std() < FLAT:
        return 0.0
    # Equal contrast everywhere, or one strong border would count as repeated along itself.
    fine = fine / np.sqrt(ndimage.gaussian_filter(fine**2, width) + FLAT**2)
    correlation = _autocorrelation(fine - fine.mean())
    peaks = correlation == ndimage.maximum_filter(correlation, 3)
    places = np.argwhere(peaks)
    highest = places[np.argsort(correlation[peaks])[::-1][:PEAKS]]
    return max(_height(correlation, place) for place in highest)


def _height(correlation: np.ndarray, place: np.ndarray) -> float:
    """Return by how much a place stands above the lowest point on the straight way from the middle, or above 0."""
    middle = np.array(correlation.shape) // 2
    steps = np.linspace(0, 1, max(2, int(np.abs(place - middle).max()) + 1))
    way = middle[:, None] + np.outer(place - middle, steps)
    lowest = ndimage.map_coordinates(correlation, way, order=1).min()
    return float(correlation[tuple(place)] - max(lowest, 0.0))


def _autocorrelation(values: np.ndarray) -> np.ndarray:
    """Correlate (H, W) with itself up to half of each edge, no shift in the middle, over what overlaps."""
    shape = [2 * edge for edge in values.shape]
    spectra = [np.abs(np.fft.rfft2(of, shape)) ** 2 for of in (values, np.ones_like(values))]
    summed, counts = (np.fft.fftshift(np.fft.irfft2(spectrum, shape)) for spectrum in spectra)
    quarter = [edge // 2 for edge in values.shape]
    inside = tuple(slice(q, 3 * q + 1) for q in quarter)
    correlation = summed[inside] / counts[inside]
    normalised: np.ndarray = correlation / correlation[quarter[0], quarter[1]]
    return normalised


def watch_autoencoder(model: Autoencoder, cohort: Cohort, size_px: int, seed: int) -> Monitor | None:
    """Watch how well validation patches are given back; None where there are none or none are asked for.

    The patches are looked at and never trained on, and nothing is chosen by them.
    """
    config = model.config
    if not config.validation_patches or not cohort.patients("val"):
        return None
    try:
        sampler = PatchSampler(cohort, "val", size_px, _unvaried(config.sampling), derive(seed, "validation"))
    except InputError as reason:
        sys.stderr.write(f"notice: the first stage is not validated: {reason}\n")
        return None

    images = np.stack([sampler[i].image for i in range(config.validation_patches)])

    def measure() -> dict[str, float]:
        figures = reconstruction_figures(model, images, model.lpips)
        return {f"val_{name}": value for name, value in figures.items()}

    return Monitor(measure=measure, every_steps=config.validate_every_steps)


def watch_spade(model: Spade, cohort: Cohort, size_px: int, seed: int) -> Monitor | None:
    """Watch for style codes that change nothing, white images and repeated texture, on masks of training patches."""
    config = model.config
    if not config.monitor_masks:
        return None
    sampler = PatchSampler(cohort, "train", size_px, _unvaried(config.sampling), derive(seed, "monitored masks"))
    patches = [sampler[i] for i in range(config.monitor_masks)]
    real = {f"real_{name}": value for name, value in _texture(np.stack([patch.image for patch in patches])).items()}
    seeds = [derive(seed, "monitored code", code) for code in range(MONITORED_CODES)]  # the same for every mask
    requests = [
        DrawRequest(mask=patch.label_mask, seed=one, instances=patch.instances, image=patch.image)
        for patch in patches
        for one in seeds
    ]

    def measure() -> dict[str, float]:
        images = np.stack(SpadeGenerator(model, model.device).draw(requests))
        by_mask = images.reshape(-1, MONITORED_CODES, *images.shape[1:])
        return {"code_diversity": code_diversity(by_mask)} | _texture(images) | real

    return Monitor(measure=measure, every_steps=config.monitor_every_steps)


def _texture(images: np.ndarray) -> dict[str, float]:
    return {"white_share": white_share(images), "repetition": float(repetition(images).mean())}


def _unvaried(sampling: SamplingConfig) -> SamplingConfig:
    return sampling.model_copy(update={"flip": False, "quarter_turns": False, "stain_jitter": 0.0})
