"""The command line: one thin command per stage.

Heavy imports stand inside the commands, so that ``counterstain --help`` is instant. Errors of the user's to mend are
one line and exit status 2; anything else is a defect and exits with 1.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

import typer

# Newer versions of typer bring a click of their own: find the base of its errors, whichever click it is.
UsageProblem: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

INTERRUPTED = 130  # exit status after Ctrl-C, as shells count it

app = typer.Typer(
    name="counterstain",
    help="Balance the rare subtypes of a tissue class with generated images, and prove that it helped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes a quarter of a second to load
    context_settings={"max_content_width": 120},
)

COMMAND_MODULES = (  # in the order of the help
    "phantom", "data", "slides", "weights", "generators", "preview", "redraw", "audit", "segmenter", "predict",
    "export", "headroom", "study", "report", "doctor",
)  # fmt: skip

for _module in COMMAND_MODULES:
    importlib.import_module(f"counterstain.cli.{_module}").register(app)


def main() -> None:
    """Run the command line and exit with 0 (done), 1 (a defect), 2 (bad input) or 130 (Ctrl-C or SIGTERM)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = app(standalone_mode=False)
    except UsageProblem as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _stop()
    except Exception as error:
        from counterstain.errors import CounterstainError

        if not isinstance(error, CounterstainError):
            raise
        _fail(f"error: {error}", status=2)
    if status == INTERRUPTED:  # what newer versions of typer make of Ctrl-C
        _stop()
    sys.exit(status if isinstance(status, int) else 0)


def _stop() -> None:
    sys.stderr.write("stopped; give the same command again to go on, finished work is kept\n")
    sys.stderr.flush()
    # Taking the libraries down in order takes seconds, and whatever is on the disk survives being killed.
    os._exit(INTERRUPTED)


def _fail(line: str, *, status: int) -> None:
    sys.stderr.write(line + "\n")
    sys.exit(status)
