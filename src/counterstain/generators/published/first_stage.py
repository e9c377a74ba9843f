"""First stages as CompVis/latent-diffusion and taming-transformers publish them: VQ (``vq-f4``) and KL (``kl-f8``).

The forward passes are equal: both pad by one row and column at the far side before they halve, attend with one head
in the middle block, and normalise 32 groups with an epsilon of 1e-6. Their attention is made of 1 x 1 convolutions,
ours of linear layers.
"""

from __future__ import annotations

from typing import Any

from counterstain.errors import MismatchError
from counterstain.generators.published.layouts import Rule, State, layer, pointwise, present, same, shape_of

PREFIX = "first_stage_model."  # inside a checkpoint of latent diffusion
NOT_OURS = (
    "loss.perceptual_loss.",
    "loss.logvar",
    "model_ema.",
)  # LPIPS comes with its own weights; the rest is unused
_DISCRIMINATOR = "loss.discriminator.main."


def rules(ours: State, scales: int, blocks: int) -> list[Rule]:
    """Return the rules for a state dict of ours with the prefixes ``network.`` and ``discriminator.``."""
    found = [same("quantize.embedding.weight", "network.quantize.embedding.weight")]
    found += layer("quant_conv", "network.quant_conv") + layer("post_quant_conv", "network.post_quant_conv")
    for side in ("encoder", "decoder"):
        ours_side = f"network.{side}"
        found += layer(f"{side}.conv_in", f"{ours_side}.conv_in") + layer(f"{side}.conv_out", f"{ours_side}.conv_out")
        found += layer(f"{side}.norm_out", f"{ours_side}.conv_norm_out")
        found += _middle(f"{side}.mid", f"{ours_side}.mid_block")
    for scale in range(scales):
        down, up = f"network.encoder.down_blocks.{scale}", f"network.decoder.up_blocks.{scales - 1 - scale}"
        for block in range(blocks):
            found += _block(f"encoder.down.{scale}.block.{block}", f"{down}.resnets.{block}")
        for block in range(blocks + 1):
            found += _block(f"decoder.up.{scale}.block.{block}", f"{up}.resnets.{block}")
        found += layer(f"encoder.down.{scale}.downsample.conv", f"{down}.downsamplers.0.conv")
        found += layer(f"decoder.up.{scale}.upsample.conv", f"{up}.upsamplers.0.conv")
    found += [
        same(_DISCRIMINATOR + name.removeprefix("discriminator."), name)
        for name in ours
        if name.startswith("discriminator.")
    ]
    return present(found, ours)


def settings(state: State, source: str) -> dict[str, Any]:
    """Read the sizes of a published first stage off its tensors, as settings of ``AutoencoderConfig``.

    Raises
    ------
    MismatchError
        It is not of the published layout, or has parts that ours has not.
    """
    channels = shape_of(state, "encoder.conv_in.weight", source)[0]
    scales = _count(state, "encoder.down.{}.block.0.conv1.weight")
    widths = [shape_of(state, f"encoder.down.{i}.block.0.conv1.weight", source)[0] for i in range(scales)]
    kind = "vq" if "quantize.embedding.weight" in state else "kl"
    latent_channels, embedding = shape_of(state, "post_quant_conv.weight", source)[:2]
    if latent_channels != embedding:
        raise MismatchError(f"{source}: {latent_channels} latent channels but codes of {embedding}; ours are equal")
    if any(".attn." in name for name in state):
        raise MismatchError(f"{source}: has attention outside the middle block, which our first stages do not have")
    if scales not in {2, 3, 4}:
        raise MismatchError(f"{source}: shrinks images {2 ** (scales - 1)} times; expected 2, 4 or 8")
    found: dict[str, Any] = {
        "kind": kind,
        "factor": 2 ** (scales - 1),
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": _count(state, "encoder.down.0.block.{}.conv1.weight"),
        "attention": "encoder.mid.attn_1.q.weight" in state,
        "latent_channels": latent_channels,
    }
    if kind == "vq":
        found["codebook_size"] = state["quantize.embedding.weight"].shape[0]
    first_of_discriminator = state.get(f"{_DISCRIMINATOR}0.weight")
    if first_of_discriminator is not None:
        found["discriminator_width"] = first_of_discriminator.shape[0]
    return found


def has_discriminator(state: State) -> bool:
    """Whether the weights of the patch GAN are there as well."""
    return f"{_DISCRIMINATOR}0.weight" in state


def _count(state: State, pattern: str) -> int:
    number = 0
    while pattern.format(number) in state:
        number += 1
    return number


def _block(published: str, ours: str) -> list[Rule]:
    names = (("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"))
    rules = [rule for a, b in names for rule in layer(f"{published}.{a}", f"{ours}.{b}")]
    return rules + layer(f"{published}.nin_shortcut", f"{ours}.conv_shortcut")


def _middle(published: str, ours: str) -> list[Rule]:
    attention, ours_attention = f"{published}.attn_1", f"{ours}.attentions.0"
    rules = _block(f"{published}.block_1", f"{ours}.resnets.0") + _block(f"{published}.block_2", f"{ours}.resnets.1")
    rules += layer(f"{attention}.norm", f"{ours_attention}.group_norm")
    for theirs, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        rules += pointwise(f"{attention}.{theirs}", f"{ours_attention}.{name}", 2)
    return rules
