"""What is watched while a generator trains: figures on fixed patches, logged beside the losses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache

import numpy as np

from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.errors import InputError
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.monitors import code_diversity, repetition, white_share
from counterstain.generators.reconstruction import reconstruction_figures
from counterstain.generators.spade import Spade, SpadeGenerator
from counterstain.seeding import derive
from counterstain.training import Monitor


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

    @cache
    def images() -> np.ndarray:
        return np.stack([sampler[i].image for i in range(config.validation_patches)])

    def measure() -> dict[str, float]:
        figures = reconstruction_figures(model, images(), model.lpips)
        return {f"val_{name}": value for name, value in figures.items()}

    return Monitor(measure=measure, every_steps=config.validate_every_steps)


def watch_spade(model: Spade, cohort: Cohort, size_px: int, seed: int) -> Monitor | None:
    """Watch for style codes that change nothing, white images and repeated texture, on masks of training patches."""
    config = model.config
    if not config.monitor_masks:
        return None
    sampling = _unvaried(config.sampling)
    sampler = PatchSampler(cohort, "train", size_px, sampling, derive(seed, "monitored masks"))

    @cache
    def patches() -> list[Patch]:
        return [sampler[i] for i in range(config.monitor_masks)]

    @cache
    def real() -> dict[str, float]:
        images = np.stack([patch.image for patch in patches()])
        return {"real_white_share": white_share(images), "real_repetition": float(repetition(images).mean())}

    def measure() -> dict[str, float]:
        drawn = _drawn_with_codes(model, patches(), config.monitor_codes, seed)
        images = drawn.reshape(-1, *drawn.shape[2:])
        figures = {
            "code_diversity": code_diversity(drawn),
            "white_share": white_share(images),
            "repetition": float(repetition(images).mean()),
        }
        return figures | real()

    return Monitor(measure=measure, every_steps=config.monitor_every_steps)


def _drawn_with_codes(model: Spade, patches: Sequence[Patch], codes: int, seed: int) -> np.ndarray:
    """Draw every mask with the same few style codes, (n, k, H, W, 3) uint8."""
    masks = np.stack([patch.label_mask for patch in patches]).repeat(codes, axis=0)
    instances = np.stack([patch.instances for patch in patches]).repeat(codes, axis=0)
    seeds = [derive(seed, "monitored code", code) for code in range(codes)] * len(patches)
    images = np.stack([patch.image for patch in patches]).repeat(codes, axis=0)
    drawn = SpadeGenerator(model, model.device).generate(masks, seeds, images, instances=instances)
    return drawn.reshape(len(patches), codes, *drawn.shape[1:])


def _unvaried(sampling: SamplingConfig) -> SamplingConfig:
    return sampling.model_copy(update={"flip": False, "quarter_turns": False, "stain_jitter": 0.0})
