"""The command that outlines tumour: predict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from counterstain.segmentation.predict import Prediction


def register(app: typer.Typer) -> None:
    """Add ``counterstain predict``."""
    app.command("predict")(predict)


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
    from counterstain.segmentation.predict import PredictConfig
    from counterstain.segmentation.predict_cohort import predict_cohort
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
        _show(predict_cohort(segmenter, Cohort.open(source), out, config, device=device, progress=bar))
        return
    prediction = predict_slide(
        segmenter, source, out, config, regions=regions, mpp_level0=mpp_level0, device=device, progress=bar
    )
    _show([prediction])


def _show(predictions: list[Prediction]) -> None:
    for path, areas, area_um2 in predictions:
        if areas is None or area_um2 is None:
            typer.echo(f"{path}: is there already")
        else:
            typer.echo(f"{path}: {areas:,} areas of tumour, {area_um2 / 1e6:,.3f} mm² in all")
