"""One training over several devices; tolerances are those of sums taken in another order."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from drawn_cohort import draw_cohort
from drawn_requests import denoiser_config, first_stage_config
from safetensors.numpy import load_file
from torch.multiprocessing import ProcessRaisedException
from torch.nn.functional import batch_norm
from work_of_processes import die_in_the_second, fail_in_the_second, note_the_rank

from counterstain import devices
from counterstain.data.cohort import Cohort
from counterstain.data.sampling import PatchBatches
from counterstain.devices import run_in_processes, starts_processes
from counterstain.errors import ConfigError, DivergenceError, StorageError
from counterstain.generators.spade_config import SpadeConfig
from counterstain.generators.train import train_autoencoder, train_diffusion, train_spade
from counterstain.segmentation.segmenter_config import SegmenterConfig
from counterstain.segmentation.train import train_segmenter
from counterstain.training import Trainable, fit
from counterstain.training_config import TrainingConfig

GIVEN = {"size_px": 32, "seed": 0}
LR_OF_D = 1e-5
KINDS = ("diffusion", "spade", "segmenter")
STEPS_OF_ADAM = {"diffusion": 2e-4, "spade": 2e-3, "segmenter": 2e-4}


def training(devices: int, **changes) -> TrainingConfig:
    settings = {"batch_size": 4, "precision": "32", "accelerator": "cpu", "log_every_steps": 1, "devices": devices}
    return TrainingConfig(**settings | {"steps": 4, "checkpoint_every_steps": 2} | changes)


def segmenter(devices: int) -> SegmenterConfig:
    decoder = {"encoder": "tu-test_resnet", "encoder_weights": None, "decoder_channels": (16, 16, 8, 8, 8)}
    return SegmenterConfig(training=training(devices), ema_decay=0.9, **decoder)


def normalised_by_running_statistics(layer, x):
    return batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)


def train_all(cohort: Cohort, first_stage: Path, out: Path, devices: int) -> None:
    """Without the statistics of batches: on CPUs those are of each process's part of the batch."""
    diffusion = denoiser_config(training=training(devices), ema_decay=0.9)
    widths = {"generator_width": 4, "discriminator_width": 4, "hidden": 4, "latent": 8}
    spade = SpadeConfig(training=training(devices), vgg_weight=0, lr_discriminator=LR_OF_D, **widths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.BatchNorm2d, "forward", normalised_by_running_statistics)
        train_diffusion(cohort, diffusion, out / "diffusion", autoencoder=first_stage, **GIVEN)
        train_spade(cohort, spade, out / "spade", **GIVEN)
        train_segmenter(cohort, segmenter(devices), out / "segmenter", **GIVEN)


@pytest.fixture(scope="module")
def forked():
    """Processes that need not import everything anew; safe where nothing uses threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "START_METHOD", "fork")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return draw_cohort(tmp_path_factory.mktemp("cohort") / "cohort", regions=1, size_px=64)


@pytest.fixture(scope="module")
def trained(forked, cohort, tmp_path_factory):
    """The same trainings in two processes and in one."""
    folder = tmp_path_factory.mktemp("devices")
    linear = first_stage_config(training=training(1), kind="linear")
    train_autoencoder(cohort, linear, folder / "first", **GIVEN)
    run_in_processes(2, train_all, cohort, folder / "first", folder / "two", 2)
    train_all(cohort, folder / "first", folder / "one", 1)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_losses_and_the_weights_of_one(trained, kind):
    one, two = (pd.read_csv(trained / name / kind / "losses.csv") for name in ("one", "two"))
    assert one[["step", "name"]].equals(two[["step", "name"]])
    assert one["step"].max() == 4
    # Within its hinges the last bias of SPADE's discriminator has the gradient of rounding errors, and Adam makes
    # whole steps of it: up to its learning rate each.
    bias = 4 * LR_OF_D * np.sqrt(10) if kind == "spade" else 0
    np.testing.assert_allclose(two["value"], one["value"], rtol=1e-5, atol=bias)
    one, two = (load_file(trained / name / kind / "model.safetensors") for name in ("one", "two"))
    for name, weights in one.items():
        # Where a gradient is next to nothing, Adam makes steps of its rounding errors: a few weights in 10,000.
        np.testing.assert_allclose(two[name], weights, rtol=1e-4, atol=STEPS_OF_ADAM[kind], err_msg=name)


def test_a_training_asks_for_its_processes_itself_and_resumes_where_they_were_stopped(
    forked, cohort, tmp_path, monkeypatch, capfd
):
    part = PatchBatches.part

    def stopped(batches, step, start, stop):
        if step == 3:
            raise RuntimeError("stopped")
        return part(batches, step, start, stop)

    with monkeypatch.context() as patched:
        patched.setattr(PatchBatches, "part", stopped)
        with pytest.raises(ProcessRaisedException, match="stopped"):
            train_segmenter(cohort, segmenter(2), tmp_path / "out", **GIVEN)
    assert (tmp_path / "out" / "last.ckpt").exists()
    train_segmenter(cohort, segmenter(2), tmp_path / "out", **GIVEN)
    whole = train_segmenter(cohort, segmenter(2), tmp_path / "whole", **GIVEN)
    assert "batch norm sees each process's part of the batch" in capfd.readouterr().err
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in whole.iterdir()}
    for name in ("model.safetensors", "losses.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


def test_new_processes_know_their_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "START_METHOD", "spawn")
    run_in_processes(2, note_the_rank, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0 of 2", "1 of 2"]


def test_the_error_of_one_process_ends_the_others_and_reaches_the_caller(forked):
    with pytest.raises(DivergenceError, match="step 3: loss is nan"):
        run_in_processes(2, fail_in_the_second)


def test_a_killed_process_is_one_line_and_ends_the_others(forked):
    with pytest.raises(StorageError, match="process 1 terminated with signal SIGKILL; perhaps memory ran out"):
        run_in_processes(2, die_in_the_second)


def test_one_device_needs_no_processes():
    assert not starts_processes(training(1))
    assert starts_processes(training(2))


def test_a_model_that_does_not_start_processes_is_refused_on_two_devices(tmp_path):
    with pytest.raises(ConfigError, match="devices 2: Trainable trains on one device; use 1"):
        fit(Trainable(), dict, tmp_path, training(2))


def test_several_nodes_need_torchrun_and_its_number_of_processes(monkeypatch):
    with pytest.raises(ConfigError, match="torchrun --nnodes 2 --nproc-per-node 1 -m counterstain"):
        starts_processes(training(1, num_nodes=2))
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert not starts_processes(training(1, num_nodes=2))
    with pytest.raises(ConfigError, match="devices 4 x num_nodes 1 = 4, but torchrun started 2 processes"):
        starts_processes(training(4))
