"""The layouts in which other projects publish weights: what each tensor of ours is called there, and in which shape.

* NVlabs/SPADE, a file for each of its three networks. Its spectral norm keeps a weight as ``weight_orig`` with the
  singular vectors ``weight_u`` and ``weight_v``; ours is torch's newer parametrisation of the same three.
* CompVis/latent-diffusion and taming-transformers: VQ (``vq-f4``) and KL (``kl-f8``) first stages, and denoisers
  (``UNetModel``). Attention is made of convolutions of size 1 there and of linear layers in diffusers' networks, and a
  denoiser's queries, keys and values come from one convolution, head by head.

diffusers reads first stages (``convert_ldm_vae_checkpoint``; a test compares it with this), but neither writes them nor
reads these denoisers, so one table of names serves both directions here. Functions raise :class:`MismatchError` where a
file, ``source`` in their messages, is not of the published layout or has parts that our networks lack.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from counterstain.errors import MismatchError
from counterstain.generators.diffusion_config import AutoencoderConfig, DiffusionConfig
from counterstain.generators.spade_config import UPSAMPLINGS

State = Mapping[str, Tensor]
Renaming = tuple[str, str | Callable[[re.Match[str]], str]]  # pattern in a name of ours -> what stands there instead
SpadePart = Literal["generator", "encoder", "discriminator"]

NAMED = 3  # tensors that a message names
FIRST_STAGE_PREFIX = "first_stage_model."  # these three inside a checkpoint of latent diffusion
DENOISER_PREFIX = "model.diffusion_model."
AVERAGED_PREFIX = "model_ema."  # with the dots left out of the names
NOT_OURS = ("loss.perceptual_loss.", "loss.logvar", AVERAGED_PREFIX)  # LPIPS has its own weights; the rest is unused
SPADE_FILES: dict[SpadePart, str] = {
    "generator": "latest_net_G.pth",
    "encoder": "latest_net_E.pth",
    "discriminator": "latest_net_D.pth",
}
_SPADE_MARKS: dict[SpadePart, str] = {
    "generator": "conv_img.weight",
    "encoder": "fc_mu.weight",
    "discriminator": "discriminator_0.model0.0.weight",
}
_STAGE_DISCRIMINATOR = "loss.discriminator.main."


@dataclass(frozen=True)
class Layout:
    """How the tensors of one of our networks are published."""

    renamings: tuple[Renaming, ...]  # applied to a name one after the other
    kernel: tuple[int, ...] = ()  # size of the convolutions that stand for the linear layers of attention
    head_width: int = 0
    """Features of an attention head, where queries, keys and values are one tensor: rows (head, 3, width)."""

    def groups(self, ours: Iterable[str]) -> dict[str, list[str]]:
        """Return the published names, and for each the names of our tensors that it holds."""
        found: dict[str, list[str]] = {}
        for name in sorted(ours, key=lambda name: (".to_k." in name) + 2 * (".to_v." in name)):  # q, k, v in a group
            published = name
            for pattern, replacement in self.renamings:
                published = re.sub(pattern, replacement, published)
            found.setdefault(published, []).append(name)
        return found

    def join(self, parts: Sequence[Tensor], name: str) -> Tensor:
        """Bring our tensors, the first of them called ``name``, into the published shape."""
        if len(parts) > 1:
            by_head = [part.reshape(-1, self.head_width, *part.shape[1:]) for part in parts]
            parts = [torch.stack(by_head, 1).flatten(0, 2)]
        linear = ".attentions." in name and parts[0].ndim == 2
        return parts[0].reshape(*parts[0].shape, *self.kernel) if linear else parts[0]

    def split(self, tensor: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        """Undo :meth:`join`."""
        flat = tensor.flatten(1) if ".attentions." in names[0] and tensor.ndim > 1 else tensor
        if len(names) == 1:
            return [flat]
        by_head = flat.reshape(-1, len(names), self.head_width, *flat.shape[1:])
        return [part.flatten(0, 1) for part in by_head.unbind(1)]


def to_ours(layout: Layout, published: State, expected: State, source: str) -> dict[str, Tensor]:
    """Turn a published state dict into one with the names and shapes of ``expected``, the state dict of our network."""
    groups = layout.groups(expected)
    missing, unknown = sorted(set(groups) - set(published)), sorted(set(published) - set(groups))
    if missing:
        raise MismatchError(f"{source}: lacks {_some(missing)}; it is not of the published layout, or not whole")
    if unknown:
        raise MismatchError(f"{source}: has {_some(unknown)}, which the networks of the published layout do not have")
    state: dict[str, Tensor] = {}
    for theirs, names in groups.items():
        wanted, tensor = layout.join([expected[name] for name in names], names[0]).shape, published[theirs]
        if tensor.shape != wanted:
            raise MismatchError(
                f"{source}: {theirs} is {tuple(tensor.shape)}, expected {tuple(wanted)}; "
                "it does not fit the other tensors or the taxonomy"
            )
        if tensor.is_floating_point() != expected[names[0]].is_floating_point():
            raise MismatchError(f"{source}: {theirs} is {tensor.dtype}, expected {expected[names[0]].dtype}")
        state.update(zip(names, layout.split(tensor, names), strict=True))
    return state


def to_published(layout: Layout, ours: State) -> dict[str, Tensor]:
    """Turn a state dict of ours into a published one."""
    groups = layout.groups(ours)
    return {theirs: layout.join([ours[name] for name in names], names[0]) for theirs, names in groups.items()}


def _shape(state: State, name: str, source: str) -> torch.Size:
    if name not in state:
        raise MismatchError(f"{source}: has no {name}; it is not of the published layout")
    return state[name].shape


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


# SPADE ----------------------------------------------------------------------------------------------------------------

SPADE = Layout(
    (
        (r"parametrizations\.weight\.original$", "weight_orig"),
        (r"parametrizations\.weight\.0\._(u|v)$", r"weight_\1"),
        (r"^layers\.(\d+)", lambda match: f"layer{int(match[1]) + 1}"),
        # Normalised convolutions lie one level deeper than plain ones.
        (r"^discriminators\.(\d+)\.stages\.(\d+)\.0\.(?=weight_)", r"discriminator_\1.model\2.0.0."),
        (r"^discriminators\.(\d+)\.stages\.(\d+)(?:\.0)?\.", r"discriminator_\1.model\2.0."),
    )
)


def spade_part(state: State, source: str) -> SpadePart:
    """Say which of SPADE's three networks a published state dict holds."""
    for part, mark in _SPADE_MARKS.items():
        if mark in state:
            return part
    marks = ", ".join(f"{mark} ({part})" for part, mark in _SPADE_MARKS.items())
    raise MismatchError(f"{source}: is not a network of NVlabs/SPADE: none of {marks} is in it")


def spade_settings(states: Mapping[SpadePart, State], source: str) -> dict[str, Any]:
    """Read ``size_px``, ``channels`` (labels and the edge channel) and settings of ``SpadeConfig`` off the tensors."""
    generator = states["generator"]
    first, width = _shape(generator, "fc.weight", source), _shape(generator, "conv_img.weight", source)[1]
    if len(first) != 2:
        raise MismatchError(f"{source}: was trained without --use_vae, so it takes no style code; it cannot be used")
    hidden, channels = _shape(generator, "head_0.norm_0.mlp_shared.0.weight", source)[:2]
    found = {
        "size_px": math.isqrt(first[0] // (16 * width)) * 2**UPSAMPLINGS,
        "channels": channels,
        "generator_width": width,
        "latent": first[1],
        "hidden": hidden,
        "use_vae": "encoder" in states,
    }
    if "discriminator" in states:
        found["discriminator_width"] = states["discriminator"][_SPADE_MARKS["discriminator"]].shape[0]
    return found


def spade_completed(state: State) -> dict[str, Tensor]:
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


# First stages ---------------------------------------------------------------------------------------------------------


def first_stage_layout(config: AutoencoderConfig) -> Layout:
    """Return the layout of a first stage, for names with ``network.`` and ``discriminator.``."""
    lowest = len(config.widths) - 1
    return Layout(
        (
            (r"^discriminator\.", _STAGE_DISCRIMINATOR),
            (r"^network\.", ""),
            (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
            (r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{lowest - int(match[1])}.block"),
            (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
            (r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{lowest - int(match[1])}.upsample"),
            (r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
            (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
            (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
            (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
            (r"conv_norm_out", "norm_out"),
            (r"conv_shortcut", "nin_shortcut"),
        ),
        kernel=(1, 1),
    )


def first_stage_settings(state: State, source: str) -> dict[str, Any]:
    """Read settings of ``AutoencoderConfig`` off the tensors; ``discriminator_width`` where its patch GAN is there."""
    channels = _shape(state, "encoder.conv_in.weight", source)[0]
    firsts = takewhile(state.__contains__, (f"encoder.down.{i}.block.0.conv1.weight" for i in count()))
    widths = [state[name].shape[0] for name in firsts]
    blocks = takewhile(state.__contains__, (f"encoder.down.0.block.{i}.conv1.weight" for i in count()))
    quantised = "post_quant_conv.weight" in state  # newer ones have no convolution there
    embedding = _shape(state, f"{'post_quant_conv' if quantised else 'decoder.conv_in'}.weight", source)[1]
    latent_channels = state["post_quant_conv.weight"].shape[0] if quantised else embedding
    if latent_channels != embedding:
        raise MismatchError(f"{source}: {latent_channels} latent channels but codes of {embedding}; ours are equal")
    if any(".attn." in name for name in state):
        raise MismatchError(f"{source}: has attention outside the middle block, which our first stages do not have")
    factor = 2 ** (len(widths) - 1)
    if factor not in {2, 4, 8}:
        raise MismatchError(f"{source}: shrinks images {factor} times; expected 2, 4 or 8")
    found: dict[str, Any] = {
        "kind": "vq" if "quantize.embedding.weight" in state else "kl",
        "factor": factor,
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": len(list(blocks)),
        "attention": "encoder.mid.attn_1.q.weight" in state,
        "latent_channels": latent_channels,
        "plain_latents": not quantised,
    }
    if found["kind"] == "vq":
        found["codebook_size"] = state["quantize.embedding.weight"].shape[0]
    if f"{_STAGE_DISCRIMINATOR}0.weight" in state:
        found["discriminator_width"] = state[f"{_STAGE_DISCRIMINATOR}0.weight"].shape[0]
    return found


# Denoisers ------------------------------------------------------------------------------------------------------------


def denoiser_layout(ours: Iterable[str], config: DiffusionConfig) -> Layout:
    """Return the layout of a denoiser, from its settings and the names of our tensors (diffusers' ``UNet2DModel``)."""
    attending = {match[1] for name in ours if (match := re.match(r"up_blocks\.(\d+)\.attentions", name))}
    step = config.blocks + 1  # blocks of one size on the way up, and on the way down with the halving

    def down(match: re.Match[str]) -> str:
        return f"input_blocks.{1 + int(match[1]) * step + int(match[3])}.{int(match[2] == 'attentions')}"

    def up(match: re.Match[str]) -> str:
        return f"output_blocks.{int(match[1]) * step + int(match[3])}.{int(match[2] == 'attentions')}"

    def doubling(match: re.Match[str]) -> str:
        return f"output_blocks.{int(match[1]) * step + config.blocks}.{2 if match[1] in attending else 1}"

    return Layout(
        (
            (r"^time_embedding\.linear_1", "time_embed.0"),
            (r"^time_embedding\.linear_2", "time_embed.2"),
            (r"^conv_in", "input_blocks.0.0"),
            (r"^conv_norm_out", "out.0"),
            (r"^conv_out", "out.2"),
            (r"^mid_block\.resnets\.(\d)", lambda match: f"middle_block.{2 * int(match[1])}"),
            (r"^mid_block\.attentions\.0", "middle_block.1"),
            (r"^down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", down),
            (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{(int(m[1]) + 1) * step}.0.op"),
            (r"^up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", up),
            (r"^up_blocks\.(\d+)\.upsamplers\.0", doubling),
            (r"\.norm1\.", ".in_layers.0."),
            (r"\.conv1\.", ".in_layers.2."),
            (r"\.time_emb_proj\.", ".emb_layers.1."),
            (r"\.norm2\.", ".out_layers.0."),
            (r"\.conv2\.", ".out_layers.3."),
            (r"\.conv_shortcut\.", ".skip_connection."),
            (r"\.group_norm\.", ".norm."),
            (r"\.to_[qkv]\.", ".qkv."),
            (r"\.to_out\.0\.", ".proj_out."),
        ),
        kernel=(1,),
        head_width=max(1, config.channels * config.multipliers[-1] // config.heads),  # the same at every size
    )


def denoiser_settings(state: State, source: str) -> dict[str, Any]:
    """Read ``in_channels``, ``out_channels`` and settings of ``DiffusionConfig`` off the tensors of a denoiser."""
    channels, in_channels = _shape(state, "input_blocks.0.0.weight", source)[:2]
    out_channels = _shape(state, "out.2.weight", source)[0]
    _refuse_other_kinds(state, channels, source)
    scales = _scales(state, source)
    widths = [scale[0][0] for scale in scales]
    lowest = sum(any(attends for _, attends in scale) for scale in scales)
    if lowest and not all(attends for scale in scales[-lowest:] for _, attends in scale):
        raise MismatchError(f"{source}: its attention is not at the lowest scales, where ours would be")
    if widths[0] != channels or any(width % channels for width in widths):
        raise MismatchError(f"{source}: features {widths} are no multiples of {channels} from 1 on")
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": len(scales[0]),
        "attention_scales": lowest,
    }


def averaged_denoiser(state: State, names: Iterable[str], source: str) -> dict[str, Tensor]:
    """Return the moving average of a denoiser, under the denoiser's own names."""
    found = {}
    for name in names:
        stored = AVERAGED_PREFIX + (DENOISER_PREFIX.removeprefix("model.") + name).replace(".", "")
        _shape(state, stored, f"{source} (moving average)")
        found[name] = state[stored]
    return found


def _scales(state: State, source: str) -> list[list[tuple[int, bool]]]:
    """Walk down the input blocks; return scale by scale each block's features and whether it attends."""
    scales: list[list[tuple[int, bool]]] = [[]]
    for number in count(1):
        block = f"input_blocks.{number}"
        if f"{block}.0.op.weight" in state:
            scales.append([])
        elif f"{block}.0.in_layers.0.weight" in state:
            width = state[f"{block}.0.out_layers.3.weight"].shape[0]
            scales[-1].append((width, f"{block}.1.qkv.weight" in state))
        else:
            break
    widths = [[width for width, _ in scale] for scale in scales]
    if len(widths) < 2 or not all(len(scale) == len(widths[0]) and len(set(scale)) == 1 for scale in widths):
        raise MismatchError(f"{source}: expected two or more scales with equally many blocks, found features {widths}")
    return scales


def _refuse_other_kinds(state: State, channels: int, source: str) -> None:
    if any(".transformer_blocks." in name for name in state):
        raise MismatchError(f"{source}: has cross-attention; ours takes its condition with the latents")
    if "label_emb.weight" in state:
        raise MismatchError(f"{source}: is conditioned on classes; ours takes label masks with the latents")
    first = _shape(state, "input_blocks.1.0.emb_layers.1.weight", source)[0]
    if first != _shape(state, "input_blocks.1.0.out_layers.0.weight", source)[0]:
        raise MismatchError(f"{source}: scales features by the timestep (use_scale_shift_norm), which ours does not")
    if channels % 32:
        raise MismatchError(f"{source}: {channels} features; the published layout has multiples of 32")
