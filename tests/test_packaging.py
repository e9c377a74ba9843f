"""What is shipped: the wheel, the container, the workflow, the citation, the documentation site."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "counterstain"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TINY_DEMO = (
    "cohort.phantom.slides=6", "cohort.phantom.regions_per_slide=1", "cohort.phantom.size_px=64",
    "cohort.split={train: 2, val: 2, test: 2}", "methods=[spade]", "extra_arms=[]", "repeats=1",
    "recipe.spade.training.steps=2", "recipe.segmenter.training.steps=2", "recipe.segmenter.inference.window_px=64",
    "recipe.segmenter.mixing.epoch_patches=64",
)  # fmt: skip


def test_every_file_of_the_package_is_shipped():
    patterns = SETTINGS["tool"]["setuptools"]["package-data"]["counterstain"]
    others = [f.relative_to(PACKAGE).as_posix() for f in PACKAGE.rglob("*") if f.is_file() and f.suffix != ".py"]
    others = [name for name in others if "__pycache__" not in name]
    assert {"py.typed", "__init__.pyi", "report/page.css", "presets/best.yaml"} <= set(others)
    assert [name for name in others if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []


@pytest.mark.long
def test_the_wheel_runs_outside_of_the_checkout(tmp_path):
    source, fresh, empty = (tmp_path / name for name in ("source", "fresh", "empty"))
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("counterstain-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("counterstain/")}
    assert packed == {f.relative_to(ROOT / "src").as_posix() for f in PACKAGE.rglob("*.*") if f.suffix != ".pyc"}
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", fresh, wheel], check=True)
    empty.mkdir()

    def run(*words, code="from counterstain.cli import main; main()"):
        found = subprocess.run(
            [sys.executable, "-P", "-c", code, *words], cwd=empty, text=True, capture_output=True, check=False,
            env=os.environ | {"PYTHONPATH": str(fresh), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        return found.stdout

    assert run(code="import counterstain; print(counterstain.__file__)").strip() == str(
        fresh / "counterstain/__init__.py"
    )
    assert "init" in run("--help")
    for preset in ("paper", "best", "demo"):
        assert "size_px" in run("config", "show", "--preset", preset)
    changes = [word for setting in TINY_DEMO for word in ("--set", setting)]
    assert "report.html" in run("demo", "--out", "demo", "--processes", "1", *changes)
    assert (empty / "demo" / "report.html").stat().st_size > 100_000


def test_the_image_is_built_from_files_that_are_there_and_not_left_out():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    names = " ".join(copied).split()
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {"pyproject.toml", "constraints.txt", "src"} <= set(names)
    for name in names:
        assert (ROOT / name).exists()
        assert f"!{name}" in kept
    assert "://" not in text


def test_the_workflow_runs_targets_that_there_are():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    targets = {target for command in commands for target in re.findall(r"make ([\w-]+)", command)}
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"setup", "check", "test", "docs"} <= targets <= set(known)
    assert "secrets." not in str(workflow)


def test_the_citation_has_the_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == SETTINGS["project"]["version"]
    (paper,) = citation["references"]
    assert (paper["authors"][0]["family-names"], paper["year"]) == ("Öttl", 2023)


def test_the_navigation_of_the_site_leads_to_pages_that_there_are():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    shown = set(re.findall(r"[\w-]+\.md", str(site["nav"])))
    made = {"index.md", "api.md", "changes.md"}  # of the README, the docstrings and the changes
    assert made < shown <= made | {page.name for page in (ROOT / "docs").glob("*.md")}
    assert site["strict"]
    assert site["theme"]["font"] is False
