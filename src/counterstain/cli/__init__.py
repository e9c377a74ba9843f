"""The command line: the functions of :mod:`counterstain.api` as commands.

Errors that the user can fix are one line and exit status 2; anything else is a defect and exits with 1.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from counterstain import __version__
from counterstain.api import cohorts, evaluation, generators, imports, settings, studies
from counterstain.cli import printing
from counterstain.cli.commands import Show, Verb, command_of
from counterstain.cli.doctor import doctor
from counterstain.cli.terminal import echo, print_rich, printable

# Newer versions of typer bring a click of their own: find the base of its errors, whichever click it is.
UsageProblem: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

INTERRUPTED = 130  # exit status after Ctrl-C, as shells count it

app = typer.Typer(
    name="counterstain",
    help="Balance the rare subtypes of a tissue class with generated images, and test whether that helped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes a quarter of a second to load
    context_settings={"max_content_width": 120},
)
import_app = typer.Typer(help="Import tissue and its annotations into a cohort.", no_args_is_help=True)
study_app = typer.Typer(help="Compare arms over repeats: plan, run, follow and clean up.", no_args_is_help=True)
config_app = typer.Typer(help="Show and explain settings; templates for the files you write.", no_args_is_help=True)


class Command(NamedTuple):
    """A command: where it stands, what lists say of it, the function behind it, what is printed of the result."""

    group: typer.Typer
    name: str
    summary: str
    verb: Verb
    show: Show


COMMANDS = (  # in the order of the help
    Command(
        app,
        "phantom",
        "Make a cohort of procedural tissue with exact masks",
        cohorts.make_phantom,
        printing.show_phantom,
    ),
    Command(
        import_app,
        "table",
        "Import images and label images listed in a table",
        imports.import_table,
        printing.show_import,
    ),
    Command(import_app, "slides", "Import whole slides with annotations", imports.import_slides, printing.show_import),
    Command(import_app, "labels", "Draft LABELS.yaml from annotations", imports.import_labels, printing.show_text),
    Command(import_app, "exact", "Fetch annotations from an EXACT server", imports.import_exact, printing.show_exact),
    Command(
        import_app, "weights", "Convert weights that others published", imports.import_weights, printing.show_weights
    ),
    Command(app, "split", "Split a cohort by patient", cohorts.split, printing.show_parts),
    Command(app, "inspect", "Show what a cohort is made of", cohorts.inspect, printing.show_inspection),
    Command(app, "headroom", "Learning curve: would more data help at all?", studies.headroom, printing.show_headroom),
    Command(app, "train", "Train a generator, or the judge of its images", generators.train, printing.show_training),
    Command(app, "preview", "See training patches redrawn as every subtype", generators.preview, printing.show_preview),
    Command(app, "synthesize", "Draw a synthetic set", generators.synthesize, printing.show_set),
    Command(app, "redraw", "Redraw whole regions with new subtypes", generators.redraw, printing.show_redrawn),
    Command(app, "audit", "Audit synthetic sets: realistic? as asked? copies?", evaluation.audit, printing.show_audit),
    Command(
        app,
        "segment",
        "Train a segmenter, with or without a synthetic set",
        evaluation.segment,
        printing.show_segmenter,
    ),
    Command(app, "evaluate", "Score a segmenter, subtype by subtype", evaluation.evaluate, printing.show_scores),
    Command(
        app, "predict", "Outline the tissue class on slides, for QuPath", evaluation.predict, printing.show_predictions
    ),
    Command(app, "export", "Write images, masks or weights for other tools", cohorts.export, printing.show_export),
    Command(study_app, "run", "Run a study and write its report", studies.run_study, printing.show_study),
    Command(study_app, "test", "Test a finished study on another cohort", studies.test_study, printing.show_test),
    Command(study_app, "status", "Show how far a study is", studies.study_status, printing.show_status),
    Command(app, "report", "Write a study's report, figures and tables", studies.report, printing.show_report),
    Command(app, "demo", "Run everything in minutes on two CPU cores", studies.demo, printing.show_demo),
    Command(config_app, "show", "Show every setting of a recipe as YAML", settings.config_show, printing.show_text),
    Command(
        config_app,
        "explain",
        "Explain a setting, with its value in each preset",
        settings.config_explain,
        printing.show_text,
    ),
    Command(config_app, "schema", "JSON schema of STUDY.yaml for editors", settings.config_schema, printing.show_json),
    Command(config_app, "taxonomy", "A taxonomy file to start from", settings.config_taxonomy, printing.show_text),
    Command(config_app, "reference", "All settings as a Markdown table", settings.config_reference, printing.show_text),
)
for _command in COMMANDS:
    _decorate = _command.group.command(_command.name, short_help=_command.summary)
    _decorate(command_of(_command.verb, _command.show))
for _name, _group in (("import", import_app), ("study", study_app), ("config", config_app)):
    app.add_typer(_group, name=_name)
app.command(short_help="Show versions, device and pretrained weights")(doctor)

Study = Annotated[Path, typer.Argument(metavar="STUDY", help="The study, STUDY.yaml.")]
StudyFolder = Annotated[Path | None, typer.Option(help="Folder of the study [default: out/NAME_OF_THE_FILE].")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change to the study.")]


@study_app.command("plan", short_help="Show what a study is made of and what it will take")
def _plan(
    study: Study,
    *,
    out: StudyFolder = None,
    cells: Annotated[bool, typer.Option("--cells", help="A line for every cell, with its folder.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="As many cells at once, here or on a cluster.")] = None,
    timing: Annotated[bool, typer.Option(help="Time a few steps of every network, once on each machine.")] = True,
    settings: Changes = None,
) -> None:
    """Show what a study is made of, what is done, and what time and disk the rest will take. Makes nothing of it."""
    from counterstain.study.status import cell_table, plan_tree, stage_table, what_it_takes

    options: Any = {"out": out, "processes": processes, "settings": settings}
    plan = studies.plan_study(study, **options)
    print_rich(cell_table(plan.state) if cells else plan_tree(plan.state, plan.name))
    if timing and plan.untimed:
        plan = studies.plan_study(study, timing=True, **options)
    print_rich(stage_table(plan.state))
    for line in plan.untimed[: printing.SHOWN]:
        echo(f"not timed: {line}")
    echo(what_it_takes(plan.state, plan.run, processes or 1, plan.picture_bytes))
    for line in plan.lacking:
        echo(f"not yet on this machine: {line}")


@study_app.command("clean", short_help="Delete results that the plan no longer needs")
def _clean(
    study: Study,
    *,
    out: StudyFolder = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print only.")] = False,
    settings: Changes = None,
) -> None:
    """Delete the folders of cells that the study's plan no longer refers to, after asking."""
    from counterstain.progress import size

    found = studies.clean_study(study, out=out, dry_run=True, settings=settings)
    for leftover in found:
        echo(f"{size(leftover.size_bytes):>10}  {leftover.folder.name}")
    total = f"{len(found)} folders, {size(sum(leftover.size_bytes for leftover in found))}"
    if not found:
        typer.echo("nothing to delete: the plan refers to every cell")
    elif dry_run:
        typer.echo(f"{total} would be deleted")
    elif yes or typer.confirm(f"Delete {total}?"):
        studies.clean_study(study, out=out, settings=settings)
        typer.echo(f"{total} deleted")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"counterstain {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


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
        from counterstain.storage import disk_error

        known = error if isinstance(error, CounterstainError) else disk_error(error)
        if known is None:
            raise
        sys.stderr.write(printable(f"error: {known}\n"))
        sys.exit(2)
    if status == INTERRUPTED:  # what newer versions of typer make of Ctrl-C
        _stop()
    sys.exit(status if isinstance(status, int) else 0)


def _stop() -> None:
    sys.stderr.write("stopped; give the same command again to continue, finished work is kept\n")
    sys.stderr.flush()
    # Taking the libraries down in order takes seconds, and whatever is on the disk survives being killed.
    os._exit(INTERRUPTED)
