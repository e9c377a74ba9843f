from __future__ import annotations

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import Line, trained

from counterstain import training_config
from counterstain.api import check_logger
from counterstain.errors import ConfigError, DivergenceError
from counterstain.storage import fingerprint
from counterstain.training_config import TrainingConfig


def on_board(folder):
    """Steps and values of the loss as TensorBoard shows them."""
    board = EventAccumulator(str(folder / "logs"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("loss")]


def in_table(folder):
    return pd.read_csv(folder / "logs" / "metrics.csv")[["step", "loss"]].to_numpy().tolist()


def whole(folder):
    """Whether TensorBoard, CSV and the training's own table hold the same curve."""
    losses = pd.read_csv(folder / "losses.csv")[["step", "value"]].to_numpy().tolist()
    return in_table(folder) == losses and dict(on_board(folder)) == pytest.approx(dict(losses))


class Told:
    """A logger that remembers what it is told."""

    def __init__(self):
        self.rows, self.status = [], None

    def log_metrics(self, values, step):
        self.rows.append((step, dict(values)))

    def log_hyperparams(self, settings):
        self.settings = settings

    def finalize(self, status):
        self.status = status


@pytest.fixture
def told(monkeypatch):
    logger = Told()
    monkeypatch.setitem(training_config.OPENERS, "mlflow", lambda *_: logger)
    monkeypatch.setattr(training_config, "find_spec", lambda _: True)
    return logger


def test_tensorboard_and_csv_are_always_written(tmp_path):
    trained(tmp_path / "a")
    assert whole(tmp_path / "a")


def test_the_curves_of_a_resumed_training_are_whole_and_nothing_is_there_twice(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "a", Line(stop_at=8))
    assert [step for step, _ in in_table(tmp_path / "a")] == list(range(1, 9))
    trained(tmp_path / "a")
    assert whole(tmp_path / "a")


def test_a_training_that_diverges_leaves_its_curves(tmp_path):
    with pytest.raises(DivergenceError):
        trained(tmp_path / "a", Line(diverge_at=3))
    assert [step for step, _ in in_table(tmp_path / "a")] == [1, 2, 3, 4]


def test_a_logger_changes_no_result(tmp_path, told):
    alone, logged = trained(tmp_path / "alone"), trained(tmp_path / "logged", logger="mlflow")
    assert torch.equal(alone[0], logged[0])
    assert alone[1] == logged[1]
    assert [step for step, _ in told.rows] == list(range(1, 13))
    assert told.status == "success"
    assert told.settings["steps"] == 12


def test_a_logger_hears_of_a_failure(tmp_path, told):
    with pytest.raises(DivergenceError):
        trained(tmp_path / "a", Line(diverge_at=3), logger="mlflow")
    assert told.status == "failed"


def test_a_logger_is_no_part_of_what_names_a_training():
    settings = [TrainingConfig(steps=3, logger=logger).model_dump(mode="json") for logger in (None, "wandb")]
    assert fingerprint(settings[0]) == fingerprint(settings[1])


def test_an_unknown_logger_and_a_missing_extra_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"--logger wandb: not installed; run: pip install 'counterstain\[wandb\]'"):
        check_logger("wandb")
    with pytest.raises(ConfigError, match="--logger comet: expected mlflow or wandb"):
        check_logger("comet")


def test_a_server_that_cannot_be_used_is_named_with_the_remedy(tmp_path, monkeypatch):
    def offline(folder, label):
        raise OSError("no route")

    monkeypatch.setattr(training_config, "find_spec", lambda _: True)
    monkeypatch.setitem(training_config.OPENERS, "wandb", offline)
    with pytest.raises(ConfigError, match=r"--logger wandb: cannot be used \(no route\); .*WANDB_MODE=offline"):
        trained(tmp_path / "a", logger="wandb")
