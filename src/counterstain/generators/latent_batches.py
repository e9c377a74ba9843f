"""What a denoiser is fed: patches, or their latents encoded once, with the references of styles.

Shapes: B = batch, z = latent channels, h, w = rows and columns of the latents.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from counterstain.data.batches import patch_batches, stack
from counterstain.data.sampling import PatchSampler
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.style import StyleReferences, references_of, styled_batches
from counterstain.progress import bar
from counterstain.seeding import torch_generator
from counterstain.training import Batches

ENCODE_BATCH = 64


@torch.no_grad()
def measure_latents(model: Diffusion, sampler: PatchSampler, patches: int = 256) -> None:
    """Set the mean and standard deviation of the latents' channels, as ``normalise_latents`` says."""
    encoded = [model.encode(_images(sampler, range(i, i + 16))) for i in range(0, patches, 16)]
    latents = torch.cat(encoded)
    sd = latents.std((0, 2, 3))
    if model.config.normalise_latents == "all":
        sd = sd.pow(2).mean().sqrt().expand_as(sd)
    model.latent_mean.copy_(latents.mean((0, 2, 3)))
    model.latent_sd.copy_(sd.clamp(min=1e-6))


def _images(sampler: PatchSampler, indices: range) -> Tensor:
    return torch.from_numpy(np.stack([sampler[i].image for i in indices]))


def diffusion_batches(model: Diffusion, sampler: PatchSampler, size_px: int, seed: int) -> Batches:
    """Return the function step -> batch of patches, encoded once where the configuration says so, with references."""
    config = model.config
    references = None if config.style is None else references_of(sampler.cohort, size_px, seed)
    if config.latent_pool is not None:
        return _pooled(model, sampler, config.latent_pool, references)
    if config.style is not None and references is not None:
        return styled_batches(sampler, references, config.style.references, config.training.batch_size)
    return patch_batches(sampler, config.training.batch_size)


def _pooled(model: Diffusion, sampler: PatchSampler, pool: int, references: StyleReferences | None) -> Batches:
    """Encode the first ``pool`` patches once; batches are runs of a fresh shuffle for each pass."""
    batch_size, style = model.config.training.batch_size, model.config.style
    encoded: list[dict[str, Tensor]] = []
    with bar("encoding", pool) as advance:
        for first in range(0, pool, ENCODE_BATCH):
            members = range(first, min(first + ENCODE_BATCH, pool))
            patches = [sampler[i] for i in members]
            part = stack(patches)
            kept = {"latents": model.encode(part["images"]), "labels": part["labels"]}
            if style is not None and references is not None:
                kept["references"] = references.choose_for(patches, members, style.references)
            if model.config.counterstain is not None:
                kept["counterstain"] = model.nuclei(part["images"]).half()
            if model.config.context_share:
                kept["context"] = model.training_context(part, 0, members)
            encoded.append(kept)
            advance(len(members))
    whole = {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}

    @lru_cache(maxsize=2)
    def order(turn: int) -> Tensor:
        return torch.randperm(pool, generator=torch_generator(model.seed, "pool", turn))

    def batch(step: int) -> dict[str, Tensor]:
        numbers = range(step * batch_size, (step + 1) * batch_size)
        members = torch.stack([order(n // pool)[n % pool] for n in numbers])
        found = {name: values[members] for name, values in whole.items()}
        return found if references is None else found | references.described(found.pop("references"))

    return batch
