import math

import numpy as np
import published_layouts as published
import pytest
import torch
from torch.nn import functional

from counterstain.errors import MismatchError
from counterstain.generators.networks import ImageEncoder, MultiscaleDiscriminator, SpadeGeneratorNetwork
from counterstain.generators.published_layouts import (
    SPADE,
    spade_completed,
    spade_part,
    spade_settings,
    to_ours,
    to_published,
)

SMALL = {"semantic_nc": 5, "size": 32, "ngf": 4, "z": 6, "hidden": 8}


def elements(layout, *, parameters_only=True):
    buffers = ("_u", "_v", "running_mean", "running_var", "num_batches_tracked")
    return sum(math.prod(shape) for name, shape in layout.items() if not (parameters_only and name.endswith(buffers)))


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def small_generator():
    return SpadeGeneratorNetwork(5, 32, 4, 6, 8)


def loaded(network, state):
    """The network with published weights, which it gives back unchanged."""
    network.load_state_dict(to_ours(SPADE, state, network.state_dict(), "file"))
    back = to_published(SPADE, network.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    return network.eval()


@pytest.mark.parametrize(
    ("layout", "make", "count"),
    [
        (published.spade_generator(), lambda: SpadeGeneratorNetwork(7, 512, 64, 256, 128), 159_484_867),
        (published.spade_encoder(), lambda: ImageEncoder(512, 64, 256), 10_463_424),
        (published.spade_discriminator(), lambda: MultiscaleDiscriminator(10, 64), 5_542_018),
    ],
    ids=["G", "E", "D"],
)
def test_names_shapes_and_numbers_of_the_published_networks_go_there_and_back(layout, make, count):
    with torch.device("meta"):
        network = make()
    assert elements(layout) == count == parameters(network)
    network.load_state_dict(to_ours(SPADE, published.meta(layout), network.state_dict(), "file"), assign=True)
    back = to_published(SPADE, network.state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in back.items()} == layout


# The SPADE block, written out in numpy: x (C, H, W), labels (L, H, W).


def conv(x, weight, bias=None):
    """Correlate with zero padding that keeps the size."""
    out, _, k, _ = weight.shape
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    result = np.zeros((out, *x.shape[1:]))
    for dy in range(k):
        for dx in range(k):
            result += np.einsum("oi,ihw->ohw", weight[:, :, dy, dx], padded[:, dy:, dx:][:, : x.shape[1], : x.shape[2]])
    return result if bias is None else result + bias[:, None, None]


def modulate(p, norm, x, labels):
    mean, variance = p[f"{norm}.param_free_norm.running_mean"], p[f"{norm}.param_free_norm.running_var"]
    normalised = (x - mean[:, None, None]) / np.sqrt(variance[:, None, None] + 1e-5)
    step = labels.shape[1] // x.shape[1]
    hidden = conv(labels[:, ::step, ::step], p[f"{norm}.mlp_shared.0.weight"], p[f"{norm}.mlp_shared.0.bias"])
    hidden = np.maximum(hidden, 0)
    gamma = conv(hidden, p[f"{norm}.mlp_gamma.weight"], p[f"{norm}.mlp_gamma.bias"])
    beta = conv(hidden, p[f"{norm}.mlp_beta.weight"], p[f"{norm}.mlp_beta.bias"])
    return normalised * (1 + gamma) + beta


def normalised_conv(p, name, x):
    weight = p[f"{name}.weight_orig"]
    norm = p[f"{name}.weight_u"] @ weight.reshape(len(weight), -1) @ p[f"{name}.weight_v"]
    return conv(x, weight / norm, p.get(f"{name}.bias"))


def spade_block(p, name, x, labels):
    def leaky(value):
        return np.where(value > 0, value, 0.2 * value)

    learned = f"{name}.conv_s.weight_orig" in p
    short = normalised_conv(p, f"{name}.conv_s", modulate(p, f"{name}.norm_s", x, labels)) if learned else x
    y = normalised_conv(p, f"{name}.conv_0", leaky(modulate(p, f"{name}.norm_0", x, labels)))
    return short + normalised_conv(p, f"{name}.conv_1", leaky(modulate(p, f"{name}.norm_1", y, labels)))


def test_the_generator_of_published_weights_is_the_formula_in_numpy():
    state = published.drawn(published.spade_generator(**SMALL))
    network = loaded(small_generator(), state)
    p = {name: t.double().numpy() for name, t in state.items()}
    rng = np.random.default_rng(0)
    z, labels = rng.standard_normal(6), rng.random((5, 32, 32))
    x = (p["fc.weight"] @ z + p["fc.bias"]).reshape(64, 1, 1)
    for block in ("head_0", "G_middle_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3"):
        x = x if block in {"head_0", "G_middle_1"} else x.repeat(2, 1).repeat(2, 2)
        x = spade_block(p, block, x, labels)
    expected = np.tanh(conv(np.where(x > 0, x, 0.2 * x), p["conv_img.weight"], p["conv_img.bias"]))
    with torch.no_grad():
        found = network.double()(torch.from_numpy(labels)[None], torch.from_numpy(z)[None])[0].numpy()
    assert np.allclose(found, expected, rtol=1e-8, atol=1e-8)


def spectral(state, name):
    weight = state[f"{name}.weight_orig"]
    return weight / (state[f"{name}.weight_u"] @ weight.flatten(1) @ state[f"{name}.weight_v"])


def test_the_encoder_of_published_weights_gives_what_the_formula_gives():
    state = published.drawn(published.spade_encoder(ngf=4, z=6))
    x = images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    for i in range(1, 7):
        x = functional.conv2d(functional.leaky_relu(x, 0.2) if i > 1 else x, spectral(state, f"layer{i}.0"), None, 2, 1)
        x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    flat = functional.leaky_relu(x, 0.2).flatten(1)
    mean, log_variance = (flat @ state[f"{head}.weight"].T + state[f"{head}.bias"] for head in ("fc_mu", "fc_var"))
    with torch.no_grad():
        found = loaded(ImageEncoder(512, 4, 6), state)(images)
    assert torch.allclose(found[0], mean, atol=1e-4)
    assert torch.allclose(found[1], log_variance, atol=1e-4)


def test_the_discriminator_of_published_weights_gives_what_the_formula_gives():
    state = published.drawn(published.spade_discriminator(5, 4))
    images = torch.rand(1, 8, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = loaded(MultiscaleDiscriminator(8, 4), state)(images)
    for scale in (0, 1):
        name = f"discriminator_{scale}"
        x = functional.conv2d(images, state[f"{name}.model0.0.weight"], state[f"{name}.model0.0.bias"], 2, 2)
        x = functional.leaky_relu(x, 0.2)
        for i, stride in ((1, 2), (2, 2), (3, 1)):
            x = functional.conv2d(x, spectral(state, f"{name}.model{i}.0.0"), None, stride, 2)
            x = functional.leaky_relu(functional.instance_norm(x), 0.2)
            assert torch.allclose(found[scale][i], x, atol=1e-4)
        verdict = functional.conv2d(x, state[f"{name}.model4.0.weight"], state[f"{name}.model4.0.bias"], 1, 2)
        assert torch.allclose(found[scale][4], verdict, atol=1e-4)
        images = functional.avg_pool2d(images, 3, 2, 1, count_include_pad=False)


def test_the_networks_are_told_apart_by_what_they_hold():
    layouts = (published.spade_generator(**SMALL), published.spade_encoder(4, 6), published.spade_discriminator(5, 4))
    assert [spade_part(layout, "f") for layout in layouts] == ["generator", "encoder", "discriminator"]
    with pytest.raises(MismatchError, match=r"f: is not a network of NVlabs/SPADE: none of conv_img\.weight"):
        spade_part({"conv1.weight": ()}, "f")


def test_sizes_are_read_off_the_tensors():
    states = {
        "generator": published.drawn(published.spade_generator(5, 64, 4, 6, 8)),
        "discriminator": published.drawn(published.spade_discriminator(5, 12)),
    }
    assert spade_settings(states, "f") == {
        "size_px": 64, "channels": 5, "generator_width": 4, "latent": 6, "hidden": 8, "use_vae": False,
        "discriminator_width": 12,
    }  # fmt: skip


def test_a_generator_without_style_codes_is_refused():
    state = published.drawn(published.spade_generator(**SMALL)) | {"fc.weight": torch.zeros(64, 5, 3, 3)}
    with pytest.raises(MismatchError, match="trained without --use_vae"):
        spade_settings({"generator": state}, "f")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up_4.conv_0.bias": torch.zeros(2)}, r"f: has up_4\.conv_0\.bias, which the networks"),
        ({"up_1.norm_0.mlp_gamma.bias": torch.zeros(5)}, r"mlp_gamma\.bias is \(5,\), expected \(32,\)"),
        ({"fc.bias": None}, r"f: lacks fc\.bias; it is not of the published layout"),
    ],
)
def test_a_tensor_too_many_too_few_or_of_another_size_is_named(change, message):
    state = published.drawn(published.spade_generator(**SMALL)) | change
    given = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(MismatchError, match=message):
        to_ours(SPADE, given, small_generator().state_dict(), "f")


def test_an_old_file_with_the_normalised_weight_in_it_gives_that_weight():
    layout = {"c.weight_orig": (4, 3, 3, 3), "c.weight_u": (4,), "c.bias": (4,)}
    state = published.drawn(layout)
    state["c.weight"] = state["c.weight_orig"] / 1.7
    whole = spade_completed(state)
    assert "c.weight" not in whole
    sigma = whole["c.weight_u"] @ whole["c.weight_orig"].flatten(1) @ whole["c.weight_v"]
    assert sigma.item() == pytest.approx(1.7, rel=1e-5)
