"""The command line: one thin command per stage.

Heavy imports stand inside the commands, so that ``counterstain --help`` is instant. Errors of the user's to mend are
one line and exit status 2; anything else is a defect and exits with 1.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer

from counterstain.cli import data, generators, segmenter, slides, study, weights

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

COMMANDS: dict[str, tuple[str, tuple[Callable[..., None], ...]]] = {  # in the order of the help; groups with their help
    "phantom": ("", (data.phantom,)),
    "import": (
        "Import tissue and its annotations into a cohort.",
        (data.import_table, slides.import_slides, slides.import_labels, slides.import_exact, weights.import_weights),
    ),
    "split": ("", (data.split,)),
    "inspect": ("", (data.inspect,)),
    "train": (
        "Train a generator, or the judge of generated images, on the training part of a cohort.",
        (
            generators.train_spade,
            generators.train_autoencoder,
            generators.train_diffusion,
            generators.train_judge,
            generators.train_distilled,
        ),
    ),
    "synthesize": ("", (generators.synthesize,)),
    "preview": ("", (generators.preview,)),
    "redraw": ("", (generators.redraw,)),
    "audit": ("", (segmenter.audit,)),
    "segment": ("", (segmenter.segment,)),
    "evaluate": ("", (segmenter.evaluate,)),
    "predict": ("", (segmenter.predict,)),
    "export": ("", (data.export,)),
    "headroom": ("", (study.headroom,)),
    "study": (
        "Arms x repeats over shared generators and synthetic sets.",
        (study.run, study.plan, study.status, study.clean),
    ),
    "demo": ("", (study.demo,)),
    "report": ("", (study.report,)),
    "doctor": ("", (weights.doctor,)),
}

for _name, (_help, _functions) in COMMANDS.items():
    if not _help:
        app.command(_name)(_functions[0])
        continue
    _group = typer.Typer(no_args_is_help=True, help=_help)
    for _function in _functions:
        _group.command(_function.__name__.removeprefix(f"{_name}_"))(_function)
    app.add_typer(_group, name=_name)


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
