"""Commands around a segmenter: segment trains one, evaluate scores it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from counterstain.cli.options import Logger, logged

if TYPE_CHECKING:
    import pandas as pd

    from counterstain.taxonomy import Taxonomy
if TYPE_CHECKING:
    from counterstain.segmentation.predict import Prediction
if TYPE_CHECKING:
    from counterstain.audit.adherence import Audit


def segment(
    cohort: Annotated[Path, typer.Argument(metavar="COHORT", help="Cohort with a split; its training part is used.")],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the trained segmenter.")],
    synthetic: Annotated[
        Path | None, typer.Option("--synthetic", metavar="SET", help="Synthetic set to mix in.")
    ] = None,
    amount: Annotated[
        float | None, typer.Option(help="How much of it: 1.0 is +100 % [default: 1.0 with --synthetic].")
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Share of synthetic patches in training; 1.0 is synthetic patches alone.")
    ] = None,
    preset: Annotated[str, typer.Option(help="demo, best or paper.")] = "best",
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Settings over the preset (YAML).")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting, for example segmenter.training.steps=500."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights and of the order of the data.")] = 0,
    logger: Logger = None,
) -> None:
    """Train a segmenter, on real patches or mixed with synthetic ones.

    Interrupted, the same command goes on; a finished segmenter is left as it is.
    """
    from counterstain.data.cohort import Cohort
    from counterstain.data.patch_set import PatchSet
    from counterstain.recipe import load_recipe
    from counterstain.segmentation.train import train_segmenter

    recipe = load_recipe(preset, config, settings or [])
    train_segmenter(
        Cohort.open(cohort),
        logged(recipe.segmenter, logger),
        out,
        size_px=recipe.size_px,
        seed=seed,
        synthetic=None if synthetic is None else PatchSet.open(synthetic),
        amount=_amount(amount, synthetic),
        share=share,
    )
    typer.echo(f"{out}: trained")
    typer.echo(f"next: counterstain evaluate {out} {cohort} --split val")


def evaluate(
    segmenter: Annotated[Path, typer.Argument(metavar="SEGMENTER", help="Folder of a trained segmenter.")],
    cohort: Annotated[Path, typer.Argument(metavar="COHORT", help="Any cohort of the same subtypes and mpp.")],
    *,
    split: Annotated[str, typer.Option(help="train, val, test, or all regions of a cohort without a split.")] = "test",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where counts.parquet and measures.csv go.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Score a segmenter on a part of a cohort, subtype by subtype."""
    from counterstain.checkpoints import read_header
    from counterstain.data.cohort import Cohort
    from counterstain.segmentation.counts import measures
    from counterstain.segmentation.evaluate import check_evaluable
    from counterstain.segmentation.evaluate import evaluate as count_pixels
    from counterstain.storage import claim

    opened = Cohort.open(cohort)
    header = read_header(segmenter)
    check_evaluable(segmenter, header, opened, split)
    if out is not None:
        claim(out, "evaluate", {"segmenter": header.sha256, "cohort": opened.fingerprint, "split": split})
    table = count_pixels(segmenter, opened, split, device=device)
    scores = measures(table, opened.taxonomy)
    _show(table, scores, opened.taxonomy, f"{segmenter} on {cohort} ({split})")
    if header.cohort == opened.fingerprint:
        _record(segmenter, split)
    if out is not None:
        _write(out, table, scores, split)
        typer.echo(f"written: {out / 'counts.parquet'}, {out / 'measures.csv'}")


def _amount(amount: float | None, synthetic: Path | None) -> float:
    if amount is not None:
        return amount
    return 0.0 if synthetic is None else 1.0


def _record(segmenter: Path, split: str) -> None:
    """Put on record that figures of a part were shown: in the run of its study, otherwise beside the segmenter."""
    from counterstain.study.test_access_log import read_looks, record_look, run_of, times_looked_at

    splits = ("val", "test") if split == "all" else (split,)
    home = run_of(segmenter) or segmenter
    if record_look(home, "evaluate", splits) and "test" in splits:
        times = times_looked_at(read_looks(home), "test").total()
        typer.echo(f"times that the test part's figures were shown: {times} ({home / 'looks.jsonl'})")


def _write(out: Path, table: pd.DataFrame, measures: dict[str, float], split: str) -> None:
    import pandas as pd

    from counterstain.storage import write_csv, write_parquet

    write_parquet(out / "counts.parquet", table)
    write_csv(out / "measures.csv", pd.DataFrame([{"split": split, **measures}]))


def _show(table: pd.DataFrame, measures: dict[str, float], taxonomy: Taxonomy, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from counterstain.segmentation.counts import absent_subtypes, pooled

    shown = Table("measure", title=title, title_justify="left")
    shown.add_column("value", justify="right")
    for name, value in measures.items():
        shown.add_row(name, "-" if math.isnan(value) else f"{value:.4f}")
    Console().print(shown)
    absent = absent_subtypes(pooled(table), taxonomy)
    if absent:
        typer.echo(f"notice: no pixel of {', '.join(absent)}; left out of the subtype variance", err=True)


# The command that outlines tumour: predict.


def predict(
    segmenter: Annotated[Path, typer.Argument(metavar="SEGMENTER", help="Folder of a trained segmenter.")],
    source: Annotated[Path, typer.Argument(metavar="SLIDE_OR_COHORT", help="A slide, or the folder of a cohort.")],
    *,
    out: Annotated[Path, typer.Option(help="GeoJSON file; of a cohort, the folder of a file per slide.")],
    regions: Annotated[
        str, typer.Option(help="whole: all tissue; auto: squares placed on tissue; or a CSV table of regions.")
    ] = "whole",
    mpp_level0: Annotated[
        float | None,
        typer.Option("--mpp-level0", help="Micrometres per level-0 pixel, where the slide does not say."),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Probability from which a pixel is tumour.")] = 0.5,
    min_area_um2: Annotated[float, typer.Option(help="Smaller areas are left out.")] = 0.0,
    origin: Annotated[
        str | None,
        typer.Option(
            help="Coordinates count from the corner of the scanned area (bounds), as QuPath's, or the whole canvas.",
            show_default="bounds; canvas for a cohort",
        ),
    ] = None,
    object_type: Annotated[str, typer.Option(help="annotation or detection, in QuPath.")] = "annotation",
    regions_per_slide: Annotated[int, typer.Option(help="--regions auto: how many at most.")] = 10,
    region_size_um: Annotated[float, typer.Option(help="--regions auto: edge in micrometres.")] = 1500.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Outline tumour on a slide or in a cohort, as GeoJSON for QuPath; the same command goes on if interrupted."""
    from counterstain.config import build
    from counterstain.data.cohort import Cohort
    from counterstain.errors import InputError
    from counterstain.progress import bar
    from counterstain.segmentation.predict import PredictConfig, predict_cohort
    from counterstain.segmentation.predict_slide import predict_slide

    settings = {
        "threshold": threshold,
        "min_area_um2": min_area_um2,
        "origin": origin,
        "object_type": object_type,
        "regions_per_slide": regions_per_slide,
        "region_size_um": region_size_um,
    }
    config = build(PredictConfig, settings, f"prediction on {source}")
    if source.is_dir():
        if regions != "whole" or mpp_level0 is not None:
            raise InputError(f"{source}: --regions and --mpp-level0 are for slides; a cohort has regions of its own")
        _show_predictions(predict_cohort(segmenter, Cohort.open(source), out, config, device=device, progress=bar))
        return
    prediction = predict_slide(
        segmenter, source, out, config, regions=regions, mpp_level0=mpp_level0, device=device, progress=bar
    )
    _show_predictions([prediction])


def _show_predictions(predictions: list[Prediction]) -> None:
    for path, areas, area_um2 in predictions:
        if areas is None or area_um2 is None:
            typer.echo(f"{path}: is there already")
        else:
            typer.echo(f"{path}: {areas:,} areas of tumour, {area_um2 / 1e6:,.3f} mm² in all")


# The command audit: what a synthetic set is worth, before anything is trained on it.


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
    from counterstain.audit.adherence import AuditConfig
    from counterstain.audit.audit import audit_identity, audit_sets, require_auditable, write_audit
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
