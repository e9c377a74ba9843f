"""The command audit: what a synthetic set is worth, before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from counterstain.audit.findings import Audit


def register(app: typer.Typer) -> None:
    """Add ``counterstain audit``."""
    app.command()(audit)


def audit(
    sets: Annotated[list[Path], typer.Argument(metavar="SET…", help="Synthetic sets of one cohort, side by side.")],
    *,
    cohort: Annotated[Path, typer.Option("--cohort", metavar="COHORT", help="The cohort that they were made from.")],
    judge: Annotated[
        Path, typer.Option("--judge", metavar="DIR", help="Made by 'counterstain train judge' on that cohort.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the tables and pictures.")],
    patches: Annotated[int, typer.Option(min=50, help="Patches of each kind at most.")] = 2000,
    features: Annotated[str, typer.Option(help="What distances are measured in: judge, or timm:NAME.")] = "judge",
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="State dict of the timm network; nothing is downloaded.")
    ] = None,
    stain: Annotated[str, typer.Option(help="The stain beside haematoxylin: dab or eosin.")] = "dab",
    copies: Annotated[int, typer.Option(min=0, help="Patches of each kind that are searched for copies.")] = 300,
    device: Annotated[str, typer.Option(help="Where the networks run: auto, cpu or cuda.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Patches that go through the networks at once.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the real patches.")] = 0,
) -> None:
    """Audit synthetic sets: are the images like real ones, of the asked subtype, and no copies?

    Every figure stands beside the same figure of real patches of held-out patients, distances also beside those between
    two halves of the training patients.
    """
    from counterstain.audit.audit import audit_identity, audit_sets
    from counterstain.audit.inputs import require_auditable
    from counterstain.audit.ruler import AuditConfig
    from counterstain.audit.write import write_audit
    from counterstain.config import build
    from counterstain.data.cohort import Cohort
    from counterstain.data.patch_set import PatchSet
    from counterstain.progress import bar
    from counterstain.storage import claimed

    options = {
        "patches": patches,
        "features": features,
        "weights": weights,
        "stain": stain,
        "copies": copies,
        "device": device,
        "batch_size": batch_size,
        "seed": seed,
    }
    config = build(AuditConfig, options, "audit")
    opened = {name: PatchSet.open(folder) for name, folder in _named(sets).items()}
    opened_cohort = Cohort.open(cohort)
    require_auditable(opened, opened_cohort, judge)
    with claimed(out, "audit", audit_identity(opened, opened_cohort, judge, config)):
        with bar("audit", len(opened) + 2) as advance:
            result = audit_sets(opened, opened_cohort, judge, config, advance)
        write_audit(result, opened, config, out)
    _print(result)
    typer.echo(f"tables and pictures: {out}")


def _named(sets: list[Path]) -> dict[str, Path]:
    """Name sets by their folders' names, by their paths where those are not unique."""
    from counterstain.errors import InputError

    names = [folder.name for folder in sets]
    if len(set(names)) < len(names):
        names = ["-".join(folder.parts[-2:]) for folder in sets]
    if len(set(names)) < len(names):
        raise InputError(f"{sets[0]}: the same set is given twice; give each set once")
    return dict(zip(names, sets, strict=True))


def _print(audit: Audit) -> None:
    from rich.console import Console
    from rich.table import Table

    title = "against real training patches; 95 % intervals over patients; adherence = share that looks as asked"
    table = Table(title=title)
    table.add_column("")
    for findings in audit.findings:
        table.add_column(findings.name, justify="right")

    def add(label: str, *values: str) -> None:
        table.add_row(label, *values)

    found = audit.findings
    add("Fréchet distance", *(f"{f.frechet.value:.2f} ({f.frechet.low:.2f}-{f.frechet.high:.2f})" for f in found))
    add("kernel distance", *(f"{f.kernel.value:.4f} ({f.kernel.low:.4f}-{f.kernel.high:.4f})" for f in found))
    add("precision", *(f"{f.precision:.2f}" for f in found))
    add("recall", *(f"{f.recall:.2f}" for f in found))
    add("density", *(f"{f.density:.2f}" for f in found))
    add("coverage", *(f"{f.coverage:.2f}" for f in found))
    for subtype in found[0].adherence.index:
        add(f"adherence, {subtype}", *(_share(f.adherence[subtype]) for f in found))
    for subtype in found[0].stain.index:
        add(f"stain, {subtype}", *(_share(f.stain[subtype]) for f in found))
    add("seam (grey levels)", *(f"{f.seam:.1f}" for f in found))
    add("near copies", *(_percent(f.copies.share) for f in found))
    Console(width=max(100, 24 + 26 * len(found))).print(table)


def _share(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"  # noqa: PLR0124 - not a number


def _percent(value: float) -> str:
    return "-" if value != value else f"{value:.1%}"  # noqa: PLR0124 - not a number
