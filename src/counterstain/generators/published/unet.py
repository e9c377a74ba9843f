"""Denoisers as CompVis/latent-diffusion publishes them (``UNetModel`` of its ``openaimodel``).

The forward passes are equal: the same sinusoids of the timestep, 32 groups with an epsilon of 1e-5, nearest-neighbour
doubling. Their attention makes queries, keys and values in one convolution, head by head; so the number of heads, which
the tensors do not tell, decides how they are taken apart.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from counterstain.errors import MismatchError
from counterstain.generators.published.layouts import Rule, State, fused_attention, layer, pointwise, present, shape_of

PREFIX = "model.diffusion_model."  # inside a checkpoint of latent diffusion
AVERAGED_PREFIX = "model_ema."  # its moving average, with the dots left out of the names


def rules(ours: State, *, scales: int, blocks: int, head_width: int) -> list[Rule]:
    """Return the rules for a state dict of diffusers' ``UNet2DModel``.

    Parameters
    ----------
    ours : mapping
    scales : int
        Number of sizes.
    blocks : int
        Residual blocks at each size on the way down.
    head_width : int
        Features of an attention head, the same at every size.
    """
    found = layer("time_embed.0", "time_embedding.linear_1") + layer("time_embed.2", "time_embedding.linear_2")
    found += layer("input_blocks.0.0", "conv_in")
    found += layer("out.0", "conv_norm_out") + layer("out.2", "conv_out")
    found += _block("middle_block.0", "mid_block.resnets.0") + _block("middle_block.2", "mid_block.resnets.1")
    found += _attention("middle_block.1", "mid_block.attentions.0", ours, head_width)
    number = 1
    for scale in range(scales):
        down = f"down_blocks.{scale}"
        for block in range(blocks):
            found += _block(f"input_blocks.{number}.0", f"{down}.resnets.{block}")
            found += _attention(f"input_blocks.{number}.1", f"{down}.attentions.{block}", ours, head_width)
            number += 1
        if scale < scales - 1:
            found += layer(f"input_blocks.{number}.0.op", f"{down}.downsamplers.0.conv")
            number += 1
    for scale in range(scales):
        up = f"up_blocks.{scale}"
        for block in range(blocks + 1):
            place = f"output_blocks.{scale * (blocks + 1) + block}"
            attention = _attention(f"{place}.1", f"{up}.attentions.{block}", ours, head_width)
            found += _block(f"{place}.0", f"{up}.resnets.{block}") + attention
            if block == blocks and scale < scales - 1:
                found += layer(f"{place}.{2 if attention else 1}.conv", f"{up}.upsamplers.0.conv")
    return present(found, ours)


def settings(state: State, source: str) -> dict[str, Any]:
    """Read the sizes of a published denoiser off its tensors.

    Returns
    -------
    dict
        ``in_channels``, ``out_channels`` and settings of ``DiffusionConfig``.

    Raises
    ------
    MismatchError
        It is not of the published layout, or has parts that ours has not.
    """
    channels, in_channels = shape_of(state, "input_blocks.0.0.weight", source)[:2]
    out_channels = shape_of(state, "out.2.weight", source)[0]
    _refuse_other_kinds(state, channels, source)
    widths, attention = _scales(state, source)
    with_attention = [any(scale) for scale in attention]
    lowest = sum(with_attention)
    if lowest and not all(all(scale) for scale in attention[-lowest:]):
        raise MismatchError(f"{source}: its attention is not at the lowest scales, where ours would be")
    if widths[0][0] != channels or any(width % channels for scale in widths for width in scale):
        raise MismatchError(f"{source}: features {[s[0] for s in widths]} are no multiples of {channels} from 1 on")
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "channels": channels,
        "multipliers": [scale[0] // channels for scale in widths],
        "blocks": len(widths[0]),
        "attention_scales": lowest,
    }


def averaged(state: State, names: list[str], source: str) -> dict[str, Tensor]:
    """Return the moving average of the denoiser, under the names that the denoiser itself has.

    Raises
    ------
    MismatchError
        The file holds none.
    """
    found = {}
    for name in names:
        stored = AVERAGED_PREFIX + (PREFIX.removeprefix("model.") + name).replace(".", "")
        shape_of(state, stored, f"{source} (moving average)")
        found[name] = state[stored]
    return found


def _scales(state: State, source: str) -> tuple[list[list[int]], list[list[bool]]]:
    """Walk down the input blocks; return each scale's features and whether there is attention, block by block."""
    widths: list[list[int]] = [[]]
    attention: list[list[bool]] = [[]]
    number = 1
    while f"input_blocks.{number}.0.in_layers.0.weight" in state or f"input_blocks.{number}.0.op.weight" in state:
        if f"input_blocks.{number}.0.op.weight" in state:
            widths.append([])
            attention.append([])
        else:
            widths[-1].append(state[f"input_blocks.{number}.0.out_layers.3.weight"].shape[0])
            attention[-1].append(f"input_blocks.{number}.1.qkv.weight" in state)
        number += 1
    if len(widths) < 2 or not all(len(scale) == len(widths[0]) and len(set(scale)) == 1 for scale in widths):
        raise MismatchError(f"{source}: expected two or more scales with equally many blocks, found features {widths}")
    return widths, attention


def _refuse_other_kinds(state: State, channels: int, source: str) -> None:
    if any(".transformer_blocks." in name for name in state):
        raise MismatchError(f"{source}: has cross-attention; ours takes its condition with the latents")
    if "label_emb.weight" in state:
        raise MismatchError(f"{source}: is conditioned on classes; ours takes label masks with the latents")
    first = shape_of(state, "input_blocks.1.0.emb_layers.1.weight", source)[0]
    if first != shape_of(state, "input_blocks.1.0.out_layers.0.weight", source)[0]:
        raise MismatchError(f"{source}: scales features by the timestep (use_scale_shift_norm), which ours does not")
    if channels % 32:
        raise MismatchError(f"{source}: {channels} features; the published layout has multiples of 32")


def _block(published: str, ours: str) -> list[Rule]:
    names = (
        ("in_layers.0", "norm1"),
        ("in_layers.2", "conv1"),
        ("emb_layers.1", "time_emb_proj"),
        ("out_layers.0", "norm2"),
        ("out_layers.3", "conv2"),
        ("skip_connection", "conv_shortcut"),
    )
    return [rule for theirs, name in names for rule in layer(f"{published}.{theirs}", f"{ours}.{name}")]


def _attention(published: str, ours: str, state: State, head_width: int) -> list[Rule]:
    query = state.get(f"{ours}.to_q.weight")
    if query is None:
        return []
    rules = layer(f"{published}.norm", f"{ours}.group_norm")
    rules += fused_attention(f"{published}.qkv", ours, query.shape[0] // head_width)
    return rules + pointwise(f"{published}.proj_out", f"{ours}.to_out.0", 1)
