"""The examples in the docstrings of public classes run as they stand, beside a small cohort and a synthetic set."""

import doctest
import inspect

import numpy as np
import pytest
from drawn_cohort import draw_cohort, draw_set

import counterstain

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
