import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from drawn_cohort import draw_cohort
from small_study import SMALL
from typer.testing import CliRunner

from counterstain.api import studies
from counterstain.cli import app
from counterstain.errors import ConfigError, CounterstainError, DivergenceError, InputError, MismatchError
from counterstain.report.page import write_report
from counterstain.report.results import read_results
from counterstain.study import executors as attempt_module
from counterstain.study import results as results_module
from counterstain.study import stages
from counterstain.study.config import load_study
from counterstain.study.plan import plan_study
from counterstain.study.run import locked, run_study

RECIPE = SMALL["recipe"] | {"segmenter": SMALL["recipe"]["segmenter"] | {"mixing": {"epoch_patches": 8}}}
TINY = SMALL | {
    "name": "tiny",
    "methods": ["spade", "oracle"],
    "amounts": [0.5, 1.0],
    "repeats": 1,
    "resources": {},
    "recipe": RECIPE,
}


def study_file(folder, **changes):
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(TINY | changes))
    return file


def load(folder, *overrides, **changes):
    return load_study(study_file(folder, **changes), list(overrides))


def cells(folder, *overrides):
    study = load(folder, *overrides)
    return plan_study(study, study.resolved_recipe("study"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run_study(load(folder), folder / "run")
    return folder


def test_the_arms_are_named_as_the_paper_counts_them(tmp_path):
    names = [arm.name for arm in load(tmp_path, methods=["spade", "diffusion"], amounts=[0.5, 4]).arms]
    assert names == ["tumor", "subtype", "spade+50", "spade+400", "diffusion+50", "diffusion+400"]


def test_generators_and_sets_are_shared_between_arms_and_repeats(tmp_path):
    planned = cells(tmp_path, "methods=[diffusion, inpainting]", "amounts=[1, 2]", "repeats=3")
    shared = {"synthetic": 2, "cohort": 1, "autoencoder": 1, "diffusion": 1}
    assert Counter(cell.stage for cell in planned) == {"segmenter": 18, "evaluation": 18} | shared


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("recipe.segmenter.lr=0.5", {"segmenter", "evaluation"}),
        ("recipe.synthesis.attempts=2", {"synthetic", "segmenter", "evaluation"}),
        ("recipe.spade.latent=3", {"spade", "synthetic", "segmenter", "evaluation"}),
        ("repeats=2", set()),
        ("amounts=[1.0, 4.0]", set()),
    ],
)
def test_a_change_renames_only_what_depends_on_it(tmp_path, override, changed):
    before = {cell.name: cell.folder for cell in cells(tmp_path)}
    after = cells(tmp_path, override)
    assert {cell.stage for cell in after if before.get(cell.name, cell.folder) != cell.folder} == changed


def test_arms_of_a_repeat_share_initialisation_and_order_of_data(tmp_path):
    seeds = {}
    for cell in cells(tmp_path, "repeats=2"):
        if cell.stage == "segmenter":
            seeds.setdefault(cell.repeat, set()).add(cell.settings["seed"])
    assert [len(found) for found in seeds.values()] == [1, 1]
    assert seeds[0] != seeds[1]


def test_a_study_ends_with_results_and_a_report(finished):
    results = read_results(finished / "run")
    rows = results.results
    assert set(rows["arm"]) == {"tumor", "subtype", "spade+50", "spade+100", "oracle+50", "oracle+100"}
    assert set(rows["split"]) == {"val", "test"}
    assert list(rows.columns[:5]) == ["arm", "repeat", "split", "dice", "subtype_variance"]
    assert rows["dice"].between(0, 1).all()
    assert results.examples
    assert set(results.synthetic["method"]) == {"spade", "oracle"}
    assert "ceiling, phantom only" in write_report(finished / "run").read_text()


def test_running_again_runs_nothing_and_changes_nothing(finished, monkeypatch):
    names = ("results.csv", "study.json")
    before = [(finished / "run" / "results" / name).read_bytes() for name in names]
    other = {"versions": {"torch": "of this process, which trains nothing"}, "device": "other"}
    monkeypatch.setattr(results_module, "software", lambda: other)
    monkeypatch.setattr(attempt_module, "run_cell", lambda *_: pytest.fail("a finished cell ran again"))
    run_study(load(finished), finished / "run")
    assert [(finished / "run" / "results" / name).read_bytes() for name in names] == before


def test_a_training_that_diverges_is_recorded_and_the_rest_goes_on(finished, tmp_path, monkeypatch):
    real = stages.train_segmenter

    def diverging(*arguments, label, **options):
        if "spade+100" in label:
            raise DivergenceError("step 1: loss is nan")
        return real(*arguments, label=label, **options)

    monkeypatch.setattr(stages, "train_segmenter", diverging)
    run_study(load(tmp_path, "methods=[spade]"), tmp_path / "run")
    results = read_results(tmp_path / "run")
    assert "spade+100" not in set(results.results["arm"])
    assert "spade+50" in set(results.results["arm"])
    assert [failure.why for failure in results.study.failed] == ["step 1: loss is nan", "an input of it failed"]


def test_a_study_without_any_result_says_what_failed_first(tmp_path, monkeypatch):
    def diverging(*_, **_options):
        raise DivergenceError("step 1: loss is nan")

    monkeypatch.setattr(stages, "train_segmenter", diverging)
    with pytest.raises(InputError, match=r"no arm has a result; the first failure: segmenter .* loss is nan"):
        studies.run_study(load(tmp_path, "methods=[]"), out=tmp_path / "run")


@pytest.mark.parametrize("fewer", [{}, {"train_patients": 2}], ids=["whole", "fewer patients"])
def test_a_study_goes_on_where_its_cohort_was_moved_to(tmp_path, fewer):
    def run(repeats):
        return run_study(load(tmp_path, methods=[], cohort=given | fewer, repeats=repeats), tmp_path / "run")

    given = {"path": str(draw_cohort(tmp_path / "here", regions=1).folder)}
    run(1)
    given["path"] = str((tmp_path / "here").rename(tmp_path / "there"))
    results = read_results(run(2))
    assert set(results.results["repeat"]) == {0, 1}
    assert results.study.cohort.regions == (4 if fewer else 5)  # those that no part has do not count
    assert set(results.composition["split"]) == {"train", "val", "test"}


def test_the_copy_of_a_study_in_its_own_folder_is_the_same_study(tmp_path):
    draw_cohort(tmp_path / "cohort", regions=1)
    study = load(tmp_path, methods=[], cohort={"path": "cohort"})
    run_study(study, tmp_path / "run")
    again = load_study(tmp_path / "run" / "study.yaml")
    assert plan_study(again, again.resolved_recipe("again")) == plan_study(study, study.resolved_recipe("study"))


def test_the_folder_of_another_study_is_not_cleaned(finished, tmp_path):
    before = sorted((finished / "run" / "cells").iterdir())
    words = ["study", "clean", str(study_file(tmp_path, name="other")), "--out", str(finished / "run"), "--yes"]
    assert isinstance(CliRunner().invoke(app, words).exception, MismatchError)
    assert sorted((finished / "run" / "cells").iterdir()) == before


def test_a_folder_that_is_in_use_or_of_another_study_is_refused(finished, tmp_path):
    with locked(finished / "run"), pytest.raises(MismatchError, match="another process is running this study"):
        run_study(load(finished), finished / "run")
    with pytest.raises(MismatchError, match="belongs to another run"):
        run_study(load(tmp_path, name="other"), finished / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeat": 2}, r"repeat: unknown key; did you mean repeats\?"),
        ({"amounts": [-1.0]}, r"amounts.0: Input should be greater than 0 \(got -1.0\)"),
        ({"amounts": [100]}, r"100 is \+10,000 % .*; 1.0 is \+100 %: did you mean 1\?"),
        ({"methods": ["gan"]}, "methods.0: expected one of spade, diffusion, inpainting, oracle"),
        ({"baselines": ["tumor"]}, "subtype must be among them"),
        ({"cohort": {}}, "give either path .* or phantom"),
        ({"cohort": {"path": "somewhere"}}, "the oracle draws phantoms only"),
        ({"recipe": {"spade": {"laten": 3}}}, r"study.yaml: recipe: spade.laten: unknown key; did you mean latent\?"),
    ],
)
def test_a_wrong_study_is_rejected_when_it_is_read(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"--set spade: belongs to the recipe of the study; write --set recipe"):
        load(tmp_path, "spade.training.steps=5")


def test_a_missing_cohort_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such cohort"):
        run_study(load(tmp_path, cohort={"path": "nowhere"}, methods=["spade"]), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"size_px": 128},
            r"3 of 3 regions are smaller than a patch of 128 px: p0-0 \(96 x 96 px\), .*; make patches 96 px",
        ),
        ({"parts": {"p3": "test"}}, "no region in split 'val'"),
        ({"size_px": 80}, "size_px 80: a segmenter needs patches whose edge is a multiple of 32"),
        ({"autoencoder": {"factor": 8}, "diffusion": {"multipliers": [1, 2, 3, 4]}}, "need a multiple of 64"),
    ],
)
def test_a_cohort_that_does_not_fit_is_met_in_the_plan(tmp_path, changes, message):
    cohort = draw_cohort(tmp_path / "cohort", regions=1)
    parts = dict(zip(cohort.regions["patient"], cohort.regions["split"], strict=True))
    cohort.write_split(parts | changes.pop("parts", {}))
    methods = ["diffusion" if "diffusion" in changes else "spade"]
    file = study_file(tmp_path, methods=methods, cohort={"path": "cohort"}, recipe=RECIPE | changes)
    result = CliRunner().invoke(app, ["study", "plan", str(file)])
    assert isinstance(result.exception, CounterstainError)
    assert re.search(message, str(result.exception))


def test_packages_and_files_that_are_not_there_are_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("counterstain.generators.methods.find_spec", lambda _: None)
    changes = ["methods=[diffusion]", "recipe.autoencoder.lpips_weight=1", "recipe.segmenter.encoder_weights=no.pt"]
    file = study_file(tmp_path)
    settings = [word for change in changes for word in ("--set", change)]
    planned = CliRunner().invoke(app, ["study", "plan", str(file), *settings])
    for lacking in (
        "segmenter.encoder_weights no.pt: no such weights file",
        "autoencoder.lpips_weight is above 0, but lpips",
    ):
        assert f"not yet on this machine: {lacking}" in planned.output
    with pytest.raises(ConfigError, match=r"no\.pt: no such weights file, .* pip install 'counterstain\[lpips\]'"):
        run_study(load_study(file, changes), tmp_path / "run")
    assert not (tmp_path / "run" / "cells").exists()
    with pytest.raises(ConfigError, match="resnet999"):
        run_study(load_study(file, ["recipe.segmenter.encoder=resnet999"]), tmp_path / "run")


def test_a_study_killed_at_any_moment_ends_with_the_same_results(finished, tmp_path):
    whole = (finished / "run" / "results" / "results.csv").read_bytes()
    command = [sys.executable, "-m", "counterstain", "study", "run", str(study_file(tmp_path))]
    command += ["--out", str(tmp_path / "run")]
    for cells_done in (1, 5):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONWARNINGS": "ignore"})
        deadline = time.monotonic() + 240
        while process.poll() is None and _done(tmp_path) < cells_done:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert (tmp_path / "run" / "results" / "results.csv").read_bytes() == whole


def _done(folder: Path) -> int:
    return len(list(folder.glob("run/cells/*/cell.json")))
