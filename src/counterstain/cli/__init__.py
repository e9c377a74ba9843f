"""The command line: the functions of :mod:`counterstain.api` as commands.

Commands are made from functions: the signature gives the options, the docstring the help. Positional parameters become
arguments, keyword-only ones options. Annotations are read as text, so that no module with heavy imports is loaded for
``--help``. Errors that the user can fix are one line and exit status 2; anything else is a defect and exits with 1.
"""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import counterstain
from counterstain.api import (
    cohorts,
    evaluation,
    generators,
    imports,
    readings,
    scores,
    settings,
    sharing,
    studies,
)
from counterstain.app import studio
from counterstain.cli import printing as show
from counterstain.cli import printing_studies as show_studies
from counterstain.cli.terminal import echo, print_rich, print_table, printable, warn
from counterstain.errors import CounterstainError, CounterstainWarning
from counterstain.remote import place_of

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
reading_app = typer.Typer(help="Blind tests: can people tell drawn from real patches?", no_args_is_help=True)
config_app = typer.Typer(help="Show and explain settings; templates for the files you write.", no_args_is_help=True)
PACKAGES = (
    "counterstain", "torch", "torchvision", "lightning", "diffusers", "segmentation-models-pytorch", "zarr",
    "openslide-python", "tifffile", "shapely", "lpips",
)  # fmt: skip

Verb = Callable[..., Any]
Show = Callable[[Any, dict[str, Any]], None]

OPTIONS = {"settings": "--set"}  # where an option has another name than its parameter
METAVARS = {"settings": "KEY=VALUE", "config": "FILE", "patients_seen": "none|FILE"}
TYPES: dict[str, Any] = {
    "PathLike": Path,
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "Numbers": str,
    "Settings": list[str],
    "Sequence[str]": list[str],
    "Sequence[PathLike]": list[Path],
}
PARAMETERS = re.compile(r"Parameters\n-+\n(.*?)(?:\n\w+\n---|\Z)", re.DOTALL)
PARAMETER = re.compile(r"^(\w[\w, ]*?)(?: : .*)?\n((?:    .+\n?)+)", re.MULTILINE)
SAME_AS = re.compile(r"As for :func:`(\w+)`\.")


def command_of(verb: Verb, show: Show) -> Callable[..., None]:
    """Return the function that Typer makes a command of; ``show(result, arguments)`` prints what came of it."""
    signature = list(inspect.signature(verb).parameters.values())
    positional = [p.name for p in signature if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    documentation, described = inspect.getdoc(verb) or "", descriptions_of(verb)

    def command(**given: Any) -> None:
        arguments = {name: place_of(value) if isinstance(value, Path) else value for name, value in given.items()}
        options = dict(arguments)
        with _warnings_printed():
            result = verb(*[options.pop(name) for name in positional], **options)
        show(result, arguments)

    parameters = [_parameter(p, described[p.name]) for p in signature]
    command.__name__ = verb.__name__
    command.__doc__ = documentation.partition("\nParameters\n---")[0].strip()
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def descriptions_of(verb: Verb) -> dict[str, str]:
    """Return what a docstring says of each parameter; ``As for :func:`train`.`` refers to another public function."""
    found = PARAMETERS.search(inspect.getdoc(verb) or "")
    described: dict[str, str] = {}
    for names, text in PARAMETER.findall(found[1] + "\n") if found else ():
        other = SAME_AS.match(text.strip())
        others = descriptions_of(getattr(counterstain, other[1])) if other else {}
        described |= {name: others.get(name, " ".join(text.split())) for name in names.split(", ")}
    return described


_show_warning = warnings.showwarning


@contextmanager
def _warnings_printed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("always", CounterstainWarning)
        warnings.showwarning = _print_warning
        yield


def _print_warning(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    """Print our own warnings as one line each, others as Python does."""
    if issubclass(category, CounterstainWarning):
        warn(str(message))
    else:
        _show_warning(message, category, *where, **options)


def _parameter(parameter: inspect.Parameter, text: str) -> inspect.Parameter:
    """Return a parameter as Typer reads it."""
    kind = TYPES[str(parameter.annotation).split(" | ")[0]]
    optional = parameter.default is None
    name = parameter.name
    info: Any
    if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
        info = typer.Argument(metavar=name.upper(), help=text)
    else:
        option = OPTIONS.get(name, f"--{name.replace('_', '-')}")
        info = typer.Option(option, metavar=METAVARS.get(name), help=text)
    annotation: Any = Annotated[(kind | None) if optional else kind, info]
    return parameter.replace(annotation=annotation, kind=inspect.Parameter.KEYWORD_ONLY)


COMMANDS: dict[typer.Typer, tuple[tuple[str, Verb, Show, str], ...]] = {  # name, function, printing, words in lists
    app: (
        ("phantom", cohorts.make_phantom, show.phantom, "Make a cohort of procedural tissue with exact masks"),
        ("split", cohorts.split, show.splits, "Split a cohort by patient"),
        ("inspect", cohorts.inspect, show.inspection, "Show what a cohort is made of"),
        ("discover", cohorts.discover, show.discovery, "Find subtypes that nobody annotated"),
        ("init", studies.init_study, show_studies.first_study, "Write a first study for a cohort"),
        ("headroom", studies.headroom, show_studies.headroom, "Learning curve: would more data help at all?"),
        ("train", generators.train, show.training, "Train a generator, or the judge of its images"),
        ("preview", generators.preview, show.preview, "See training patches redrawn as every subtype"),
        ("synthesize", generators.synthesize, show.synthetic_set, "Draw a synthetic set"),
        ("redraw", generators.redraw, show.redrawn, "Redraw whole regions with new subtypes"),
        ("audit", readings.audit, show.audit, "Audit synthetic sets: realistic? as asked? copies?"),
        ("trace", readings.trace, show.trace, "Can drawn images be traced to patients?"),
        ("review", readings.review, show_studies.review, "Accept and reject patches of a synthetic set"),
        ("segment", evaluation.segment, show.segmenter, "Train a segmenter, with or without a synthetic set"),
        ("evaluate", evaluation.evaluate, show.scores, "Score a segmenter, subtype by subtype"),
        ("predict", evaluation.predict, show.predictions, "Outline the tissue class on slides, for QuPath"),
        ("score", scores.score, show_studies.slide_scores, "Score slides by their subtypes (research use only)"),
        ("export", cohorts.export, show.exported, "Write images, masks or weights for other tools"),
        ("release", sharing.release, show_studies.released, "Write what of a set may leave the hospital"),
        ("push", sharing.push, lambda said, _: echo(said), "Push a checkpoint or a set to the Hugging Face Hub"),
        ("pull", sharing.pull, lambda said, _: echo(said), "Fetch a checkpoint or a set from the Hub"),
        ("report", studies.report, show_studies.report, "Write a study's report, figures and tables"),
        ("studio", studio, lambda *_: None, "Look, redraw and review in a browser"),
        ("demo", studies.demo, show_studies.demo, "Run everything in minutes on two CPU cores"),
    ),
    import_app: (
        ("table", imports.import_table, show.imported, "Import images and label files listed in a table"),
        ("dataset", imports.import_dataset, show.imported, "Import a dataset in the layout of another tool"),
        ("slides", imports.import_slides, show.imported, "Import whole slides with annotations"),
        ("labels", imports.import_labels, show.text, "Draft LABELS.yaml from annotations"),
        ("exact", imports.import_exact, show.exact, "Fetch annotations from an EXACT server"),
        ("weights", sharing.import_weights, show.weights, "Convert weights that others published"),
    ),
    study_app: (
        ("run", studies.run_study, show_studies.study, "Run a study and write its report"),
        ("test", studies.test_study, show_studies.test, "Test a finished study on another cohort"),
        ("compare", evaluation.compare_arms, show_studies.compared, "See where two arms differ, region by region"),
        ("status", studies.study_status, show_studies.status, "Show how far a study is"),
    ),
    reading_app: (
        ("make", readings.make_reading_test, show_studies.made, "Make a blind test of real and drawn patches"),
        ("result", readings.score_reading_test, show_studies.result, "Score the answers of its readers"),
    ),
    config_app: (
        ("show", settings.config_show, show.text, "Show every setting of a recipe as YAML"),
        ("explain", settings.config_explain, show.text, "Explain a setting, with its value in each preset"),
        ("schema", settings.config_schema, show.json_text, "JSON schema of STUDY.yaml for editors"),
        ("taxonomy", settings.config_taxonomy, show.text, "A taxonomy file to start from"),
        ("reference", settings.config_reference, show.text, "All settings as a Markdown table"),
    ),
}
for _group, _commands in COMMANDS.items():
    for _name, _verb, _show, _summary in _commands:
        _group.command(_name, short_help=_summary)(command_of(_verb, _show))
for _name, _group in (
    ("import", import_app),
    ("study", study_app),
    ("reading-test", reading_app),
    ("config", config_app),
):
    app.add_typer(_group, name=_name)


@app.command(short_help="Show versions, device and pretrained weights")
def doctor() -> None:
    """Say which versions, which device and which pre-trained weights this machine has."""
    rows = (*_versions(), *_machine(), *_weights())
    print_table(("", "found", "means"), rows, title="counterstain doctor", words=3)


def _versions() -> list[tuple[str, str, str]]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    rows = [("python", platform.python_version(), "")]
    for package in PACKAGES:
        try:
            rows.append((package, version(package), ""))
        except PackageNotFoundError:
            rows.append((package, "not installed", "optional: perceptual loss of the autoencoder"))
    return rows


def _machine() -> list[tuple[str, str, str]]:
    import os
    import shutil
    from pathlib import Path

    import torch

    rows = [("CPU cores", str(os.cpu_count()), f"torch computes on {torch.get_num_threads()} of them")]
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        rows.append(("GPU", f"{torch.cuda.get_device_name()}, {memory:.0f} GB", "precision auto = bf16"))
    else:
        fast = torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - torch has no public name for it
        rows.append(("GPU", "none", f"precision auto = {'bf16' if fast else 'fp32'} on this CPU; use --preset demo"))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    rows.append(("disk", f"{free:.0f} GB free here", "" if free > 10 else "little room for a study"))
    return rows


def _weights() -> list[tuple[str, str, str]]:
    from pathlib import Path

    import torch

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    rows = []
    for network, pattern, used, remedy in (
        ("VGG19, ImageNet", "vgg19-*.pth", "perceptual loss of SPADE", "spade.vgg_weights=FILE or spade.vgg_weight=0"),
        (
            "VGG16, ImageNet",
            "vgg16-*.pth",
            "perceptual loss (LPIPS) of the autoencoder",
            "autoencoder.lpips_weights=FILE or autoencoder.lpips_weight=0",
        ),
        ("ResNet-34, ImageNet", "resnet34-*.pth", "start of the segmenter", "segmenter.encoder_weights=FILE or null"),
    ):
        found = sorted(file.name for file in cache.glob(pattern))
        otherwise = "" if found else f": fetched on first use; without a network --set {remedy}"
        rows.append((network, found[0] if found else "not in the cache", f"{used}{otherwise}"))
    return rows


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
    with _warnings_printed():
        plan = studies.plan_study(study, **options)
    print_rich(cell_table(plan.state) if cells else plan_tree(plan.state, plan.name))
    if timing and plan.untimed:
        how = "cells side by side, with fewer threads each" if processes else "cells one after another"
        echo(f"timing {len(plan.untimed)} kinds of work on this machine, for {how}; kept for the next time")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CounterstainWarning)  # they are printed above
            plan = studies.plan_study(study, timing=True, **options)
    print_rich(stage_table(plan.state))
    for line in plan.untimed[: show.SHOWN]:
        echo(f"not timed: {line}")
    if plan.untimed and not timing:
        echo("the same command without --no-timing times them")
    echo(what_it_takes(plan.state, plan.run, processes or 1, plan.picture_bytes))
    for line in plan.unreviewed:
        echo(line)
    for line in plan.lacking:
        echo(f"not yet on this machine: {line}")
    if any(state != "done" for state in plan.state.states.values()):
        echo(f"next: counterstain study run {study}")


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
        typer.echo(f"counterstain {counterstain.__version__}")
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
