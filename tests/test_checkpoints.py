import json

import pytest
import torch
from drawn_cohort import HER2
from drawn_requests import denoiser_config, first_stage_config
from torch import nn

from counterstain.checkpoints import (
    CheckpointHeader,
    load_checkpoint,
    read_header,
    read_state,
    rebuilt,
    require_taxonomy,
    save_checkpoint,
)
from counterstain.errors import ConfigError, InputError, MismatchError, StorageError
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.drawing import DiffusionGenerator

HEADER = CheckpointHeader(
    kind="spade", taxonomy=HER2, size_px=64, mpp=0.5, config={}, seed=0, patients_seen=("p0",), cohort="c"
)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    state = {"a": torch.arange(6.0).reshape(2, 3).T}
    saved = save_checkpoint(tmp_path, state, HEADER)
    header, loaded = load_checkpoint(tmp_path, "spade")
    assert torch.equal(loaded["a"], state["a"])
    assert header == saved
    assert len(header.sha256) == 64


def test_damaged_weights_are_noticed(tmp_path):
    save_checkpoint(tmp_path, {"a": torch.zeros(3)}, HEADER)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match="missing or damaged"):
        load_checkpoint(tmp_path, "spade")


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    save_checkpoint(tmp_path, {"a": torch.zeros(3)}, HEADER)
    with pytest.raises(MismatchError, match="of kind 'spade', expected 'diffusion'"):
        load_checkpoint(tmp_path, "diffusion")


def test_a_checkpoint_of_another_taxonomy_is_refused(tmp_path):
    with pytest.raises(MismatchError, match=r"was trained on the subtypes HER2 0, .*this cohort has non-stained"):
        require_taxonomy(tmp_path, HEADER, HER2.merged("stained"))


@pytest.mark.parametrize(("folder", "message"), [("missing", "no such checkpoint"), (".", "not a checkpoint")])
def test_a_wrong_folder_is_named(tmp_path, folder, message):
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / folder, "spade")


@pytest.mark.parametrize(("key", "value"), [("patients_seen", []), ("mpp", 0.25), ("config", {"lr": 1}), ("notes", {})])
def test_a_header_that_was_changed_is_noticed_and_one_of_an_earlier_version_opens(tmp_path, key, value):
    saved = save_checkpoint(tmp_path, {"a": torch.zeros(3)}, HEADER.model_copy(update={"notes": {"from": "here"}}))
    file = tmp_path / "model.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {key: value}))
    with pytest.raises(StorageError, match=r"model\.json: damaged \(its content is not what was written\)"):
        read_header(tmp_path)
    file.write_text(json.dumps({name: content[name] for name in CheckpointHeader.model_fields if name in content}))
    assert read_header(tmp_path) == saved


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value, dtype):
    weights = torch.tensor([1.0, value, 2.0]).to(dtype)
    save_checkpoint(tmp_path, {"a": torch.full((9,), 3e38), "b": weights}, HEADER)
    with pytest.raises(StorageError, match="1 of 3 values of b are NaN or infinite"):
        load_checkpoint(tmp_path, "spade")


@pytest.fixture
def diffusion(tmp_path):
    """Save a small diffusion, with changes to its settings."""
    stage, config = first_stage_config(kind="vq", codebook_size=16), denoiser_config()
    first = Autoencoder(stage, 32)
    state = Diffusion(config, first, 6).state_dict()
    state |= {f"first_stage.{name}": value for name, value in first.state_dict().items()}

    def saved(of_network=None, of_first_stage=None, without=""):
        known = {
            "kind": "diffusion",
            "config": config.model_dump(mode="json") | (of_network or {}),
            "notes": {"first_stage": stage.model_dump(mode="json") | (of_first_stage or {})},
        }
        save_checkpoint(tmp_path, {n: t for n, t in state.items() if n != without}, HEADER.model_copy(update=known))
        return tmp_path

    return saved


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"without": "unet.conv_out.bias"},
            MismatchError,
            r"unet.conv_out.bias is missing in model.safetensors, \(4,\)",
        ),
        ({"of_network": {"channels": 16}}, MismatchError, "header and its weights disagree"),
        ({"of_network": {"channels": 4096, "multipliers": [64] * 8}}, MismatchError, "header and its weights disagree"),
        ({"of_network": {"channels": 10**9}}, ConfigError, "channels: Input should be less than or equal to 4096"),
        ({"of_network": {"multipliers": [1, -2]}}, ConfigError, "multipliers.1: Input should be greater"),
        ({"of_network": {"lr": -1.0}}, ConfigError, "lr: Input should be greater than 0"),
        ({"of_first_stage": {"codebook_size": 10**6}}, MismatchError, r"\(16, 4\) in .*, \(1000000, 4\) by model.json"),
        ({"of_first_stage": {"kind": "linear"}}, MismatchError, "header and its weights disagree"),
    ],
)
def test_weights_that_are_not_those_of_the_header_are_refused_in_one_line_and_little_memory(
    diffusion, changes, error, message
):
    with pytest.raises(error, match=message) as caught:
        DiffusionGenerator.load(diffusion(**changes))
    assert "\n" not in str(caught.value)


def test_settings_that_no_library_makes_a_network_of_are_one_line(tmp_path):
    with pytest.raises(MismatchError, match="its settings make no network"):
        rebuilt(lambda: nn.GroupNorm(3, 4), {}, tmp_path)


def test_what_a_network_computes_when_it_is_made_is_there_when_it_is_rebuilt(tmp_path):
    class Shifted(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("shift", torch.ones(2), persistent=False)

    state = {"weight": torch.eye(2), "bias": torch.zeros(2)}
    model = rebuilt(Shifted, state, tmp_path)
    assert (model(torch.ones(2)) + model.shift).tolist() == [2, 2]


@pytest.mark.parametrize("shape", [(10**6, 10**6), (2, 4)])
def test_a_tensor_that_is_larger_than_what_its_file_holds_is_refused(tmp_path, shape):
    torch.save({"a": torch.zeros(1).expand(shape)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"a .* is not stored in full"):
        read_state(tmp_path / "x.pth")
