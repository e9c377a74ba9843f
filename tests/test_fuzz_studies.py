"""Damaged folders of finished studies: the same results, one line, or made again; in time, in little memory.

COUNTERSTAIN_FUZZ sets how many are tried: an eighth of it, as each takes seconds (6 by default).
"""

import os
import shutil

import numpy as np
import pytest
from damage import answer, damage, fuzzed
from drawn_cohort import draw_region, store
from hypothesis import Phase, given
from hypothesis import strategies as st
from small_study import small_study
from typer.testing import CliRunner

import counterstain as cs
from counterstain.cli import app
from counterstain.report import page
from counterstain.report.results import read_results

TRIALS = max(1, int(os.environ.get("COUNTERSTAIN_FUZZ", "48")) // 8)
FIGURES = {  # what a command writes
    "run": ("results", ("results.csv", "composition.csv", "synthetic.csv", "losses.csv")),
    "test": ("external/theirs", ("results.csv", "differences.csv")),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A finished study that was tested on another cohort."""
    folder = tmp_path_factory.mktemp("sound")
    cs.run_study(small_study(folder, amounts=[1.0], repeats=1), out=folder / "run")
    rng = np.random.default_rng(7)
    store(folder / "theirs", *(draw_region(rng, f"{patient}-0", patient) for patient in ("q0", "q1", "q2")), mpp=1.0)
    cs.test_study(folder / "run", folder / "theirs")
    return folder


@pytest.fixture(scope="module", autouse=True)
def figures_once(sound):
    """Draw the figures of a report once: nine tenths of its time, and test_fuzz_folders.py draws them."""
    results = read_results(sound / "run")
    figures = page.draw_figures(results, None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(page, "draw_figures", lambda *_: figures)
        patched.setattr(page.figures, "svg_text", lambda _: "")
        yield


def done(*words):
    """Give a command; say that it went, or raise what it raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception:
        raise result.exception
    return True


def files_of(folder, *names):
    """The text of files; of all in the folder, where none is named."""
    return {name: (folder / name).read_text() for name in names or sorted(file.name for file in folder.iterdir())}


@pytest.fixture(scope="module")
def shown(sound, figures_once, tmp_path_factory):
    """The tables of the sound study's report."""
    folder = tmp_path_factory.mktemp("shown")
    done("report", sound / "run", "--tables", folder, "--out", folder.with_suffix(".html"))
    return files_of(folder)


@fuzzed(TRIALS, phases=[Phase.generate])
@given(data=st.data(), first=st.sampled_from(["status", "clean", "test", "report", "run"]))
def test_a_damaged_study_gives_the_same_results_or_one_line(sound, shown, tmp_path, data, first):
    place = tmp_path / "inside"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound, place)
    run, tables = place / "run", place / "tables"
    where = damage(data, run)
    commands = {
        "status": ("study", "status", run),
        "clean": ("study", "clean", place / "study.yaml", "--out", run, "--yes"),
        "test": ("study", "test", run, place / "theirs"),
        "report": ("report", run, "--tables", tables),
        "run": ("study", "run", place / "study.yaml", "--out", run),
    }
    for name in dict.fromkeys((first, "run")):
        went = answer(done, *commands[name])
        if went and name == "report":
            assert files_of(tables) == shown, where
            shutil.rmtree(tables)
        if went and name in FIGURES:
            folder, names = FIGURES[name]
            assert files_of(run / folder, *names) == files_of(sound / "run" / folder, *names), where
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert {path.name for path in place.iterdir()} == {"run", "theirs", "study.yaml"}
