"""Upkeep of a codebook: how often each code is used, codes as moving averages, dead codes revived.

Shapes: B = batch, K = codes, z = latent channels, h, w = rows and columns of the latents, n = B·h·w.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

SMOOTHING = 1e-5  # of the usage, so that a code without latents is not divided by 0


class CodebookUpkeep(nn.Module):
    """What is known about the use of each code, and what is done about it after a training step.

    Parameters
    ----------
    codes : (K, z) tensor
        The codebook at the start.
    decay : float
        Of the moving averages.
    averaged : bool
        Whether codes are moving averages of the latents that chose them (van den Oord et al. 2017, appendix A.1).
    revive_below : float, optional
        Codes used less often than this share of 1 / K are set to latents of the batch (Dhariwal et al. 2020, section
        3.1, with a threshold relative to the fair share); None = never.

    Attributes
    ----------
    usage : (K,) tensor
        Moving average of K · (share of the latents that chose a code): 1 = as often as all others.
    """

    usage: Tensor
    sums: Tensor

    def __init__(self, codes: Tensor, decay: float, *, averaged: bool, revive_below: float | None) -> None:
        super().__init__()
        self.decay, self.averaged, self.revive_below = decay, averaged, revive_below
        self.register_buffer("usage", torch.ones(len(codes), device=codes.device))
        self.register_buffer("sums", codes.detach().clone())

    @torch.no_grad()
    def restart(self, codes: Tensor) -> None:
        """Begin anew from other codes, (K, z), each as if it had been used as often as all others."""
        self.usage.fill_(1.0)
        self.sums.copy_(codes)

    @torch.no_grad()
    def update(self, codebook: Tensor, latents: Tensor, chosen: Tensor, generator: torch.Generator) -> int:
        """Change ``codebook`` (K, z) in place after a step; return how many codes were revived.

        Parameters
        ----------
        latents : (B, z, h, w) tensor
        chosen : (n,) integer tensor
            The code of each latent, in the order B, h, w.
        generator : torch.Generator
            Picks the latents that revived codes are set to.
        """
        flat = latents.detach().float().movedim(1, -1).flatten(0, -2)  # (n, z)
        counts, sums = _tally(flat, chosen.flatten(), len(codebook))
        total = _over_all_devices(torch.tensor(float(len(flat)), device=flat.device))
        share = len(codebook) / total
        self.usage.lerp_(_over_all_devices(counts) * share, 1 - self.decay)
        self.sums.lerp_(_over_all_devices(sums) * share, 1 - self.decay)
        if self.averaged:
            smooth = (self.usage + SMOOTHING) / (1 + SMOOTHING)
            codebook.copy_(self.sums / smooth[:, None])
        return 0 if self.revive_below is None else self._revive(codebook, flat, self.revive_below, generator)

    def _revive(self, codebook: Tensor, latents: Tensor, threshold: float, generator: torch.Generator) -> int:
        dead = (self.usage < threshold).nonzero().flatten()
        if not len(dead):
            return 0
        picked = torch.randint(len(latents), (len(dead),), generator=generator).to(latents.device)
        fresh = latents[picked]
        if distributed.is_available() and distributed.is_initialized():
            distributed.broadcast(fresh, 0)  # the latents differ from device to device
        codebook[dead] = fresh.to(codebook.dtype)
        self.sums[dead] = fresh
        self.usage[dead] = 1.0  # time to be chosen before they are judged again
        return len(dead)


def usage_of(chosen: Tensor, size: int) -> tuple[float, float]:
    """Return the share of ``size`` codes that were chosen at all, and their perplexity.

    The perplexity is the exponential of the entropy of the choices: as many codes, used equally, would do.
    """
    counts = torch.bincount(chosen.flatten().cpu(), minlength=size).double()
    shares = counts[counts > 0] / counts.sum()
    return len(shares) / size, float(torch.exp(-(shares * shares.log()).sum()))


def _tally(latents: Tensor, chosen: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return how many latents chose each code, (K,), and their sums, (K, z)."""
    counts = torch.bincount(chosen, minlength=size).to(latents.dtype)
    sums = torch.zeros(size, latents.shape[1], dtype=latents.dtype, device=latents.device)
    return counts, sums.index_add_(0, chosen, latents)


def _over_all_devices(tensor: Tensor) -> Tensor:
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor
