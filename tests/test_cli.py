import subprocess
import sys

import pytest

HELP = """
import sys, counterstain.cli
sys.argv = ["counterstain", "--help"]
try: counterstain.cli.main()
except SystemExit: pass
"""
IMPORT = """
import sys, counterstain
try: counterstain.import_slides(".", annotations=".", format="asap", labels="nowhere", mpp=1, out="nowhere")
except counterstain.CounterstainError: pass
"""


@pytest.mark.parametrize(
    ("what", "code", "heavy"),
    [
        ("help", HELP, {"torch", "numpy", "pandas", "pydantic", "rich"}),
        ("planning", "import sys, counterstain.study.estimate", {"torch", "diffusers"}),
        ("import", IMPORT, {"torch", "scipy.optimize"}),
    ],
)
def test_what_needs_no_heavy_library_loads_none(what, code, heavy):
    code += f"\nprint(*({heavy} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines()[-1] == "", what


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect", "nowhere"), "error: nowhere: no such cohort"),
        (("phantom", "--slidez", "3"), "No such option: --slidez"),
        (
            ("synthesize", "x", "--out", "y", "--method", "gan", "--count", "1"),
            "expected one of spade, diffusion, inpainting, oracle",
        ),
    ],
)
def test_bad_input_is_status_2(run, words, message):
    status, printed, error = run(*words)
    assert (status, printed) == (2, "")
    assert message in error


@pytest.mark.parametrize("typer_tells_it_by", ["exception", "status"])
def test_ctrl_c_says_how_to_go_on(run, monkeypatch, typer_tells_it_by):
    def stopped(**_):
        if typer_tells_it_by == "exception":
            raise KeyboardInterrupt
        return 130

    monkeypatch.setattr("counterstain.cli.app", stopped)
    monkeypatch.setattr("os._exit", sys.exit)
    status, _, error = run()
    assert status == 130
    assert "give the same command again to continue" in error
