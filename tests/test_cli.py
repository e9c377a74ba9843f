import subprocess
import sys

import pytest
from typer.testing import CliRunner

import counterstain
from counterstain.cli import app, main


def status_of(*arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["counterstain", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_every_command_explains_itself():
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


HELP = """
import sys, counterstain.cli
sys.argv = ["counterstain", "--help"]
try: counterstain.cli.main()
except SystemExit: pass
"""


@pytest.mark.parametrize(
    ("what", "code", "heavy"),
    [
        ("help", HELP, {"torch", "numpy", "pandas", "pydantic", "rich"}),
        ("planning", "import sys, counterstain.study.plan, counterstain.study.status", {"torch", "diffusers"}),
    ],
)
def test_what_runs_nothing_loads_no_heavy_library(what, code, heavy):
    code += f"\nprint(*({heavy} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines()[-1] == "", what


def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    assert status_of("inspect", str(tmp_path / "nowhere"), monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


def test_a_wrong_option_is_status_2(monkeypatch):
    assert status_of("phantom", "--slidez", "3", monkeypatch=monkeypatch) == 2


@pytest.mark.parametrize("typer_tells_it_by", ["exception", "status"])
def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys, typer_tells_it_by):
    def stopped(**_):
        if typer_tells_it_by == "exception":
            raise KeyboardInterrupt
        return 130

    monkeypatch.setattr("counterstain.cli.app", stopped)
    monkeypatch.setattr("os._exit", sys.exit)
    assert status_of(monkeypatch=monkeypatch) == 130
    assert "give the same command again to continue" in capsys.readouterr().err


def test_a_method_that_does_not_exist_lists_those_that_do(monkeypatch, capsys):
    arguments = ("synthesize", "x", "--out", "y", "--method", "gan", "--count", "1")
    assert status_of(*arguments, monkeypatch=monkeypatch) == 2
    assert "expected one of spade, diffusion, inpainting, oracle" in capsys.readouterr().err


def test_the_public_names_are_sorted_and_there():
    assert list(counterstain.__all__) == sorted(counterstain.__all__)
    for name in counterstain.__all__:
        assert getattr(counterstain, name) is not None
