"""A method of another package: one entry, and a study, a report and checkpoints know it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from small_study import SMALL, small_study

from counterstain.checkpoints import CheckpointHeader, is_finished, load_checkpoint, save_checkpoint
from counterstain.config import Config
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.errors import ConfigError
from counterstain.generators.methods import METHODS, Lazy, Method, Training, register
from counterstain.recipe import drawing_recipe, load_recipe
from counterstain.report.figures import colour_of
from counterstain.report.page import write_report
from counterstain.seeding import derive
from counterstain.study.config import load_study
from counterstain.study.plan import plan_study
from counterstain.study.run import run_study


class ToyConfig(Config):
    patches: int = 8
    noise: float = 20.0


def train_toy(cohort, config, out, *, size_px, seed):
    """Measure the mean colour of each label."""
    if is_finished(out):
        return
    sampler = PatchSampler(cohort, "train", size_px, SamplingConfig(), derive(seed, "data"))
    patches = [sampler[i] for i in range(config.patches)]
    pixels = np.concatenate([patch.image.reshape(-1, 3) for patch in patches])
    labels = np.concatenate([patch.label_mask.ravel() for patch in patches])
    shown = [pixels[labels == label] for label in range(cohort.taxonomy.num_labels)]
    colours = torch.tensor(np.array([part.mean(0) if len(part) else [128.0] * 3 for part in shown]))
    header = CheckpointHeader(
        kind="toy", taxonomy=cohort.taxonomy, size_px=size_px, mpp=cohort.mpp, config=config.model_dump(), seed=seed,
        patients_seen=cohort.patients("train"), cohort=cohort.fingerprint,
    )  # fmt: skip
    save_checkpoint(out, {"colours": colours}, header)


class Toy:
    method = "toy"

    def __init__(self, checkpoint, cohort, settings):
        self.header, state = load_checkpoint(checkpoint, "toy")
        self.colours, self.settings = state["colours"].numpy(), dict(settings)

    def draw(self, requests):
        return [self._drawn(request) for request in requests]

    def _drawn(self, request):
        noise = np.random.default_rng(request.seed).normal(0, self.settings["noise"], (*request.mask.shape, 3))
        return (self.colours[request.mask] + noise).clip(0, 255).astype(np.uint8)


TOY = Method(
    name="toy",
    title="Toy",
    colour="#123456",
    trainings=(Training(stage="toy", title="toy", config=ToyConfig, train=train_toy, drawing=("noise",)),),
    load=Toy,
    describe=lambda recipe: f"Toy: mean colours of {recipe.size_px} pixel patches.",
    data_sheet=lambda settings, recipe: {"Method": "Toy: drawn from the mask and noise", "Drawn with": "numpy"},
)


@pytest.fixture
def toy():
    with register(TOY):
        yield TOY


def test_a_study_runs_with_a_method_of_another_package_and_reports_it(toy, tmp_path):
    recipe = {name: value for name, value in SMALL["recipe"].items() if name != "spade"} | {"toy": {"patches": 4}}
    file = small_study(tmp_path, methods=["toy"], amounts=[1.0], repeats=1, recipe=recipe)
    results = run_study(load_study(file), tmp_path / "run")
    assert "toy+100" in set(pd.read_csv(results / "results.csv")["arm"])
    record = {
        "name": "toy+100",
        "mode": "subtype",
        "method": "toy",
        "amount": 1.0,
        "only": False,
        "auto": False,
        "variants": [],
    }
    assert record in json.loads((results / "study.json").read_text())["arms"]
    report = write_report(tmp_path / "run").read_text()
    assert "Toy: mean colours of 32 pixel patches." in report
    assert "Toy: drawn from the mask and noise" in report
    assert colour_of("toy") == "#123456"


def test_settings_of_drawing_rename_the_set_and_not_the_training(toy, tmp_path):
    def cells(noise):
        study = load_study(small_study(tmp_path, methods=["toy"], recipe=SMALL["recipe"] | {"toy": {"noise": noise}}))
        return {cell.stage: cell.folder for cell in plan_study(study, study.resolved_recipe("study"))}

    one, other = cells(1.0), cells(2.0)
    assert one["toy"] == other["toy"]
    assert one["synthetic"] != other["synthetic"]


def test_a_checkpoint_of_a_study_knows_how_its_recipe_draws(toy, tmp_path):
    changes = {"methods": ["toy"], "baselines": ["subtype"], "amounts": [0.5], "repeats": 1}
    file = small_study(tmp_path, **changes, recipe=SMALL["recipe"] | {"toy": {"noise": 3.0}})
    run_study(load_study(file), tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "cells").glob("toy-*")
    assert drawing_recipe(TOY, checkpoint).drawing(TOY) == {"noise": 3.0}
    assert drawing_recipe(TOY, checkpoint).size_px == 32


def test_settings_of_a_registered_method_are_checked_like_all_others(toy):
    assert load_recipe("demo", None, ["toy.patches=3"]).settings_of(TOY.trainings[0]) == ToyConfig(patches=3)
    with pytest.raises(ConfigError, match=r"toy\.patch: unknown key; did you mean patches\?"):
        load_recipe("demo", None, ["toy.patch=3"])


def test_without_the_method_its_settings_and_name_are_unknown(tmp_path):
    with pytest.raises(ConfigError, match="toy: unknown key"):
        load_recipe("demo", None, ["toy.patches=3"])
    with pytest.raises(ConfigError, match="expected one of spade, diffusion, inpainting, oracle"):
        load_study(small_study(tmp_path, methods=["toy"]))


def test_two_methods_cannot_have_one_name(toy):
    with pytest.raises(ConfigError, match="toy: registered already"):
        register(TOY)


@pytest.mark.parametrize("name", METHODS)
def test_every_entry_can_be_loaded(name):
    method = METHODS[name]
    lazy = [getattr(method.load, "func", method.load), method.describe, method.data_sheet]
    lazy += [part for training in method.trainings for part in (training.config, training.train, training.describe)]
    assert all(callable(entry.loaded) for entry in lazy if isinstance(entry, Lazy))
