"""The public API: what it holds, how it answers, and what the documents say of it."""

import doctest
import importlib
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
from drawn_cohort import draw_cohort, draw_set
from typer.testing import CliRunner

import counterstain
import counterstain as cs
from counterstain.cli import COMMANDS, app
from counterstain.errors import ConfigError
from counterstain.generators.methods import METHODS

DOCS = Path(__file__).parent.parent / "docs"


def test_every_command_is_a_public_function_with_the_same_arguments():
    groups = {group.typer_instance: [group.name] for group in app.registered_groups}
    for group, commands in COMMANDS.items():
        for command, verb, *_ in commands:
            assert getattr(cs, verb.__name__) is verb
            printed = CliRunner().invoke(app, [*groups.get(group, ()), command, "--help"]).output
            for name in inspect.signature(verb).parameters:
                option = "set" if name == "settings" else name.replace("_", "-")
                assert name.upper() in printed or f"--{option}" in printed


def test_functions_keep_their_names_when_the_packages_of_these_names_are_imported():
    importlib.import_module("counterstain.audit.audit")
    importlib.import_module("counterstain.report.page")
    assert inspect.isfunction(cs.audit)
    assert inspect.isfunction(cs.report)


def test_every_public_name_is_listed_and_says_what_it_is():
    assert set(cs.__all__) < set(dir(cs))
    for name in dir(cs):
        assert inspect.getdoc(getattr(cs, name))
        assert re.search(rf"\b{name}\b", cs.__doc__), f"{name}: not in what help(counterstain) begins with"


def test_settings_may_be_a_mapping_or_assignments():
    as_mapping = cs.config_show(preset="demo", settings={"spade.latent": 8})
    assert as_mapping == cs.config_show(preset="demo", settings=["spade.latent=8"])
    assert as_mapping == cs.config_show(preset="demo", settings="spade.latent=8")
    assert "latent: 8" in as_mapping


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("train", {"network": "spade", "seed": "a"}, r"train: seed: expected a whole number \(got 'a'\)"),
        ("train", {"network": "spade", "seed": True}, "expected a whole number"),
        ("split", {"train": "8"}, r"split: train: expected a number \(got '8'\)"),
        ("split", {"force": 1}, "expected True or False"),
        ("synthesize", {"method": "oracle", "count": 3.5}, "count: expected a whole number"),
        ("train", {"network": "spade", "out": None}, r"out: expected a path \(got None\)"),
        ("redraw", {"method": "oracle", "region": 3}, "region: expected a list of names or None"),
        ("train", {"network": "spade", "cohort": 3}, "cohort: expected a path or a Cohort"),
        ("config_explain", {"key": None}, "key: expected text"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_refused_before_a_folder_is_claimed(tmp_path, function, arguments, message):
    verb, out = getattr(cs, function), tmp_path / "out"
    given = {name: out for name in ("cohort", "out") if name in inspect.signature(verb).parameters}
    with pytest.raises(ConfigError, match=message):
        verb(**given | arguments)
    assert not out.exists()


def test_a_setting_is_explained_with_its_value_in_every_preset():
    text = cs.config_explain("spade.training.steps")
    assert "paper 100000, best 50000, demo 300" in text
    assert "Optimiser steps" in text


def test_a_setting_without_its_path_is_suggested():
    with pytest.raises(ConfigError, match=r"did you mean .*spade.training.steps"):
        cs.config_show(settings=["steps=10"])
    with pytest.raises(ConfigError, match=r"did you mean spade.latent"):
        cs.config_explain("latent")


def test_the_reference_of_settings_in_the_documents_is_up_to_date():
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == cs.config_reference()


def test_the_schema_knows_every_setting_of_a_study_and_of_its_recipe():
    schema = json.loads(json.dumps(cs.config_schema()))
    assert {"name", "cohort", "methods", "recipe"} <= set(schema["properties"])
    recipe = schema["$defs"]["Recipe"]
    assert {"spade", "diffusion", "segmenter"} <= set(recipe["properties"])
    assert "required" not in recipe
    assert schema["$defs"]["SpadeConfig"]["properties"]["latent"]["description"]


def test_the_taxonomy_template_is_a_taxonomy(tmp_path):
    (tmp_path / "taxonomy.yaml").write_text(cs.config_taxonomy())
    assert cs.Taxonomy.load(tmp_path / "taxonomy.yaml").tissue_class == "tumour"


@pytest.mark.parametrize(("document", "picture"), [("tutorial.md", "preview.png"), ("generators.md", "flat.png")])
def test_the_code_of_the_documents_runs_as_it_stands(tmp_path, monkeypatch, document, picture):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / document).read_text(encoding="utf-8")
    code = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    exec(compile("\n".join(code), document, "exec"), {})
    assert (tmp_path / picture).stat().st_size > 10_000
    assert "flat" not in METHODS


def test_the_tree_of_the_architecture_lists_every_module():
    tree = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("## The rooms")[2].split("```")[1]
    modules = [path.name for path in Path(cs.__file__).parent.rglob("*.py") if not path.name.startswith("__")]
    listed = [line.split()[0] for line in tree.splitlines() if line.split()[:1] and line.split()[0].endswith(".py")]
    assert sorted(listed) == sorted([*modules, "__init__.py"])


PUBLIC = {name: getattr(counterstain, name) for name in dir(counterstain)}
CLASSES = [c for c in PUBLIC.values() if inspect.isclass(c) and not issubclass(c, Exception)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a cohort and a synthetic set, as after a tutorial."""
    folder = tmp_path_factory.mktemp("examples")
    draw_set(folder / "synthetic", draw_cohort(folder / "cohort"))
    return folder


@pytest.mark.parametrize("public", CLASSES, ids=lambda public: public.__name__)
def test_the_example_of_a_public_class_runs(public, folder, monkeypatch):
    monkeypatch.chdir(folder)
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(public))
    assert examples, f"{public.__name__} has no example"
    test = doctest.DocTest(examples, {**PUBLIC, "np": np}, public.__name__, inspect.getsourcefile(public), 0, None)
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0
