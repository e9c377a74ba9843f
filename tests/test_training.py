import multiprocessing
import os
import shutil
import signal
import time
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from counterstain import devices
from counterstain.config import build
from counterstain.devices import prepared
from counterstain.errors import ConfigError, DivergenceError, LeakageError, StorageError
from counterstain.processes import CORES
from counterstain.seeding import torch_generator
from counterstain.storage import claim
from counterstain.training import Trainable, fit
from counterstain.training_config import TrainingConfig


class Line(Trainable):
    """A linear regression whose inputs are noised; stops itself where a test wants it to, at once or with signals."""

    def __init__(self, stop_at=None, diverge_at=None, signals=()):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(4, 1)
        self.stop_at, self.diverge_at, self.signals = stop_at, diverge_at, signals

    def losses(self, batch):
        step = int(batch["step"])
        if step == self.stop_at:
            self.stop_at = None
            if not self.signals:
                raise KeyboardInterrupt
            for number in self.signals:
                os.kill(os.getpid(), number)
        generators = [torch_generator(0, "noise", step, p) for p in batch["position"].tolist()]
        noise = torch.stack([torch.randn(4, generator=g) for g in generators])
        loss = self.layer(batch["x"] + noise).pow(2).mean()
        if step == self.diverge_at:
            loss = loss * float("nan")
        return {"loss": loss}

    def optimizers(self):
        return [torch.optim.Adam(self.parameters(), 1e-2)]


def batches(step):
    return {"x": torch.randn(8, 4, generator=torch_generator(1, step))}


def config(**changes):
    settings = {"steps": 12, "batch_size": 8, "accelerator": "cpu", "precision": "32"}
    return TrainingConfig(**settings | {"checkpoint_every_steps": 5, "log_every_steps": 1} | changes)


def steps_done(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["step"]


def trained(folder, model=None, **changes):
    folder.mkdir(exist_ok=True)
    model = model or Line()
    fit(model, batches, folder, config(**changes), ema_decay=0.9)
    return model.layer.weight.detach().clone(), (folder / "losses.csv").read_text()


def test_equal_seeds_give_equal_weights_and_losses(tmp_path):
    first, second = trained(tmp_path / "a"), trained(tmp_path / "b")
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]


def test_a_training_that_was_stopped_ends_like_one_that_ran_through(tmp_path):
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", Line(stop_at=8))
    assert (tmp_path / "stopped" / "last.ckpt").exists()
    resumed = trained(tmp_path / "stopped")
    assert torch.equal(whole[0], resumed[0])
    assert whole[1] == resumed[1]


@pytest.fixture
def signals_are_heard():
    """What a shell starts in the background ignores Ctrl-C."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        assert signal.getsignal(number) == signal.default_int_handler
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_are_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("changes", [{}, {"workers": 1}, {"accumulate": 4}])
def test_a_signal_ends_training_after_its_step_with_the_state_saved(tmp_path, number, changes):
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", Line(stop_at=2, signals=[number]), **changes)
    assert steps_done(tmp_path / "stopped") == 3
    resumed = trained(tmp_path / "stopped", **changes)
    assert torch.allclose(whole[0], resumed[0], atol=1e-6)


@pytest.mark.usefixtures("signals_are_heard")
def test_sigterm_of_a_cluster_and_then_of_the_driver_saves_the_state(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, Line(stop_at=7, signals=[signal.SIGTERM, signal.SIGTERM]))
    assert steps_done(tmp_path) == 8


@pytest.mark.usefixtures("signals_are_heard")
def test_a_second_ctrl_c_ends_training_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, Line(stop_at=7, signals=[signal.SIGINT, signal.SIGINT]))
    assert steps_done(tmp_path) == 5


@pytest.mark.usefixtures("signals_are_heard")
def test_a_signal_in_the_last_step_comes_after_the_training(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, Line(stop_at=11, signals=[signal.SIGTERM]))
    assert not (tmp_path / "losses.csv").exists()


def test_micro_batches_see_the_same_data_and_noise_as_one_batch(tmp_path):
    whole, split = trained(tmp_path / "whole"), trained(tmp_path / "split", accumulate=4)
    assert torch.allclose(whole[0], split[0], atol=1e-6)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(tmp_path, workers):
    alone, helped = trained(tmp_path / "alone", workers=0), trained(tmp_path / "helped", workers=workers)
    assert torch.equal(alone[0], helped[0])
    assert alone[1] == helped[1]


class OneByOne(Dataset):
    """Batch n is that of step n; one of them goes wrong as a test wants it, in a worker."""

    def __init__(self, wrong=None):
        self.wrong = wrong

    def __getitem__(self, item):
        if item == 2 and self.wrong is not None:
            self.wrong()
        return batches(item)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_order_whatever_the_number_of_workers(workers):
    found = list(prepared(OneByOne(), range(3, 9), config(workers=workers), torch.device("cpu")))
    assert all(torch.equal(one["x"], batches(step)["x"]) for step, one in enumerate(found, 3))
    assert len(found) == 6


def leak():
    raise LeakageError("patient p1 is held out")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_the_error_of_the_training(workers):
    feed = prepared(OneByOne(leak), range(12), config(workers=workers), torch.device("cpu"))
    with pytest.raises(LeakageError, match=r"^patient p1 is held out$"):
        list(feed)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of torch's loader, when it is deleted
def test_a_killed_worker_is_one_line():
    feed = prepared(
        OneByOne(lambda: os.kill(os.getpid(), signal.SIGKILL)), range(12), config(workers=1), torch.device("cpu")
    )
    with pytest.raises(StorageError, match=r"prepares batches was killed .* set training.workers lower"):
        list(feed)


class Noted(OneByOne):
    """Notes the process of each batch."""

    def __init__(self, folder):
        self.folder = folder

    def __getitem__(self, item):
        (self.folder / str(os.getpid())).touch()
        return batches(item)


def train_slowly(folder):
    for _ in prepared(Noted(folder), range(10**6), config(workers=1), torch.device("cpu")):
        time.sleep(0.01)


def test_workers_die_with_their_training(tmp_path):
    training = multiprocessing.get_context("fork").Process(target=train_slowly, args=(tmp_path,))
    training.start()
    eventually(lambda: any(tmp_path.iterdir()))
    (worker,) = (int(file.name) for file in tmp_path.iterdir())
    training.kill()
    training.join()
    eventually(lambda: not is_running(worker))


def eventually(happened):
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process):
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


GB = 2**30


@pytest.mark.parametrize(
    ("cores", "gpu", "shared", "workers"),
    [
        (1, False, GB, 0),
        (2, True, GB, 0),
        (8, False, GB, 1),
        (4, True, GB, 3),
        (64, True, GB, 6),
        (64, True, 30_000, 5),
    ],
)
def test_workers_are_as_many_as_cores_devices_and_memory_allow(monkeypatch, cores, gpu, shared, workers):
    monkeypatch.setenv(CORES, str(cores))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=shared))
    assert devices.choose_workers(TrainingConfig(steps=1), lambda: 1000) == workers


def test_processes_of_one_training_share_its_cores(monkeypatch):
    for name, value in {CORES: "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert devices.choose_workers(TrainingConfig(steps=1), lambda: 1000) == 0


def test_training_on_a_gpu_is_in_tf32_and_leaves_the_arithmetic_as_it_was():
    def arithmetic():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark

    before = arithmetic()
    with devices.fast_arithmetic(torch.device("cpu")):
        assert arithmetic() == before
    with devices.fast_arithmetic(torch.device("cuda")):
        assert arithmetic() == ("high", True)
    assert arithmetic() == before


def compiled_by(monkeypatch, backend):
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))


def test_a_compiled_training_has_the_losses_and_the_names_of_an_ordinary_one(tmp_path, monkeypatch):
    compiled_by(monkeypatch, "eager")
    plain, model = trained(tmp_path / "plain"), Line()
    names = list(model.state_dict())
    assert trained(tmp_path / "compiled", model, compile=True)[1] == plain[1]
    assert list(model.state_dict()) == names


def test_a_machine_that_cannot_compile_is_named(tmp_path, monkeypatch):
    def without_a_compiler(*_):
        raise RuntimeError("no C++ compiler")

    compiled_by(monkeypatch, without_a_compiler)
    with pytest.raises(ConfigError, match=r"compile: .* no C\+\+ compiler.*; set training.compile to false"):
        trained(tmp_path / "x", compile=True)


def stopped(folder):
    with pytest.raises(KeyboardInterrupt):
        trained(folder, Line(stop_at=8))
    return folder / "last.ckpt"


def torn(state):
    return state[: len(state) // 2]


def with_a_flipped_bit(state):
    return state[:600] + bytes([state[600] ^ 1]) + state[601:]


@pytest.mark.parametrize("damage", [torn, with_a_flipped_bit, lambda _: b"not a checkpoint"])
def test_a_torn_state_is_set_aside_and_training_starts_anew(tmp_path, damage):
    whole, file = trained(tmp_path / "whole"), stopped(tmp_path / "again")
    file.write_bytes(damage(file.read_bytes()))
    found = file.read_bytes()
    with pytest.warns(UserWarning, match="is torn; it is now called last.ckpt.set-aside"):
        again = trained(tmp_path / "again")
    assert torch.equal(whole[0], again[0])
    assert file.with_name("last.ckpt.set-aside").read_bytes() == found


def test_a_state_of_another_version_is_set_aside(tmp_path):
    torch.save({"callbacks": {}}, tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="another version of counterstain"):
        trained(tmp_path)
    assert (tmp_path / "last.ckpt.set-aside").exists()


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("not enough memory")])
def test_a_reading_error_costs_no_step(tmp_path, monkeypatch, error):
    def unreadable(*_, **__):
        raise error

    whole, file = trained(tmp_path / "whole"), stopped(tmp_path / "again")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", unreadable)
        with pytest.raises(StorageError, match=r"last.ckpt: cannot be read .* run the command again"):
            trained(tmp_path / "again")
    assert steps_done(file.parent) == 5
    assert torch.equal(whole[0], trained(tmp_path / "again")[0])


def test_a_loss_that_is_no_number_stops_the_training(tmp_path):
    with pytest.raises(DivergenceError, match="step 4: loss is nan; lower the learning rate"):
        trained(tmp_path / "x", Line(diverge_at=3))


def test_a_training_that_fails_before_its_state_is_saved_leaves_its_folder_free(tmp_path):
    claim(tmp_path / "x", "train line", {})
    with pytest.raises(DivergenceError):
        trained(tmp_path / "x", Line(diverge_at=3))
    assert not (tmp_path / "x").exists()
    claim(tmp_path / "y", "train line", {})
    (tmp_path / "y" / "notes.txt").write_text("mine")
    with pytest.raises(DivergenceError):
        trained(tmp_path / "y", Line(diverge_at=3))
    assert (tmp_path / "y" / "run.json").exists()


def test_a_batch_that_micro_batches_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="batch_size 8 cannot be shared among 3"):
        build(TrainingConfig, {"steps": 1, "batch_size": 8, "accumulate": 3})
