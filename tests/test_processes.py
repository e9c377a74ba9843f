import os
import warnings
from pathlib import Path

import pytest

from counterstain.errors import ConfigError, InputError, StorageError
from counterstain.processes import ExecutorConfig, executor_of, shared_out
from counterstain.storage import read_json

TWO = ExecutorConfig(processes=2)


@pytest.mark.parametrize("where", [ExecutorConfig(), TWO])
def test_results_warnings_and_errors_come_in_the_order_of_the_items(where: ExecutorConfig, tmp_path: Path):
    texts = ["first", "second"]
    with shared_out(where) as spread:
        assert list(spread(pow, [2, 3], [3, 2])) == [8, 9]
        with pytest.warns() as said:
            list(spread(warnings.warn, texts))
    assert [str(warning.message) for warning in said] == texts
    with pytest.raises(InputError, match=r"b\.json: no such file"), shared_out(where) as spread:  # noqa: PT012
        (tmp_path / "a.json").write_text("1")
        results = iter(spread(read_json, [tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"]))
        assert next(results) == 1
        next(results)


def test_a_process_that_is_killed_is_one_line_and_not_a_wait_without_end():
    with pytest.raises(StorageError, match="a process was killed"), shared_out(TWO) as spread:
        list(spread(os._exit, [1, 1]))


def test_options_that_do_not_fit_together_are_named():
    assert executor_of("local", 2, None) == TWO
    for kind, processes, address in (("ray", 2, None), ("local", None, "auto")):
        with pytest.raises(ConfigError, match="--processes goes with --executor local"):
            executor_of(kind, processes, address)
