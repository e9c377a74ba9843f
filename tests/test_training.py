import os
import signal

import pytest
import torch
from lightning.pytorch import LightningModule

from counterstain.errors import ConfigError, DivergenceError
from counterstain.seeding import torch_generator
from counterstain.training import fit
from counterstain.training_config import TrainingConfig
from counterstain.training_state import steps_done


class Line(LightningModule):
    """A linear regression whose inputs are noised; stops itself where a test wants it to, at once or with signals."""

    def __init__(self, stop_at=None, diverge_at=None, signals=()):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(4, 1)
        self.stop_at, self.diverge_at, self.signals = stop_at, diverge_at, signals

    def training_step(self, batch, batch_idx):
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
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def batches(step):
    return {"x": torch.randn(8, 4, generator=torch_generator(1, step))}


def config(**changes):
    settings = {"steps": 12, "batch_size": 8, "accelerator": "cpu", "precision": "32"}
    return TrainingConfig(**settings | {"checkpoint_every_steps": 5, "log_every_steps": 1} | changes)


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
    assert steps_done(tmp_path / "stopped" / "last.ckpt") == 3
    resumed = trained(tmp_path / "stopped", **changes)
    assert torch.allclose(whole[0], resumed[0], atol=1e-6)


@pytest.mark.usefixtures("signals_are_heard")
def test_sigterm_of_a_cluster_and_then_of_the_driver_saves_the_state(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, Line(stop_at=7, signals=[signal.SIGTERM, signal.SIGTERM]))
    assert steps_done(tmp_path / "last.ckpt") == 8


@pytest.mark.usefixtures("signals_are_heard")
def test_a_second_ctrl_c_ends_training_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, Line(stop_at=7, signals=[signal.SIGINT, signal.SIGINT]))
    assert steps_done(tmp_path / "last.ckpt") == 5


@pytest.mark.usefixtures("signals_are_heard")
def test_a_signal_in_the_last_step_comes_after_the_training(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, Line(stop_at=11, signals=[signal.SIGTERM]))
    assert not (tmp_path / "losses.csv").exists()


def test_micro_batches_see_the_same_data_and_noise_as_one_batch(tmp_path):
    whole, split = trained(tmp_path / "whole"), trained(tmp_path / "split", accumulate=4)
    assert torch.allclose(whole[0], split[0], atol=1e-6)


def test_worker_processes_change_nothing(tmp_path):
    alone, helped = trained(tmp_path / "alone"), trained(tmp_path / "helped", workers=1)
    assert torch.equal(alone[0], helped[0])


def test_a_damaged_state_is_said_so_and_training_starts_anew(tmp_path):
    whole = trained(tmp_path / "whole")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "last.ckpt").write_bytes(b"not a checkpoint")
    with pytest.warns(UserWarning, match="damaged .* training starts anew"):
        again = trained(tmp_path / "damaged")
    assert torch.equal(whole[0], again[0])


def test_a_loss_that_is_no_number_stops_the_training(tmp_path):
    with pytest.raises(DivergenceError, match="step 4: loss is nan; lower the learning rate"):
        trained(tmp_path / "x", Line(diverge_at=3))


def test_a_batch_that_micro_batches_cannot_share_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size 8 cannot be shared among 3"):
        trained(tmp_path / "x", accumulate=3)
