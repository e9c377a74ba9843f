"""The layouts that NVlabs/SPADE and CompVis publish: names, shapes and, as plain formulas, the forward passes.

A layout is a dict of names to shapes. ``drawn`` fills one with random numbers.
"""

import math

import torch
from torch.nn import functional


def drawn(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in layout.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(3)
        elif name.endswith("running_var"):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "norm_out.weight")):
            state[name] = 1 + 0.1 * torch.randn(shape, generator=generator)
        else:
            fan = max(1, math.prod(shape[1:]))
            state[name] = torch.randn(shape, generator=generator) / math.sqrt(fan)
    return state


# NVlabs/SPADE ---------------------------------------------------------------------------------------------------------


def spectral(layout, name, out, into, kernel, *, bias):
    layout[f"{name}.weight_orig"] = (out, into, kernel, kernel)
    layout[f"{name}.weight_u"] = (out,)
    layout[f"{name}.weight_v"] = (into * kernel * kernel,)
    if bias:
        layout[f"{name}.bias"] = (out,)


def plain(layout, name, *shape):
    layout[f"{name}.weight"] = shape
    layout[f"{name}.bias"] = shape[:1]


def spade_generator(semantic_nc=7, size=512, ngf=64, z=256, hidden=128):
    layout = {}
    plain(layout, "fc", 16 * ngf * (size // 32) ** 2, z)
    blocks = {"head_0": (16, 16), "G_middle_0": (16, 16), "G_middle_1": (16, 16)}
    blocks |= {"up_0": (16, 8), "up_1": (8, 4), "up_2": (4, 2), "up_3": (2, 1)}
    for block, multiples in blocks.items():
        fin, fout = (m * ngf for m in multiples)
        middle = min(fin, fout)
        spectral(layout, f"{block}.conv_0", middle, fin, 3, bias=True)
        spectral(layout, f"{block}.conv_1", fout, middle, 3, bias=True)
        norms = {"norm_0": fin, "norm_1": middle}
        if fin != fout:
            spectral(layout, f"{block}.conv_s", fout, fin, 1, bias=False)
            norms["norm_s"] = fin
        for norm, features in norms.items():
            layout[f"{block}.{norm}.param_free_norm.running_mean"] = (features,)
            layout[f"{block}.{norm}.param_free_norm.running_var"] = (features,)
            layout[f"{block}.{norm}.param_free_norm.num_batches_tracked"] = ()
            plain(layout, f"{block}.{norm}.mlp_shared.0", hidden, semantic_nc, 3, 3)
            plain(layout, f"{block}.{norm}.mlp_gamma", features, hidden, 3, 3)
            plain(layout, f"{block}.{norm}.mlp_beta", features, hidden, 3, 3)
    plain(layout, "conv_img", 3, ngf, 3, 3)
    return layout


def spade_encoder(ngf=64, z=256, layers=6):
    layout = {}
    features = [3, ngf, 2 * ngf, 4 * ngf, 8 * ngf, 8 * ngf, 8 * ngf]
    for i in range(1, layers + 1):
        spectral(layout, f"layer{i}.0", features[i], features[i - 1], 3, bias=False)
    plain(layout, "fc_mu", z, features[layers] * 16)
    plain(layout, "fc_var", z, features[layers] * 16)
    return layout


def spade_discriminator(semantic_nc=7, ndf=64):
    layout = {}
    for scale in ("discriminator_0", "discriminator_1"):
        plain(layout, f"{scale}.model0.0", ndf, semantic_nc + 3, 4, 4)
        for i, (fin, fout) in enumerate(((ndf, 2 * ndf), (2 * ndf, 4 * ndf), (4 * ndf, 8 * ndf)), start=1):
            spectral(layout, f"{scale}.model{i}.0.0", fout, fin, 4, bias=False)
        plain(layout, f"{scale}.model4.0", 1, 8 * ndf, 4, 4)
    return layout


# CompVis, first stages ------------------------------------------------------------------------------------------------


def compvis_block(layout, name, fin, fout, short="nin_shortcut"):
    plain(layout, f"{name}.norm1", fin)
    plain(layout, f"{name}.conv1", fout, fin, 3, 3)
    plain(layout, f"{name}.norm2", fout)
    plain(layout, f"{name}.conv2", fout, fout, 3, 3)
    if fin != fout:
        plain(layout, f"{name}.{short}", fout, fin, 1, 1)


def compvis_middle(layout, name, width, *, attention):
    compvis_block(layout, f"{name}.block_1", width, width)
    if attention:
        plain(layout, f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            plain(layout, f"{name}.attn_1.{part}", width, width, 1, 1)
    compvis_block(layout, f"{name}.block_2", width, width)


def first_stage(ch, ch_mult, z, *, n_embed=None, attention=True, blocks=2, ndf=None):
    """``vq-f4``: ch 128, ch_mult (1, 2, 4), z 3, n_embed 8192; without n_embed the KL variant."""
    layout = {}
    widths = [ch * m for m in ch_mult]
    moments = z if n_embed else 2 * z
    plain(layout, "encoder.conv_in", ch, 3, 3, 3)
    fin = ch
    for i, width in enumerate(widths):
        for j in range(blocks):
            compvis_block(layout, f"encoder.down.{i}.block.{j}", fin, width)
            fin = width
        if i < len(widths) - 1:
            plain(layout, f"encoder.down.{i}.downsample.conv", width, width, 3, 3)
    compvis_middle(layout, "encoder.mid", fin, attention=attention)
    plain(layout, "encoder.norm_out", fin)
    plain(layout, "encoder.conv_out", moments, fin, 3, 3)
    plain(layout, "decoder.conv_in", fin, z, 3, 3)
    compvis_middle(layout, "decoder.mid", fin, attention=attention)
    for i in reversed(range(len(widths))):
        for j in range(blocks + 1):
            compvis_block(layout, f"decoder.up.{i}.block.{j}", fin, widths[i])
            fin = widths[i]
        if i:
            plain(layout, f"decoder.up.{i}.upsample.conv", fin, fin, 3, 3)
    plain(layout, "decoder.norm_out", fin)
    plain(layout, "decoder.conv_out", 3, fin, 3, 3)
    plain(layout, "quant_conv", moments, moments, 1, 1)
    plain(layout, "post_quant_conv", z, z, 1, 1)
    if n_embed:
        layout["quantize.embedding.weight"] = (n_embed, z)
    if ndf:
        _patch_discriminator(layout, ndf)
    return layout


def _patch_discriminator(layout, ndf):
    main = "loss.discriminator.main"
    plain(layout, f"{main}.0", ndf, 3, 4, 4)
    for conv, fin, fout in ((2, ndf, 2 * ndf), (5, 2 * ndf, 4 * ndf), (8, 4 * ndf, 8 * ndf)):
        layout[f"{main}.{conv}.weight"] = (fout, fin, 4, 4)
        plain(layout, f"{main}.{conv + 1}", fout)
        layout[f"{main}.{conv + 1}.running_mean"] = (fout,)
        layout[f"{main}.{conv + 1}.running_var"] = (fout,)
        layout[f"{main}.{conv + 1}.num_batches_tracked"] = ()
    plain(layout, f"{main}.11", 1, 8 * ndf, 4, 4)


def conv(state, name, x, **settings):
    return functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **settings)


def group_norm(state, name, x, eps):
    return functional.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps)


def run_block(state, name, x):
    h = conv(state, f"{name}.conv1", functional.silu(group_norm(state, f"{name}.norm1", x, 1e-6)), padding=1)
    h = conv(state, f"{name}.conv2", functional.silu(group_norm(state, f"{name}.norm2", h, 1e-6)), padding=1)
    return h + (conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)


def run_middle(state, name, x):
    x = run_block(state, f"{name}.block_1", x)
    if f"{name}.attn_1.q.weight" in state:
        h = group_norm(state, f"{name}.attn_1.norm", x, 1e-6)
        q, k, v = (conv(state, f"{name}.attn_1.{part}", h).flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1]), dim=2)
        h = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
        x = x + conv(state, f"{name}.attn_1.proj_out", h)
    return run_block(state, f"{name}.block_2", x)


def run_encoder(state, x, *, scales, blocks=2):
    x = conv(state, "encoder.conv_in", x, padding=1)
    for i in range(scales):
        for j in range(blocks):
            x = run_block(state, f"encoder.down.{i}.block.{j}", x)
        if i < scales - 1:
            x = conv(state, f"encoder.down.{i}.downsample.conv", functional.pad(x, (0, 1, 0, 1)), stride=2)
    x = run_middle(state, "encoder.mid", x)
    x = conv(state, "encoder.conv_out", functional.silu(group_norm(state, "encoder.norm_out", x, 1e-6)), padding=1)
    return conv(state, "quant_conv", x)


def run_decoder(state, z, *, scales, blocks=2):
    if "quantize.embedding.weight" in state:
        codes = state["quantize.embedding.weight"]
        distances = (z.movedim(1, -1).unsqueeze(-2) - codes).pow(2).sum(-1)
        z = codes[distances.argmin(-1)].movedim(-1, 1)
    x = run_middle(state, "decoder.mid", conv(state, "decoder.conv_in", conv(state, "post_quant_conv", z), padding=1))
    for i in reversed(range(scales)):
        for j in range(blocks + 1):
            x = run_block(state, f"decoder.up.{i}.block.{j}", x)
        if i:
            x = conv(state, f"decoder.up.{i}.upsample.conv", functional.interpolate(x, scale_factor=2.0), padding=1)
    return conv(state, "decoder.conv_out", functional.silu(group_norm(state, "decoder.norm_out", x, 1e-6)), padding=1)


# CompVis, denoisers ---------------------------------------------------------------------------------------------------


def unet_block(layout, name, fin, fout, time):
    plain(layout, f"{name}.in_layers.0", fin)
    plain(layout, f"{name}.in_layers.2", fout, fin, 3, 3)
    plain(layout, f"{name}.emb_layers.1", fout, time)
    plain(layout, f"{name}.out_layers.0", fout)
    plain(layout, f"{name}.out_layers.3", fout, fout, 3, 3)
    if fin != fout:
        plain(layout, f"{name}.skip_connection", fout, fin, 1, 1)


def unet_attention(layout, name, width):
    plain(layout, f"{name}.norm", width)
    plain(layout, f"{name}.qkv", 3 * width, width, 1)
    plain(layout, f"{name}.proj_out", width, width, 1)


def unet(channels, mult, into, out, *, blocks=2, lowest_with_attention=0):
    layout, time = {}, 4 * channels
    plain(layout, "time_embed.0", time, channels)
    plain(layout, "time_embed.2", time, time)
    plain(layout, "input_blocks.0.0", channels, into, 3, 3)
    skips, width, number = [channels], channels, 1
    attends = [len(mult) - i <= lowest_with_attention for i in range(len(mult))]
    for i, m in enumerate(mult):
        for _ in range(blocks):
            unet_block(layout, f"input_blocks.{number}.0", width, m * channels, time)
            width = m * channels
            if attends[i]:
                unet_attention(layout, f"input_blocks.{number}.1", width)
            skips.append(width)
            number += 1
        if i < len(mult) - 1:
            plain(layout, f"input_blocks.{number}.0.op", width, width, 3, 3)
            skips.append(width)
            number += 1
    unet_block(layout, "middle_block.0", width, width, time)
    unet_attention(layout, "middle_block.1", width)
    unet_block(layout, "middle_block.2", width, width, time)
    number = 0
    for i in reversed(range(len(mult))):
        for j in range(blocks + 1):
            unet_block(layout, f"output_blocks.{number}.0", width + skips.pop(), mult[i] * channels, time)
            width = mult[i] * channels
            if attends[i]:
                unet_attention(layout, f"output_blocks.{number}.1", width)
            if i and j == blocks:
                plain(layout, f"output_blocks.{number}.{2 if attends[i] else 1}.conv", width, width, 3, 3)
            number += 1
    plain(layout, "out.0", channels)
    plain(layout, "out.2", out, channels, 3, 3)
    return layout


def betas(start=0.0015, end=0.0205, steps=1000):
    """The square of a line, as CompVis computes it."""
    return (torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2).float()


def ddim(denoise, noise, betas, steps):
    """Draw latents by DDIM without fresh noise, on CompVis' uniform timesteps."""
    alphas = (1 - betas.double()).cumprod(0)
    times = range(1, len(betas), len(betas) // steps)
    before, x = [alphas[0], *(alphas[t] for t in times[:-1])], noise
    for t, previous in reversed(list(zip(times, before, strict=True))):
        predicted = denoise(x, torch.full((len(x),), t))
        clean = (x - (1 - alphas[t]).sqrt() * predicted) / alphas[t].sqrt()
        x = (previous.sqrt() * clean + (1 - previous).sqrt() * predicted).float()
    return x


def linear(state, name, x):
    return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def run_unet_block(state, name, x, time):
    h = conv(
        state, f"{name}.in_layers.2", functional.silu(group_norm(state, f"{name}.in_layers.0", x, 1e-5)), padding=1
    )
    h = h + linear(state, f"{name}.emb_layers.1", functional.silu(time))[:, :, None, None]
    h = conv(
        state, f"{name}.out_layers.3", functional.silu(group_norm(state, f"{name}.out_layers.0", h, 1e-5)), padding=1
    )
    return h + (conv(state, f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in state else x)


def run_unet_attention(state, name, x, head_width):
    tokens = group_norm(state, f"{name}.norm", x, 1e-5).flatten(2)
    qkv = functional.conv1d(tokens, state[f"{name}.qkv.weight"], state[f"{name}.qkv.bias"])
    heads = []
    for head in qkv.split(3 * head_width, dim=1):
        q, k, v = head.split(head_width, dim=1)
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(head_width), dim=-1)
        heads.append(torch.einsum("bts,bcs->bct", weights, v))
    h = functional.conv1d(torch.cat(heads, 1), state[f"{name}.proj_out.weight"], state[f"{name}.proj_out.bias"])
    return x + h.reshape(x.shape)


def run_unet(state, x, timesteps, *, channels, mult, head_width, blocks=2):
    half = channels // 2
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
    time = linear(state, "time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1))
    time = linear(state, "time_embed.2", functional.silu(time))
    x = conv(state, "input_blocks.0.0", x, padding=1)
    skips, number = [x], 1
    for i in range(len(mult)):
        for _ in range(blocks):
            x = run_unet_block(state, f"input_blocks.{number}.0", x, time)
            if f"input_blocks.{number}.1.qkv.weight" in state:
                x = run_unet_attention(state, f"input_blocks.{number}.1", x, head_width)
            skips.append(x)
            number += 1
        if i < len(mult) - 1:
            x = conv(state, f"input_blocks.{number}.0.op", x, stride=2, padding=1)
            skips.append(x)
            number += 1
    x = run_unet_block(state, "middle_block.0", x, time)
    x = run_unet_attention(state, "middle_block.1", x, head_width)
    x = run_unet_block(state, "middle_block.2", x, time)
    for number in range(len(mult) * (blocks + 1)):
        name = f"output_blocks.{number}"
        x = run_unet_block(state, f"{name}.0", torch.cat([x, skips.pop()], dim=1), time)
        if f"{name}.1.qkv.weight" in state:
            x = run_unet_attention(state, f"{name}.1", x, head_width)
        up = next((f"{name}.{i}.conv" for i in (1, 2) if f"{name}.{i}.conv.weight" in state), None)
        if up:
            x = conv(state, up, functional.interpolate(x, scale_factor=2.0), padding=1)
    return conv(state, "out.2", functional.silu(group_norm(state, "out.0", x, 1e-5)), padding=1)


def meta(layout):
    """Tensors of a layout without memory; batch norm counts in whole numbers."""
    kinds = {name: torch.int64 if name.endswith("num_batches_tracked") else torch.float32 for name in layout}
    return {name: torch.empty(shape, device="meta", dtype=kinds[name]) for name, shape in layout.items()}
