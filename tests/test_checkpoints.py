import pytest
import torch
from drawn_cohort import HER2

from counterstain.checkpoints import CheckpointHeader, load_checkpoint, require_taxonomy, save_checkpoint
from counterstain.errors import InputError, MismatchError, StorageError

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
