"""Checkpoints that go to diffusers, to segmentation_models_pytorch and to the Hub, and come back."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import published_layouts as published
import pytest
import segmentation_models_pytorch as smp
import timm
import timm.models
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel, VQModel
from drawn_cohort import HER2, draw_cohort, draw_set
from drawn_requests import ONE, denoiser_config, drawn_by, first_stage_config, random_masks
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import save_file

from counterstain.checkpoints import CheckpointHeader, load_checkpoint, read_header, save_checkpoint
from counterstain.data.patch_set import PatchSet
from counterstain.data.patches import Patch, Source
from counterstain.data.split import check_no_leak
from counterstain.errors import CounterstainWarning, InputError, LeakageError, MismatchError
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.diffusion_config import CounterstainConfig, SamplerConfig, StyleConfig
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.published_diffusers import WEIGHTS_FILE
from counterstain.generators.train import load_autoencoder, train_autoencoder, train_diffusion
from counterstain.recipe import load_recipe
from counterstain.seeding import derive
from counterstain.segmentation.inference import tumour_probability
from counterstain.segmentation.model import Segmenter
from counterstain.segmentation.segmenter_config import SegmenterConfig
from counterstain.segmentation.timm_networks import feature_network
from counterstain.sharing import card
from counterstain.sharing import shared as shared_header
from counterstain.storage import write_sealed
from counterstain.synthesis.masks import SynthesisConfig

PLAIN = """
import sys
sys.modules["counterstain"] = None  # whoever imports it fails
from pathlib import Path
import numpy as np, torch
from diffusers import DiffusionPipeline

for folder in map(Path, sys.argv[1:]):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    given, drawn = np.load(folder.parent / "given.npz"), []
    references = list(zip(given["images"], given["masks"] > 4)) if pipeline.style else ()
    for mask, image, seed in zip(given["masks"], given["images"], given["seeds"]):
        seeds = [torch.Generator().manual_seed(int(seed))]
        images = image if pipeline.config.drawing["nuclei"] else None
        drawn += list(pipeline(mask, images=images, references=references, generator=seeds, output_type="np").images)
    np.save(folder.parent / "drawn.npy", np.stack(drawn))
"""


@pytest.fixture(autouse=True)
def own_key(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERSTAIN_PATIENT_KEY", str(tmp_path / "own" / "key"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def checkpoint(folder, stage="kl", *, seed=0, **changes):
    """Save a diffusion checkpoint with random weights."""
    config = denoiser_config(**{"sampler": SamplerConfig(steps=3, compute_batch=1)} | changes)
    first = first_stage_config(kind=stage)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first_stage = Autoencoder(first, 32)
        model = Diffusion(config, first_stage, 6)
        for tensor in (*model.parameters(), *first_stage.parameters(), *first_stage.buffers()):
            if tensor.is_floating_point():
                tensor.data.normal_(std=0.2)
    model.latent_mean.copy_(torch.linspace(-1, 1, 4))
    model.latent_sd.copy_(torch.linspace(0.5, 2, 4))
    state = model.state_dict() | {f"first_stage.{name}": value for name, value in first_stage.state_dict().items()}
    header = CheckpointHeader(
        kind="diffusion",
        taxonomy=HER2,
        size_px=32,
        mpp=0.5,
        config=config.model_dump(mode="json"),
        seed=0,
        patients_seen=("P-04", "P-12"),
        cohort="f" * 64,
        notes={"first_stage": first.model_dump(mode="json"), "first_stage_sha256": ""},
    )
    save_checkpoint(folder, state, header)
    return folder


def shown(image, tumour):
    source = Source(region="r", slide="s", patient="p", y_px=0, x_px=0)
    return Patch(image=image, instances=tumour.astype(np.int32), subtypes={1: 1}, source=source)


def as_(name, **changes):
    return SamplerConfig(name=name, **{"steps": 3, "compute_batch": 1} | changes)


CASES = {
    "as the best": ("kl", {"sampler": as_("dpmsolver++", guidance=2.0, guidance_interval=(0.2, 0.8))}),
    "as the paper": ("vq", {"sampler": as_("ddim", eta=1.0), "condition": "bilinear"}),
    "as the demo": ("linear", {"sampler": as_("unipc"), "context_share": 0.5}),
    "distilled": ("linear", {"sampler": as_("few_step", steps=2), "noise": {"prediction": "sample"}}),
    "shown nuclei and styles": (
        "linear",
        {
            "counterstain": CounterstainConfig(local_px=4.0, hidden="filled"),
            "style": StyleConfig(width=4, code=2),
            "sampler": as_("dpmsolver++", guidance=2.0),
        },
    ),
}


def asked(generator, masks, images):
    """What the generator is shown beside masks."""
    more = {"images": images} if generator.model.config.counterstain else {}
    if generator.model.style is not None:
        patches = [shown(image, mask > 4) for image, mask in zip(images, masks, strict=True)]
        more["styles"] = np.stack([generator.style_codes(patches).mean(0)] * len(masks))
    return more


@pytest.mark.slow
def test_plain_diffusers_draws_what_a_checkpoint_draws_and_it_comes_back_as_it_was(run, tmp_path):
    masks, images, _ = random_masks(2, 32, 32)
    expected = {}
    for name, (stage, changes) in CASES.items():
        place = tmp_path / name.replace(" ", "-")
        folder = checkpoint(place / "checkpoint", stage, **changes)
        generator = DiffusionGenerator.load(folder)
        expected[place] = drawn_by(generator, masks, (0, 1), **asked(generator, masks, images))
        np.savez(place / "given.npz", masks=masks, images=images, seeds=[derive(s, "sample") for s in (0, 1)])
        assert run("export", folder, "--format", "diffusers", "--out", place / "shared")[0] == 0

    words = [sys.executable, "-c", PLAIN, *(place / "shared" for place in expected)]
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    for place, ours in expected.items():
        assert np.array_equal(np.load(place / "drawn.npy"), ours), place

        words = ("import", "weights", place / "shared", "--kind", "diffusion", "--out", place / "back")
        assert run(*words)[0] == 0
        assert read_header(place / "back").sha256 == read_header(place / "checkpoint").sha256
        generator = DiffusionGenerator.load(place / "back")
        assert np.array_equal(drawn_by(generator, masks, (0, 1), **asked(generator, masks, images)), ours)


@pytest.fixture
def shared(run, tmp_path):
    folder = checkpoint(tmp_path / "checkpoint")
    assert run("export", folder, "--format", "diffusers", "--out", tmp_path / "shared")[0] == 0
    return tmp_path / "shared"


def test_a_card_has_the_command_that_trains_such_a_network(shared, tmp_path):
    command = re.search(r"```bash\n(counterstain train .*?)\n```", (shared / "README.md").read_text(), re.DOTALL)[1]
    words = shlex.split(command)
    assert words[:8] == ["counterstain", "train", "diffusion", "COHORT", "--autoencoder", "AUTOENCODER", "--out", "DIR"]
    changes = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    recipe = load_recipe(words[words.index("--preset") + 1], overrides=changes)
    header = read_header(tmp_path / "checkpoint")
    assert recipe.diffusion.model_dump(mode="json") == header.config
    assert recipe.size_px == header.size_px


def test_an_export_names_no_patient_but_counts_them(shared):
    for file in shared.rglob("*"):
        assert file.is_dir() or b"P-04" not in file.read_bytes(), file
    assert "| patients seen | 2 |" in (shared / "README.md").read_text()
    assert "1 = HER2 0" in (shared / "README.md").read_text()
    assert "mask[8:-8, 8:-8] = 1" in (shared / "README.md").read_text()


def test_the_owner_of_the_key_recognises_patients_and_nobody_else_is_told_that_all_is_well(
    run, shared, tmp_path, monkeypatch
):
    assert run("import", "weights", shared, "--kind", "diffusion", "--out", tmp_path / "back")[0] == 0
    seen = read_header(tmp_path / "back").patients_seen
    cohort = draw_cohort(tmp_path / "cohort")
    check_no_leak(seen, cohort, "the checkpoint", splits=["val"])
    with pytest.raises(LeakageError, match="has seen p4 of the test split"):
        check_no_leak(seen, cohort, "the checkpoint")
    monkeypatch.setenv("COUNTERSTAIN_PATIENT_KEY", str(tmp_path / "another"))
    with pytest.warns(CounterstainWarning, match="2 patients whose names are hidden by a key that is not here"):
        check_no_leak(seen, cohort, "the checkpoint")


def test_a_first_stage_of_an_export_brings_the_patients_that_it_saw(shared, tmp_path):
    cohort = draw_cohort(tmp_path / "cohort")
    first = first_stage_config(pretrained=str(shared), validation_patches=0)
    with pytest.raises(LeakageError, match="has seen p4 of the test split"):
        train_autoencoder(cohort, first, tmp_path / "first", size_px=32, seed=0)


def test_the_first_stage_of_an_export_can_be_had_alone(run, shared, tmp_path):
    assert run("import", "weights", shared, "--kind", "autoencoder", "--out", tmp_path / "first")[0] == 0
    header, state = load_checkpoint(tmp_path / "first", "autoencoder")
    assert header.config["kind"] == "kl"
    assert all(name.startswith("network.") for name in state)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda at: (at / "unet" / "config.json").unlink(), (), "unet: cannot be opened as UNet2DModel"),
        (lambda at: (at / "vae" / WEIGHTS_FILE).write_bytes(b"no"), (), "vae: cannot be opened as AutoencoderKL"),
        (lambda at: save_file({"a": torch.zeros(1)}, at / "unet" / WEIGHTS_FILE), (), "missing weights of UNet2DModel"),
        (lambda at: None, ("--size-px", 32), "tells all about itself; give --kind and --out alone"),
    ],
)
def test_an_export_that_cannot_be_used_is_one_line(run, shared, tmp_path, spoil, options, message):
    spoil(shared)
    words = ("import", "weights", shared, "--kind", "diffusion", "--out", tmp_path / "back", *options)
    status, _, errors = run(*words)
    assert (status, message in errors, (tmp_path / "back" / "model.json").exists()) == (2, True, False)


def test_an_export_goes_to_no_folder_of_something_else(run, tmp_path):
    folder = checkpoint(tmp_path / "checkpoint")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    status, _, errors = run("export", folder, "--format", "diffusers", "--out", tmp_path / "mine")
    assert (status, "holds something else" in errors) == (2, True)
    assert run("export", folder, "--format", "smp", "--out", tmp_path / "smp")[2].count("takes a segmenter") == 1


# What others saved with diffusers

COMMON = ("--taxonomy", "her2", "--mpp", 0.5, "--size-px", 32, "--patients-seen", "none")
TINY = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [32, 64],
    "latent_channels": 4,
}


def stable_diffusion(folder, **changes):
    """Save a tiny first stage as Stable Diffusion's repositories hold it."""
    torch.manual_seed(0)
    network = AutoencoderKL(**TINY | changes).eval()
    network.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    return network


@pytest.mark.parametrize(
    ("changes", "mean", "sd"),
    [
        ({"scaling_factor": 0.2}, 0.0, 5.0),
        ({"scaling_factor": 0.5, "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}, 0.1, 2.0),
        ({"scaling_factor": 1.0, "latents_mean": [1.0] * 4, "latents_std": [3.0] * 4}, 1.0, 3.0),
    ],
)
def test_a_first_stage_saved_by_diffusers_encodes_as_it_did(run, tmp_path, changes, mean, sd):
    theirs = stable_diffusion(tmp_path / "sd", **changes)
    for number, source in enumerate((tmp_path / "sd", tmp_path / "sd" / "vae", tmp_path / "sd" / "vae" / WEIGHTS_FILE)):
        words = ("import", "weights", source, "--kind", "autoencoder", "--out", tmp_path / f"{number}", *COMMON)
        assert run(*words)[0] == 0
    ours, header = load_autoencoder(tmp_path / "0")
    assert header.notes["latent_mean"] == pytest.approx([mean] * 4)
    assert header.notes["latent_sd"] == pytest.approx([sd] * 4)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(ours.encode(images), theirs.encode(images).latent_dist.mode())


@pytest.mark.parametrize("plain", [False, True])
def test_a_single_file_may_leave_out_the_convolutions_around_the_latents(run, tmp_path, plain):
    state = published.drawn(published.first_stage(32, (1, 2), 4))
    state = {name: value for name, value in state.items() if not (plain and "quant_conv" in name)}
    save_file(state, tmp_path / "ae.safetensors")
    words = ("import", "weights", tmp_path / "ae.safetensors", "--kind", "autoencoder", "--out", tmp_path / "c")
    assert run(*words, *COMMON)[0] == 0
    ours, header = load_autoencoder(tmp_path / "c")
    assert header.config.get("plain_latents", False) is plain
    with torch.no_grad():
        assert ours.decode(ours.encode(torch.zeros(1, 3, 32, 32))).shape == (1, 3, 32, 32)


def test_a_published_first_stage_takes_the_place_of_a_training_and_normalises_as_its_config_says(run, tmp_path):
    theirs = stable_diffusion(tmp_path / "sd", scaling_factor=0.2)
    cohort = draw_cohort(tmp_path / "cohort")
    first = first_stage_config(pretrained=str(tmp_path / "sd"), pretrained_patients="none", validation_patches=2)
    train_autoencoder(cohort, first, tmp_path / "first", size_px=32, seed=0)
    header = read_header(tmp_path / "first")
    assert header.config["kind"] == "kl"
    assert header.notes["validation"].keys() >= {"val_psnr"}
    assert torch.equal(
        load_autoencoder(tmp_path / "first")[0].state_dict()["network.quant_conv.weight"], theirs.quant_conv.weight
    )
    config = denoiser_config(normalise_latents="none")
    train_diffusion(cohort, config, tmp_path / "d", autoencoder=tmp_path / "first", size_px=32, seed=0)
    assert DiffusionGenerator.load(tmp_path / "d").model.latent_sd.tolist() == pytest.approx([5.0] * 4)

    assert "| cohort | cohort (fingerprint" in card(read_header(tmp_path / "d"), "", "diffusers")

    nobody_says = first_stage_config(pretrained=str(tmp_path / "sd"))
    with pytest.raises(InputError, match="whose tissue was this network trained on"):
        train_autoencoder(cohort, nobody_says, tmp_path / "other", size_px=32, seed=0)


def whole_pipeline(folder, **changes):
    """Save a denoiser of diffusers that takes a channel for each label."""
    torch.manual_seed(0)
    stage = VQModel(**TINY | {"norm_num_groups": 32, "num_vq_embeddings": 9, "scaling_factor": 0.5})
    stage.save_pretrained(folder / "vqvae")
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    settings = {"in_channels": 10, "out_channels": 4, "block_out_channels": [32, 64], "layers_per_block": 1}
    UNet2DModel(**blocks | settings | changes).save_pretrained(folder / "unet")
    DDIMScheduler(num_train_timesteps=500, beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text("{}")


def test_a_denoiser_of_diffusers_comes_in_with_its_noise_and_its_first_stage(run, tmp_path):
    whole_pipeline(tmp_path / "p")
    words = ("import", "weights", tmp_path / "p", "--kind", "diffusion", "--out", tmp_path / "c", *COMMON)
    draw_with = ("--set", "diffusion.sampler.steps=2", "--set", "diffusion.sampler.compute_batch=1")
    assert run(*words, *draw_with)[0] == 0
    generator = DiffusionGenerator.load(tmp_path / "c")
    assert generator.model.config.noise.timesteps == 500
    assert generator.model.latent_sd.tolist() == [2.0] * 4
    assert drawn_by(generator, np.ones((1, 32, 32), np.uint8), [0]).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 7}, "in_channels is 7; ours would have 10"),
        ({"act_fn": "gelu"}, "act_fn is gelu; ours would have silu"),
        ({"norm_num_groups": 8}, "norm_num_groups is 8; ours would have 32"),
    ],
)
def test_a_denoiser_that_ours_cannot_be_is_named(run, tmp_path, changes, message):
    whole_pipeline(tmp_path / "p", **changes)
    words = ("import", "weights", tmp_path / "p", "--kind", "diffusion", "--out", tmp_path / "c", *COMMON)
    status, _, errors = run(*words)
    assert (status, message in errors) == (2, True), errors


# Segmenters


def segmenter(folder, num_labels=2, **changes):
    config = SegmenterConfig(**{"training": ONE, "encoder": "resnet18", "encoder_weights": None} | changes)
    torch.manual_seed(0)
    model = Segmenter(config, num_labels=num_labels).eval()
    known = {"taxonomy": HER2, "size_px": 64, "mpp": 0.5, "seed": 0, "cohort": "f" * 64}
    header = CheckpointHeader(kind="segmenter", config=config.model_dump(mode="json"), patients_seen=("P-04",), **known)
    save_checkpoint(folder, model.state_dict(), header)
    return model


def test_segmentation_models_pytorch_opens_a_segmenter_with_equal_logits(run, tmp_path):
    model = segmenter(tmp_path / "s", encoder_depth=5, decoder_channels=(32, 32, 16, 16, 8))
    assert run("export", tmp_path / "s", "--format", "smp", "--out", tmp_path / "smp")[0] == 0
    theirs = smp.from_pretrained(str(tmp_path / "smp")).eval()
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    mean, sd = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    card = (tmp_path / "smp" / "README.md").read_text()
    assert "(0.485, 0.456, 0.406)" in card
    with torch.no_grad():
        prepared = ((images.float() / 255 - mean) / sd).permute(0, 3, 1, 2)
        assert torch.equal(theirs(prepared), model(images))


@pytest.mark.parametrize("classes", ["tissue", "subtypes"])
def test_the_card_of_a_segmenter_says_which_output_is_what(run, tmp_path, classes):
    model = segmenter(tmp_path / "s", num_labels=HER2.num_labels, classes=classes)
    assert run("export", tmp_path / "s", "--format", "smp", "--out", tmp_path / "smp")[0] == 0
    card = (tmp_path / "smp" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER or OWNER/NAME", str(tmp_path / "smp"))
    names = ("background", "tumour") if classes == "tissue" else ("background", *HER2.names)
    assert f"# {', '.join(f'{number} = {name}' for number, name in enumerate(names))}\n" in code
    told = {}
    with torch.no_grad():
        exec(code.replace("torch.rand(1, 3, 64, 64)", "torch.full((1, 3, 64, 64), 0.2)"), told)
        logits = model.tumour_logits(torch.full((1, 64, 64, 3), 51, dtype=torch.uint8)).numpy()[0]
    assert np.allclose(told["tumour"][0], tumour_probability(logits), atol=1e-5)


# The Hub: a folder stands for it


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repositories as folders, in place of the Hub's client."""
    home = tmp_path / "hub"

    class AbsentError(RepositoryNotFoundError):
        def __init__(self):
            Exception.__init__(self, "404: there is none, whoever asks with hf_secret")

    class Api:
        def __init__(self, token):
            assert token == "hf_secret"

        def create_repo(self, repo, *, repo_type, private, exist_ok):
            place = home / repo_type / repo
            if not place.exists():
                (place / "files").mkdir(parents=True)
                (place / "private").write_text(str(private))
            return f"https://hub.example/{repo}"

        def repo_info(self, repo, *, repo_type):
            return SimpleNamespace(private=(home / repo_type / repo / "private").read_text() == "True")

        def upload_folder(self, *, repo_id, folder_path, repo_type, commit_message):
            shutil.copytree(folder_path, home / repo_type / repo_id / "files", dirs_exist_ok=True)

        def snapshot_download(self, repo, *, repo_type, local_dir, ignore_patterns, **_):
            if not (home / repo_type / repo).exists():
                raise AbsentError
            unwanted = shutil.ignore_patterns(*ignore_patterns)
            place = local_dir or tmp_path / "cache" / repo
            shutil.copytree(home / repo_type / repo / "files", place, ignore=unwanted, dirs_exist_ok=True)
            return str(place)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("counterstain.hub.answers", lambda _: True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return home


def files_of(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_a_checkpoint_goes_to_the_hub_without_names_and_comes_back_as_it_was(run, hub, tmp_path):
    folder = checkpoint(tmp_path / "checkpoint")
    (folder / "logs").mkdir()
    (folder / "logs" / "losses.csv").write_text("P-04")
    status, printed, errors = run("push", folder, "me/mine")
    assert (status, printed, errors) == (0, "https://hub.example/me/mine\n", "")
    pushed = hub / "model" / "me" / "mine"
    assert (pushed / "private").read_text() == "True"
    assert files_of(pushed / "files") == {"README.md", "model.json", "model.safetensors"}
    assert not any(b"P-04" in file.read_bytes() for file in (pushed / "files").iterdir())

    status, printed, _ = run("pull", "me/mine", "--out", tmp_path / "back")
    assert (status, "diffusion of HER2 0, HER2 1+" in printed) == (0, True)
    assert read_header(tmp_path / "back").sha256 == read_header(folder).sha256
    assert run("pull", "me/mine", "--out", tmp_path / "back")[2].count("exists already") == 1
    assert run("push", folder, "me/named", "--with-patient-ids")[0] == 0
    assert b"P-04" in (hub / "model" / "me" / "named" / "files" / "model.json").read_bytes()


@pytest.mark.parametrize("note", ["P-04", "p-04-2024", "patients/P-04/net.safetensors", ["a", "scan of p-04"]])
def test_a_checkpoint_that_names_a_patient_elsewhere_is_not_shared(tmp_path, note):
    header = read_header(checkpoint(tmp_path / "checkpoint"))
    with pytest.raises(MismatchError, match="names patient P-04 beside patients_seen"):
        shared_header(header.model_copy(update={"notes": {"of": note}}), tmp_path)
    assert "P-04" not in str(
        shared_header(header.model_copy(update={"notes": {"of": "P-041"}}), tmp_path).patients_seen
    )


def test_an_export_on_the_hub_is_imported_by_its_name_and_no_code_is_fetched(run, hub, shared, tmp_path):
    assert run("push", shared, "me/shared")[0] == 0
    assert "pipeline.py" in files_of(hub / "model" / "me" / "shared" / "files")
    assert run("import", "weights", "me/shared", "--kind", "diffusion", "--out", tmp_path / "back")[0] == 0
    assert read_header(tmp_path / "back").sha256 == read_header(tmp_path / "checkpoint").sha256
    status, printed, _ = run("pull", "me/shared", "--out", tmp_path / "pulled")
    assert (status, "next: counterstain import weights" in printed) == (0, True)
    assert not any(name.endswith(".py") for name in files_of(tmp_path / "pulled"))


def test_an_exported_segmenter_comes_back_from_the_hub(run, hub, tmp_path):
    segmenter(tmp_path / "s")
    assert run("export", tmp_path / "s", "--format", "smp", "--out", tmp_path / "smp")[0] == 0
    assert run("push", tmp_path / "smp", "me/segmenter")[0] == 0
    status, printed, _ = run("pull", "me/segmenter", "--out", tmp_path / "pulled")
    assert (status, "segmentation_models_pytorch" in printed) == (0, True)
    smp.from_pretrained(str(tmp_path / "pulled"))


def test_an_export_that_is_torn_leaves_no_folder_behind(run, shared, tmp_path):
    (shared / "unet" / "config.json").unlink()
    status, _, errors = run("import", "weights", shared, "--kind", "diffusion", "--out", tmp_path / "back")
    assert (status, errors.count("\n"), (tmp_path / "back").exists()) == (2, 1, False)


def test_a_synthetic_set_goes_to_the_hub_under_pseudonyms_and_is_a_set_as_before(run, hub, tmp_path):
    cohort = draw_cohort(tmp_path / "cohort")
    settings = {"synthesis": SynthesisConfig().model_dump(mode="json")}
    style = (("p0-a", 1.0),)
    found = draw_set(tmp_path / "set", cohort, count=4, settings=settings, style=style, steps='[{"style": "p1-a"}]')
    assert run("push", found.folder, "me/set") == (0, "https://hub.example/me/set\n", "")
    pushed = hub / "dataset" / "me" / "set" / "files"
    for table in pushed.rglob("patches.parquet"):
        shown = pd.read_parquet(table)
        named = {*shown["patient"], *shown["slide"], *shown["region"], *np.concatenate(shown["style_slides"])}
        assert all(name.startswith("pseudonym:") for name in named)
        assert "p1-a" not in str(shown["steps"].tolist())
    assert '"p0"' not in (pushed / "set.json").read_text()
    assert "counterstain synthesize COHORT --method oracle --out SET --count 4" in (pushed / "README.md").read_text()

    assert run("pull", "me/set", "--out", tmp_path / "back")[0] == 0
    back = PatchSet.open(tmp_path / "back")
    assert np.array_equal(back[3].image, found[3].image)
    assert sorted(back.patches.groupby("patient").size()) == sorted(found.patches.groupby("patient").size())
    with pytest.raises(LeakageError, match="has seen p0"):
        check_no_leak(back.header.patients_seen, cohort, "the set", splits=["train"])


def test_a_synthetic_set_leaves_only_if_the_user_says_that_its_names_and_its_tissue_may(run, hub, tmp_path):
    found = draw_set(tmp_path / "set", draw_cohort(tmp_path / "cohort"), count=4)
    assert run("push", found.folder, "me/set", "--with-patient-ids")[0] == 0
    assert "4 synthetic patches (oracle)" in run("pull", "me/set", "--out", tmp_path / "back")[1]
    header = found.header.model_copy(update={"method": "inpainting"})
    write_sealed(found.folder / "set.json", header.model_dump(mode="json"))
    assert run("push", found.folder, "me/inpainted", "--with-patient-ids")[2].count("real tissue") == 1
    assert run("push", found.folder, "me/inpainted", "--with-patient-ids", "--with-real-tissue")[0] == 0


def test_what_cannot_be_pushed_or_pulled_is_one_line_without_the_token(run, hub, tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "checkpoint")
    assert run("push", folder, "me/open", "--public")[0] == 0
    assert run("push", folder, "me/open")[2].count("is public; give --public if everybody may see") == 1
    assert run("push", folder, "mine")[2].count("expected OWNER/NAME") == 1
    (hub / "model" / "me" / "open" / "files" / "model.json").unlink()
    status, _, errors = run("pull", "me/open", "--out", tmp_path / "nothing")
    assert (status, errors.count("me/open: holds nothing of counterstain")) == (2, 1)
    assert not (tmp_path / "nothing").exists()
    assert run("push", tmp_path, "me/mine")[2].count("no checkpoint, synthetic set or export") == 1
    status, _, errors = run("pull", "me/none", "--out", tmp_path / "none")
    assert (status, "cannot be read on the Hub" in errors, "hf_secret" in errors) == (2, True, False)
    assert not (tmp_path / "none").exists()
    monkeypatch.delenv("HF_TOKEN")
    assert run("push", folder, "me/mine")[2].count("set HF_TOKEN") == 1


def test_a_foundation_model_is_fetched_by_its_name_and_its_code_stays(hub):
    network = timm.create_model("test_vit", pretrained=False, num_classes=0, init_values=1e-5)
    place = hub / "model" / "lab" / "uni" / "files"
    timm.models.save_for_hf(network, place)
    (place / "model.py").write_text("raise SystemExit")
    with torch.no_grad():
        features, prepare = feature_network("hf-hub:lab/uni", None, torch.device("cpu"))
        assert features(prepare(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))).shape == (1, 64)
    with pytest.raises(InputError, match="lab/none: cannot be read on the Hub"):
        feature_network("hf-hub:lab/none", None, torch.device("cpu"))
