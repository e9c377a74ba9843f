"""Commands around a segmenter: segment trains one, evaluate scores it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from counterstain.cli.tracking import Logger, logged

if TYPE_CHECKING:
    import pandas as pd

    from counterstain.taxonomy import Taxonomy


def register(app: typer.Typer) -> None:
    """Add ``counterstain segment`` and ``counterstain evaluate``."""
    app.command()(segment)
    app.command()(evaluate)


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
    from counterstain.segmentation.evaluate import check_evaluable, score
    from counterstain.segmentation.evaluate import evaluate as count_pixels
    from counterstain.storage import claim

    opened = Cohort.open(cohort)
    header = read_header(segmenter)
    check_evaluable(segmenter, header, opened, split)
    if out is not None:
        claim(out, "evaluate", {"segmenter": header.sha256, "cohort": opened.fingerprint, "split": split})
    table = count_pixels(segmenter, opened, split, device=device)
    measures = score(table, opened.taxonomy)
    _show(table, measures, opened.taxonomy, f"{segmenter} on {cohort} ({split})")
    if header.cohort == opened.fingerprint:
        _record(segmenter, split)
    if out is not None:
        _write(out, table, measures, split)
        typer.echo(f"written: {out / 'counts.parquet'}, {out / 'measures.csv'}")


def _amount(amount: float | None, synthetic: Path | None) -> float:
    if amount is not None:
        return amount
    return 0.0 if synthetic is None else 1.0


def _record(segmenter: Path, split: str) -> None:
    """Put on record that figures of a part were shown: in the run of its study, otherwise beside the segmenter."""
    from counterstain.study.looks import read_looks, record_look, run_of, times_looked_at

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
