import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from counterstain.config import (
    REMOVED_SETTINGS,
    Config,
    build,
    build_stored,
    merge,
    parse_overrides,
    read_yaml,
    to_yaml,
)
from counterstain.errors import ConfigError
from counterstain.recipe import Recipe, load_recipe
from counterstain.seeding import derive, numpy_generator, torch_generator


def test_derived_seeds_never_change_between_versions():
    assert derive(0) == 4761921975702974394
    assert derive(0, "patch", 7) == 5766305853157369814
    assert numpy_generator(1, "a").integers(2**32) == 3840814416


def test_derived_seeds_are_the_same_in_every_process():
    command = "from counterstain.seeding import derive; print(derive(3, 'x', 4))"
    environment = {"PYTHONHASHSEED": "77"}
    printed = subprocess.run([sys.executable, "-c", command], capture_output=True, check=True, env=environment)
    assert int(printed.stdout) == derive(3, "x", 4)


@pytest.mark.parametrize("keys", [("patch", 8), ("patc", 7), ("patch", "7"), (7, "patch"), ("patch",), ("patch", 7, 0)])
def test_other_keys_give_other_seeds(keys):
    assert derive(0, *keys) != derive(0, "patch", 7)


def test_seeds_fit_torch():
    assert all(0 <= derive(seed, "k") < 2**63 for seed in range(200))
    torch_generator(2**62, "k")


def test_torch_generators_depend_on_their_keys():
    import torch

    drawn = [torch.randn(3, generator=torch_generator(0, "noise", i)) for i in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ("-1", r"workers: Input should be greater than or equal to 0 or 'auto' \(got -1\)$"),
        ("many", r"workers: Input should be a valid integer, .* or 'auto' \(got 'many'\)$"),
    ],
)
def test_a_setting_with_alternatives_names_them_once(workers, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("best", None, [f"segmenter.training.workers={workers}"])


RESULTS = Path(__file__).parents[1] / "docs" / "results"


class Training(Config):
    steps: Annotated[int, Field(ge=1)] = 100
    lr: float = 1e-4


class Study(Config):
    name: str
    training: Training = Training()
    arms: tuple[str, ...] = ()


def test_a_configuration_survives_a_round_trip_through_yaml(tmp_path):
    config = Study(name="demo", training=Training(steps=7, lr=3e-5), arms=("tumor", "spade+50"))
    (tmp_path / "study.yaml").write_text(to_yaml(config))
    assert build(Study, read_yaml(tmp_path / "study.yaml")) == config


def test_an_unknown_key_is_told_the_nearest_one():
    with pytest.raises(ConfigError, match=r"study\.yaml: training\.step: unknown key; did you mean steps\?"):
        build(Study, {"name": "a", "training": {"step": 3}}, "study.yaml")


def test_an_unknown_key_unlike_any_other_is_told_all_known_ones():
    with pytest.raises(ConfigError, match=r"settings: zzz: unknown key; known here: arms, name, training"):
        build(Study, {"name": "a", "zzz": 3})


def test_a_value_out_of_range_is_named_with_its_place():
    with pytest.raises(ConfigError, match=r"training\.steps: .*greater than or equal to 1 \(got 0\)"):
        build(Study, {"name": "a", "training": {"steps": 0}})


def test_all_faults_are_named_at_once():
    with pytest.raises(ConfigError, match=r"name: required; training\.lr: .*valid number.* \(got 'fast'\)$"):
        build(Study, {"training": {"lr": "fast"}})
    with pytest.raises(ConfigError, match=r"\(and 3 more\)$"):
        build(Study, {"name": "a", "arms": [1, 2, 3, 4, 5, 6, 7]})


def test_a_constructor_says_the_same_in_one_line_and_prints_what_was_set():
    with pytest.raises(ConfigError, match=r"^Study: training\.step: unknown key; did you mean steps\?$"):
        Study(name="a", training={"step": 3})
    with pytest.raises(ConfigError, match=r"^Study: arms: expected a list, such as \[a, b\] \(got 'tumor'\)$"):
        Study(name="a", arms="tumor")
    assert repr(Study(name="a", training={"lr": 3})) == "Study(name='a', training=Training(lr=3.0))"


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_a_setting_that_is_no_finite_number_is_refused(value):
    with pytest.raises(ConfigError, match=r"training\.lr: .*finite number"):
        build(Study, {"name": "a"} | parse_overrides([f"training.lr=.{value}".replace(".-", "-.")]))


EXPLODING = "\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 30))])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 2026-13-45", "month must be in"),
        ("a: !!int x", "invalid literal"),
        ("a: !!timestamp x", "does not fit"),
        ("a: !!python/name:os.system", "tag:yaml.org"),
        ("[" * 5000, "nested too deeply"),
        ("a: &a [*a]", "contains itself"),
        (EXPLODING, "values once its aliases"),
        ("a: 1\na: 2", "is there twice"),
        ("a: " + "9" * 6000, "cannot hold"),
        ("a: \x00", "unacceptable character"),
        ("x" * 2_000_000, "larger than 1 MB"),
    ],
)
def test_hostile_yaml_is_refused_in_one_short_line(tmp_path, text, why):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ConfigError, match=why) as found:
        read_yaml(tmp_path / "study.yaml")
    assert len(str(found.value)) < len(str(tmp_path)) + 400
    assert "\n" not in str(found.value)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Training().steps = 3


def test_overrides_are_nested_and_typed():
    assert parse_overrides(["training.steps=5", "training.lr=1.0e-3", "arms=[tumor]"]) == {
        "training": {"steps": 5, "lr": 1e-3},
        "arms": ["tumor"],
    }


@pytest.mark.parametrize("assignment", ["steps", "=3", "a..b=3"])
def test_an_override_without_key_or_value_shows_how_it_is_done(assignment):
    with pytest.raises(ConfigError, match=r"--set .*expected KEY=VALUE, for example"):
        parse_overrides([assignment])


def test_an_override_that_is_not_yaml_is_an_error():
    with pytest.raises(ConfigError, match="the value is not YAML"):
        parse_overrides(["a=[1"])


def test_merging_keeps_what_is_not_changed():
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert merge(base, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}, "d": 1}
    assert base["a"] == {"b": 1, "c": [1, 2]}


def test_a_mapping_laid_over_another_by_yaml_itself_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}\n")
    assert read_yaml(tmp_path / "a.yaml")["d"] == {"b": 3, "c": 2}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"a.yaml: not YAML \(while parsing a flow sequence at line 1, column 4"),
        ("- a", "expected settings, .* found a list"),
        ("a: {T: 1,\n T: 2}", r"'T' is there twice .* line 2"),
    ],
)
def test_a_file_that_is_no_plain_mapping_is_an_error(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "a.yaml")


def test_saved_settings_may_hold_what_is_a_constant_now(monkeypatch):
    monkeypatch.setitem(REMOVED_SETTINGS, "Training", {"momentum": (0.9,)})
    saved = {"name": "a", "training": {"steps": 3, "momentum": 0.9}}
    assert build_stored(Study, saved) == Study(name="a", training=Training(steps=3))
    saved["training"]["momentum"] = 0.5
    with pytest.raises(ConfigError, match=r"model\.json: momentum is 0\.5, but is always 0\.9 since this version"):
        build_stored(Study, saved, "model.json")


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*/study.json")), ids=lambda file: file.parent.name)
def test_recipes_of_earlier_versions_still_open(file):
    assert build_stored(Recipe, json.loads(file.read_text())["config"]["recipe"], file).size_px >= 32
