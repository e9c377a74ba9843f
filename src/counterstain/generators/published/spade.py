"""SPADE's weights as NVlabs publishes them: ``latest_net_G.pth``, ``latest_net_E.pth`` and ``latest_net_D.pth``.

Their spectral norm keeps a weight as ``weight_orig`` with its singular vectors ``weight_u`` and ``weight_v``; ours is
torch's newer parametrisation, which holds the same three under other names.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import torch
from torch.nn import functional

from counterstain.errors import MismatchError
from counterstain.generators.published.layouts import Rule, State, same, shape_of
from counterstain.generators.spade_config import UPSAMPLINGS

Part = Literal["generator", "encoder", "discriminator"]
FILES: dict[Part, str] = {
    "generator": "latest_net_G.pth",
    "encoder": "latest_net_E.pth",
    "discriminator": "latest_net_D.pth",
}
_MARKS: dict[Part, str] = {
    "generator": "conv_img.weight",
    "encoder": "fc_mu.weight",
    "discriminator": "discriminator_0.model0.0.weight",
}
_RENAMED = (  # ours -> published
    (r"parametrizations\.weight\.original$", "weight_orig"),
    (r"parametrizations\.weight\.0\._(u|v)$", r"weight_\1"),
    (r"^layers\.(\d+)", lambda match: f"layer{int(match[1]) + 1}"),
    # Normalised convolutions lie one level deeper than plain ones.
    (r"^discriminators\.(\d+)\.stages\.(\d+)\.0\.(?=weight_)", r"discriminator_\1.model\2.0.0."),
    (r"^discriminators\.(\d+)\.stages\.(\d+)(?:\.0)?\.", r"discriminator_\1.model\2.0."),
)


def part_of(state: State, source: str) -> Part:
    """Say which of the three networks a published state dict holds.

    Raises
    ------
    MismatchError
        None of them.
    """
    for part, mark in _MARKS.items():
        if mark in state:
            return part
    marks = ", ".join(f"{mark} ({part})" for part, mark in _MARKS.items())
    raise MismatchError(f"{source}: is not a network of NVlabs/SPADE: none of {marks} is in it")


def rules(ours: State) -> list[Rule]:
    """Return the rules for one of our networks, from its state dict."""
    return [same(_published(name), name) for name in ours]


def settings(states: dict[Part, State], sources: dict[Part, str]) -> dict[str, Any]:
    """Read the sizes of the networks off their tensors.

    Returns
    -------
    dict
        ``size_px``, ``channels`` (labels and the edge channel) and settings of ``SpadeConfig``.

    Raises
    ------
    MismatchError
        A network is not of the published layout, or was trained without its VAE.
    """
    generator, source = states["generator"], sources["generator"]
    first, width = shape_of(generator, "fc.weight", source), shape_of(generator, "conv_img.weight", source)[1]
    if len(first) != 2:
        raise MismatchError(f"{source}: was trained without --use_vae, so it takes no style code; it cannot be used")
    hidden, channels = shape_of(generator, "head_0.norm_0.mlp_shared.0.weight", source)[:2]
    found = {
        "size_px": math.isqrt(first[0] // (16 * width)) * 2**UPSAMPLINGS,
        "channels": channels,
        "generator_width": width,
        "latent": first[1],
        "hidden": hidden,
        "use_vae": "encoder" in states,
    }
    if "discriminator" in states:
        found["discriminator_width"] = states["discriminator"][_MARKS["discriminator"]].shape[0]
    return found


def completed(state: State) -> dict[str, torch.Tensor]:
    """Bring a state dict of an old torch up to date, which kept the normalised weight in the place of ``weight_v``."""
    whole = dict(state)
    for name in state:
        stem = name.removesuffix("_orig")
        if name == stem or f"{stem}_v" in state or f"{stem}_u" not in state:
            continue
        matrix, u = state[name].flatten(1), state[f"{stem}_u"]
        v = functional.normalize(matrix.T @ u, dim=0)
        if stem in whole:
            # Of such a length that the division by u·Wv gives the very weight that was kept.
            largest = matrix.abs().argmax()
            norm = matrix.flatten()[largest] / whole.pop(stem).flatten()[largest]
            v = v * (norm / torch.dot(u, matrix @ v))
        whole[f"{stem}_v"] = v
    return whole


def _published(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name
