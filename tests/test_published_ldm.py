import math

import published_layouts as published
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from counterstain.errors import MismatchError
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.diffusion import build_denoiser
from counterstain.generators.diffusion_config import AutoencoderConfig, DiffusionConfig
from counterstain.generators.published_layouts import (
    averaged_denoiser,
    denoiser_layout,
    denoiser_settings,
    first_stage_layout,
    first_stage_settings,
    to_ours,
    to_published,
)
from counterstain.training_config import TrainingConfig

ONE = TrainingConfig(steps=1, batch_size=2)


def built(layout, device):
    """Our first stage for a layout, and how it is published."""
    found = first_stage_settings(published.meta(layout), "f")
    judged = "discriminator_width" in found
    config = AutoencoderConfig(training=ONE, lpips_weight=0, adversarial_weight=float(judged), **found)
    with torch.device(device):
        model = Autoencoder(config, 32).eval()
    return model, first_stage_layout(config)


def built_denoiser(layout, device, heads=8):
    found = denoiser_settings(published.meta(layout), "f")
    into, out = found.pop("in_channels"), found.pop("out_channels")
    config = DiffusionConfig(training=ONE, heads=heads, **found)
    with torch.device(device):
        network = build_denoiser(config, out, into - out).eval()
    return network, denoiser_layout(network.state_dict(), config)


@pytest.mark.parametrize(
    ("layout", "build", "parameters"),
    [
        (published.first_stage(128, (1, 2, 4), 3, n_embed=8192, ndf=64), built, {}),
        (
            published.first_stage(32, (1, 2, 4), 3, n_embed=8192, attention=False),
            built,
            {"encoder.": 1_337_059, "decoder.": 2_002_243},
        ),
        (published.first_stage(128, (1, 2, 4, 4), 4, ndf=64), built, {}),
        (published.unet(32, (1, 4, 8), 9, 3), built_denoiser, {"": 13_472_835}),
        (published.unet(64, (1, 4, 8), 9, 3), built_denoiser, {"": 53_835_907}),
        (published.unet(32, (1, 2, 4), 9, 3, lowest_with_attention=2), built_denoiser, {}),
    ],
    ids=["vq-f4", "authors' vq-f4", "kl-f8", "authors', 32", "authors', 64", "with attention"],
)
def test_names_shapes_and_numbers_of_published_networks_go_there_and_back(layout, build, parameters):
    network, how = build(layout, "meta")
    network.load_state_dict(to_ours(how, published.meta(layout), network.state_dict(), "f"), assign=True)
    back = {name: tuple(tensor.shape) for name, tensor in to_published(how, network.state_dict()).items()}
    assert back == layout
    for prefix, number in parameters.items():
        assert sum(math.prod(shape) for name, shape in layout.items() if name.startswith(prefix)) == number


@pytest.mark.parametrize("n_embed", [50, None], ids=["vq", "kl"])
def test_first_stages_become_what_diffusers_makes_of_them(n_embed):
    state = published.drawn(published.first_stage(32, (1, 2, 2), 4, n_embed=n_embed))
    model, how = built({name: t.shape for name, t in state.items()}, "cpu")
    ours = to_ours(how, state, model.state_dict(), "f")
    found = {name.removeprefix("network."): tensor for name, tensor in ours.items()}
    found.pop("quantize.embedding.weight", None)  # which its converter does not know
    expected = convert_ldm_vae_checkpoint(state, dict.fromkeys(("down_block_types", "up_block_types"), range(3)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    "arguments",
    [
        {"ch": 32, "ch_mult": (1, 2, 4), "z": 3, "n_embed": 50, "attention": False},
        {"ch": 32, "ch_mult": (1, 2), "z": 3, "n_embed": 50, "blocks": 1, "ndf": 4},
        {"ch": 32, "ch_mult": (1, 2, 2, 2), "z": 4, "blocks": 1},
    ],
    ids=["vq without attention", "vq", "kl"],
)
def test_first_stages_of_published_weights_give_what_the_formula_gives(arguments):
    state = published.drawn(published.first_stage(**arguments))
    model, how = built({name: t.shape for name, t in state.items()}, "cpu")
    model.load_state_dict(to_ours(how, state, model.state_dict(), "f"))
    back = to_published(how, model.state_dict())
    assert all(torch.equal(back[name], state[name]) for name in state)

    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    sizes = {"scales": len(arguments["ch_mult"]), "blocks": arguments.get("blocks", 2)}
    with torch.no_grad():
        latents = published.run_encoder(state, images, **sizes)[:, : arguments["z"]]
        assert torch.allclose(model.encode(images), latents, atol=1e-4)
        assert torch.allclose(model.decode(latents), published.run_decoder(state, latents, **sizes), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.down.1.attn.0.norm.weight": (64,)}, "has attention outside the middle block"),
        ({"encoder.conv_in.weight": None}, r"f: has no encoder\.conv_in\.weight; it is not of the published layout"),
        ({"post_quant_conv.weight": (3, 5, 1, 1)}, "3 latent channels but codes of 5"),
    ],
)
def test_a_first_stage_that_is_not_ours_is_refused(change, message):
    layout = published.first_stage(32, (1, 2, 4), 3, n_embed=9) | change
    with pytest.raises(MismatchError, match=message):
        first_stage_settings(published.meta({name: shape for name, shape in layout.items() if shape is not None}), "f")


@pytest.mark.parametrize("lowest", [0, 2])
def test_denoisers_of_published_weights_give_what_the_formula_gives(lowest):
    mult, blocks = (1, 2, 2), 1
    layout = published.unet(32, mult, 9, 3, blocks=blocks, lowest_with_attention=lowest)
    state = published.drawn(layout)
    network, how = built_denoiser(layout, "cpu", heads=4)
    network.load_state_dict(to_ours(how, state, network.state_dict(), "f"))
    back = to_published(how, network.state_dict())
    assert all(torch.equal(back[name], state[name]) for name in state)

    x, times = torch.randn(2, 9, 16, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([3, 941])
    with torch.no_grad():
        expected = published.run_unet(state, x, times, channels=32, mult=mult, head_width=16, blocks=blocks)
        assert torch.allclose(network(x, times).sample, expected, atol=1e-4)


def test_the_moving_average_is_found_under_its_names_without_dots():
    average = torch.ones(2)
    state = {"model_ema.diffusion_modelout2bias": average, "model_ema.decay": torch.zeros(())}
    assert averaged_denoiser(state, ["out.2.bias"], "f")["out.2.bias"] is average
    with pytest.raises(MismatchError, match="moving average"):
        averaged_denoiser({}, ["out.2.bias"], "f")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_blocks.1.1.transformer_blocks.0.norm1.weight": (32,)}, "has cross-attention"),
        ({"label_emb.weight": (10, 128)}, "is conditioned on classes"),
        ({"input_blocks.1.0.emb_layers.1.weight": (64, 128)}, "use_scale_shift_norm"),
        ({"input_blocks.1.1.qkv.weight": (96, 32, 1)}, "attention is not at the lowest scales"),
        ({"input_blocks.0.0.weight": None}, "it is not of the published layout"),
    ],
)
def test_a_denoiser_that_is_not_ours_is_refused(change, message):
    layout = published.unet(32, (1, 2, 4), 9, 3) | change
    with pytest.raises(MismatchError, match=message):
        denoiser_settings(published.meta({name: shape for name, shape in layout.items() if shape is not None}), "f")
