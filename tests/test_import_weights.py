import numpy as np
import published_layouts as published
import pytest
import torch
from drawn_cohort import HER2
from drawn_requests import drawn_by
from torch.nn import functional

from counterstain.checkpoints import load_checkpoint, read_header, save_checkpoint
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.samplers import fresh_noise
from counterstain.generators.spade import SpadeGenerator
from counterstain.seeding import torch_generator

STAGE = {"ch": 32, "ch_mult": (1, 2), "z": 3, "n_embed": 20, "blocks": 1}
COMMON = ("--taxonomy", "her2", "--mpp", 0.5, "--size-px", 32, "--patients-seen", "none")


def saved(path, state):
    torch.save(state, path)
    return path


@pytest.fixture
def spade_files(tmp_path):
    layouts = {
        "latest_net_G.pth": published.spade_generator(7, 32, 4, 6, 8),
        "latest_net_E.pth": published.spade_encoder(4, 6, layers=3),  # at 32 px it halves three times only
        "latest_net_D.pth": published.spade_discriminator(7, 4),
    }
    return [saved(tmp_path / name, published.drawn(layout)) for name, layout in layouts.items()]


@pytest.fixture
def ldm_file(tmp_path):
    denoiser = published.drawn(published.unet(32, (1, 2), 9, 3, blocks=1))
    averaged = {f"model_ema.diffusion_model{name.replace('.', '')}": t + 1 for name, t in denoiser.items()}
    stage = published.drawn(published.first_stage(**STAGE))
    state = {f"model.diffusion_model.{name}": t for name, t in denoiser.items()} | averaged
    state |= {f"first_stage_model.{name}": t for name, t in stage.items()}
    state |= {"scale_factor": torch.tensor(0.5), "betas": published.betas(), "model_ema.decay": torch.tensor(0.99)}
    return saved(tmp_path / "model.ckpt", {"state_dict": state, "epoch": 3})


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_spade_comes_in_draws_and_goes_out_as_it_came(run, spade_files, tmp_path):
    status, printed, _ = run("import", "weights", *spade_files, "--kind", "spade", "--out", tmp_path / "c", *COMMON)
    assert status == 0
    assert "it counts as trained on no patient of yours" in printed
    generator = SpadeGenerator.load(tmp_path / "c")
    header = generator.header
    assert (header.taxonomy, header.mpp, header.patients_seen) == (HER2, 0.5, ())
    generator.model.config = generator.model.config.model_copy(update={"compute_batch": 1})
    assert drawn_by(generator, np.ones((1, 32, 32), np.uint8), [0]).shape == (1, 32, 32, 3)

    assert run("export", tmp_path / "c", "--format", "weights", "--out", tmp_path / "back")[0] == 0
    for path in spade_files:
        back = torch.load(tmp_path / "back" / path.name, weights_only=True)
        assert equal(back, torch.load(path, weights_only=True))


def test_a_generator_alone_is_enough_to_draw_and_the_patients_it_saw_are_on_record(run, spade_files, tmp_path):
    (tmp_path / "patients.txt").write_text("p0\n\n p1 \n")
    words = ("--kind", "spade", "--out", tmp_path / "c", *COMMON[:-1], tmp_path / "patients.txt")
    assert run("import", "weights", spade_files[0], *words)[0] == 0
    generator = SpadeGenerator.load(tmp_path / "c")
    header = generator.header
    assert generator.model.encoder is None
    assert header.notes["parts"] == ["generator"]
    assert header.patients_seen == ("p0", "p1")


def test_latent_diffusion_comes_in_draws_and_goes_out_as_it_came(run, ldm_file, tmp_path):
    draw_with = ("--set", "diffusion.sampler.steps=2", "--set", "diffusion.sampler.compute_batch=1")
    words = ("--kind", "diffusion", "--out", tmp_path / "c", *COMMON, *draw_with)
    assert run("import", "weights", ldm_file, *words)[0] == 0
    generator = DiffusionGenerator.load(tmp_path / "c")
    header = generator.header
    assert header.config["multipliers"] == [1, 2]
    assert generator.model.latent_sd.tolist() == [2.0, 2.0, 2.0]
    assert drawn_by(generator, np.ones((1, 32, 32), np.uint8), [0]).shape == (1, 32, 32, 3)

    assert run("export", tmp_path / "c", "--format", "weights", "--out", tmp_path / "back")[0] == 0
    given = torch.load(ldm_file, weights_only=True)["state_dict"]
    back = torch.load(tmp_path / "back" / "model.ckpt", weights_only=True)["state_dict"]
    kept = {name: t for name, t in given.items() if not name.startswith(("model_ema.", "betas"))}
    assert equal(back, kept)


def test_an_imported_denoiser_draws_what_the_authors_code_draws(run, tmp_path):
    unet = published.drawn(published.unet(32, (1, 2), 9, 3, blocks=1))
    unet["input_blocks.0.0.weight"][:, 3:] *= 8  # so that what is shown matters
    stage = published.drawn(published.first_stage(32, (1, 2, 2), 3, blocks=1))
    state = {f"model.diffusion_model.{n}": t for n, t in unet.items()} | {"betas": published.betas()}
    state |= {f"first_stage_model.{n}": t for n, t in stage.items()} | {"scale_factor": torch.tensor(0.5)}
    draw_with = ("--set", "diffusion.sampler.steps=4", "--set", "diffusion.sampler.eta=0")
    words = ("--kind", "diffusion", "--out", tmp_path / "c", *COMMON, *draw_with)
    assert run("import", "weights", saved(tmp_path / "f4.ckpt", state), *words)[0] == 0
    generator = DiffusionGenerator.load(tmp_path / "c")
    mask = np.random.default_rng(0).integers(0, 6, (1, 32, 32), dtype=np.uint8)
    drawn = drawn_by(generator, mask, [5])[0].astype(int)

    shown = functional.one_hot(torch.from_numpy(mask).long(), 6).movedim(-1, 1).float()
    for _ in range(2):  # their SpatialRescaler with n_stages 2
        shown = functional.interpolate(shown, scale_factor=0.5, mode="bilinear")

    def denoise(x, t):
        return published.run_unet(unet, torch.cat([x, shown], 1), t, channels=32, mult=(1, 2), head_width=8, blocks=1)

    noise = fresh_noise((3, 8, 8), [torch_generator(5, "sample")])
    latents = published.ddim(denoise, noise, state["betas"], 4) / state["scale_factor"]
    theirs = published.run_decoder(stage, latents, scales=3, blocks=1)
    expected = ((theirs.clamp(-1, 1) + 1) * 127.5).round().movedim(1, -1)[0].numpy()
    assert expected.std() > 20
    assert np.abs(drawn - expected).max() <= 1


@pytest.fixture
def imported(run, ldm_file, tmp_path):
    """Import a denoiser with changes to its file; the status, what is printed and the errors."""

    def call(*options, **changes):
        state = torch.load(ldm_file, weights_only=True)["state_dict"] | changes.pop("tensors", {})
        state = {name: t for name, t in state.items() if name not in changes.get("without", ())}
        file = saved(tmp_path / "changed.ckpt", state)
        return run("import", "weights", file, "--kind", "diffusion", "--out", tmp_path / "c", *COMMON, *options)

    return call


def test_the_noise_is_that_of_the_file_and_what_no_file_tells_is_printed(imported, tmp_path):
    status, printed, _ = imported(tensors={"betas": published.betas(0.0015, 0.0195, 500)})
    noise = read_header(tmp_path / "c").config["noise"]
    assert (status, noise["timesteps"], noise["beta_start"], noise["beta_end"]) == (0, 500, 0.0015, 0.0195)
    assert "8 attention heads, predicts epsilon, the last weights, not their moving average" in printed


KL_STAGE = published.drawn({f"first_stage_model.{n}": s for n, s in published.first_stage(32, (1, 2), 3).items()})


@pytest.mark.parametrize(
    ("options", "without", "message"),
    [
        ((), ("scale_factor",), None),
        (("--scale-factor", 0.25), ("scale_factor",), None),
        (("--scale-factor", 0.25), (), "holds scale_factor 0.5, not 0.25"),
        (("--scale-factor", 0), ("scale_factor",), "expected a number above 0"),
        (("--scale-factor", "nan"), ("scale_factor",), "expected a number above 0"),
    ],
)
def test_a_scale_factor_that_stands_only_in_their_config_is_an_option(imported, tmp_path, options, without, message):
    status, printed, errors = imported(*options, without=without)
    if message is None:
        factor = dict(zip(options[::2], options[1::2], strict=True)).get("--scale-factor", 1)
        assert (status, f"scale factor {factor}" in printed) == (0, True)
        assert load_checkpoint(tmp_path / "c", "diffusion")[1]["latent_sd"].tolist() == [1 / factor] * 3
    else:
        assert (status, message in errors) == (2, True)
        assert not (tmp_path / "c").exists()


SEVERAL = published.drawn(
    {
        f"model.diffusion_model.{n}": s
        for n, s in published.unet(32, (1, 2), 9, 3, blocks=1, lowest_with_attention=2).items()
    }
)


def test_heads_at_several_scales_are_asked_for(imported, tmp_path):
    for options, message in (
        ((), "attends with 32 and 64 features, and does not tell how heads share them: give --head-channels N"),
        (("--set", "diffusion.heads=4"), "give --head-channels N"),
        (("--head-channels", 24), "which such heads cannot share"),
    ):
        status, _, errors = imported(*options, tensors=SEVERAL)
        assert (status, message in errors) == (2, True)
    moved = [f"model.diffusion_model.output_blocks.1.1.conv.{part}" for part in ("weight", "bias")]
    assert imported("--head-channels", 16, tensors=SEVERAL, without=moved)[0] == 0
    assert read_header(tmp_path / "c").config["heads"] == 4


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"betas": torch.linspace(0.1, 0.2, 1000) ** 3},
            "its betas rise from 0.001 to 0.008 in a way that",
        ),
        ({"betas": torch.zeros(0)}, "tensors of shapes that the published layout does not have"),
        ({"scale_factor": torch.tensor(float("nan"))}, "expected a number above 0"),
        ({"scale_factor": torch.ones(3)}, "tensors of shapes that the published layout does not have"),
        ({"cond_stage_model.channel_mapper.weight": torch.zeros(6, 6, 1, 1)}, "a network of its own makes of the mask"),
        (
            {"model.diffusion_model.out.2.bias": torch.full((3,), float("nan"))},
            "3 of 3 values of unet.conv_out",
        ),
        (
            {"model.diffusion_model.out.2.bias": torch.zeros(3, dtype=torch.int8)},
            "is torch.int8, expected torch",
        ),
        ({"model.diffusion_model.out.2.weight": torch.zeros(())}, "tensors of shapes that the published layout"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(0, 9, 3, 3)}, "no multiples of 0"),
        ({"first_stage_model.post_quant_conv.weight": torch.zeros(3)}, "tensors of shapes that the published layout"),
        (KL_STAGE, "encoder.conv_out.weight is (6, 64, 3, 3), expected (3, 64, 3, 3)"),
    ],
)
def test_what_a_damaged_or_other_denoiser_holds_is_named(imported, tmp_path, tensors, message):
    status, _, errors = imported(tensors=tensors)
    assert (status, errors.count("\n")) == (2, 1)
    assert message in errors
    assert not (tmp_path / "c").exists()


def test_a_scale_factor_of_kl_latents_is_never_guessed(imported):
    kl = KL_STAGE | {"scale_factor": torch.tensor(0.18215)}
    quantiser = ("first_stage_model.quantize.embedding.weight",)
    assert imported(tensors=kl, without=quantiser)[0] == 0
    status, _, errors = imported("--out", "d", tensors=kl, without=(*quantiser, "scale_factor"))
    assert (status, "give --scale-factor as in their config" in errors) == (2, True)


def test_heads_that_cannot_share_the_features_are_refused(run, ldm_file, tmp_path):
    words = ("--kind", "diffusion", "--out", tmp_path / "c", *COMMON, "--set", "diffusion.heads=5")
    status, _, errors = run("import", "weights", ldm_file, *words)
    assert (status, "diffusion.heads 5" in errors, "64 features" in errors) == (2, True, True)


def test_the_moving_average_is_taken_where_it_is_asked_for(run, ldm_file, tmp_path):
    assert run("import", "weights", ldm_file, "--kind", "diffusion", "--out", tmp_path / "raw", *COMMON)[0] == 0
    words = ("--kind", "diffusion", "--averaged", "--out", tmp_path / "averaged", *COMMON)
    assert run("import", "weights", ldm_file, *words)[0] == 0
    raw, averaged = (load_checkpoint(tmp_path / name, "diffusion")[1] for name in ("raw", "averaged"))
    assert torch.equal(averaged["unet.conv_in.bias"], raw["unet.conv_in.bias"] + 1)


def test_the_first_stage_of_a_diffusion_can_be_had_alone(run, ldm_file, tmp_path):
    assert run("import", "weights", ldm_file, "--kind", "autoencoder", "--out", tmp_path / "a", *COMMON)[0] == 0
    assert read_header(tmp_path / "a").config["codebook_size"] == 20
    bare = torch.load(ldm_file, weights_only=True)["state_dict"]
    denoiser = {name: t for name, t in bare.items() if not name.startswith("first_stage_model.")}
    alone = saved(tmp_path / "unet.ckpt", denoiser)
    words = ("import", "weights", alone, "--kind", "diffusion", "--out", tmp_path / "d", *COMMON)
    status, _, errors = run(*words)
    assert (status, "give one with --autoencoder CHECKPOINT" in errors) == (2, True)
    assert run(*words, "--autoencoder", tmp_path / "a")[0] == 0
    whole = load_checkpoint(tmp_path / "d", "diffusion")[1]
    first_stage = load_checkpoint(tmp_path / "a", "autoencoder")[1]
    assert equal({n.removeprefix("first_stage."): t for n, t in whole.items() if "first_stage." in n}, first_stage)


class Code:
    """Something that runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": Code()}, r"holds more than plain tensors \(\w*\.?print\), which could run code"),
        ({"a": [1]}, r"expected a state dict \(names -> tensors\), found list at 'a'"),
        ({"a": torch.zeros(1)}, "is not a network of NVlabs/SPADE"),
        ([1], "found list"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(run, tmp_path, capsys, content, message):
    path = saved(tmp_path / "x.pth", content)
    status, printed, errors = run("import", "weights", path, "--kind", "spade", "--out", tmp_path / "c", *COMMON)
    assert status == 2
    assert errors.count("\n") == 1
    assert "ran" not in printed
    with pytest.raises(ValueError, match=message):
        raise ValueError(errors)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--size-px": 10**9}, "--size-px 1000000000: expected the edge"),
        ({"--mpp": "inf"}, "--mpp inf: give the micrometres per pixel"),
        ({"--size-px": 64}, "draws images of 32 px, not 64; give --size-px 32"),
        ({"--kind": "gan"}, "--kind gan: expected one of spade, autoencoder, diffusion"),
        ({"--kind": "diffusion"}, "3 files: expected one"),
        ({"--patients-seen": "nobody.txt"}, "expected a text file with one patient per line; say none"),
        ({"--taxonomy": "tumour.yaml"}, "was trained on 7 label channels; taxonomy two has 2 labels"),
    ],
)
def test_what_does_not_fit_is_named(run, spade_files, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tumour.yaml").write_text("name: two\nsubtypes: [{id: 1, name: a, colour: '#000000'}]\n")
    options = dict(zip(COMMON[::2], COMMON[1::2], strict=True)) | {"--kind": "spade", "--out": "c"} | changes
    status, _, errors = run("import", "weights", *spade_files, *(word for pair in options.items() for word in pair))
    assert status == 2
    assert message in errors
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("latest_net_G.pth", "give one of them"),
        ("missing.pth", "missing.pth: no such weights file"),
        ("cut.pth", "cut.pth: not a file of weights, or damaged"),
    ],
)
def test_a_second_file_that_is_no_other_network_is_named(run, spade_files, tmp_path, second, message):
    (tmp_path / "cut.pth").write_bytes(spade_files[1].read_bytes()[:1000])
    files = (spade_files[0], tmp_path / second)
    status, _, errors = run("import", "weights", *files, "--kind", "spade", "--out", tmp_path / "c", *COMMON)
    assert (status, message in errors) == (2, True)


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("spade", "noise_channels", 4),
        ("spade", "counterstain", {"local_px": 4.0}),
        ("diffusion", "context_share", 0.5),
        ("diffusion", "counterstain", {"local_px": 4.0}),
    ],
)
def test_a_network_that_is_shown_more_than_labels_is_not_written_in_a_layout_that_has_none(
    run, spade_files, ldm_file, tmp_path, kind, option, value
):
    files = spade_files if kind == "spade" else [ldm_file]
    run("import", "weights", *files, "--kind", kind, "--out", tmp_path / "c", *COMMON)
    header, state = load_checkpoint(tmp_path / "c", kind)
    more = header.model_copy(update={"config": header.config | {option: value}})
    save_checkpoint(tmp_path / "more", state, more)
    status, _, errors = run("export", tmp_path / "more", "--format", "weights", "--out", tmp_path / "w")
    assert status == 2
    assert f"was trained with {option}" in errors
