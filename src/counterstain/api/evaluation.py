"""Segmenters: train one, score it, outline tumour with it, compare the arms of a study."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterstain.api import PathLike, Settings, folder_of, is_cohort, open_cohort, recipe_of, verb
from counterstain.errors import ConfigError, InputError

if TYPE_CHECKING:
    import pandas as pd

    from counterstain.data.cohort import Cohort
    from counterstain.data.patch_set import PatchSet
    from counterstain.segmentation.predict import Prediction
    from counterstain.study.compare import ComparedRegion


@verb
def segment(
    cohort: PathLike | Cohort,
    *,
    out: PathLike,
    synthetic: PathLike | PatchSet | None = None,
    amount: float | None = None,
    share: float | None = None,
    with_rejected: bool = False,
    preset: str | None = "best",
    config: PathLike | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    logger: str | None = None,
) -> Path:
    """Train a segmenter, on real patches or mixed with synthetic ones.

    If interrupted, the same command continues; a finished segmenter is left as it is. Synthetic patches that a review
    of the set rejected are left out.

    Parameters
    ----------
    cohort : str, Path or Cohort
        Cohort with a split; its training part is used.
    out : str or Path
        Folder of the trained segmenter.
    synthetic : str, Path or PatchSet, optional
        Synthetic set to mix in.
    amount : float, optional
        How many of its patches: 1.0 is +100 %, as many as the dataset has real ones [default: 1.0].
    share : float, optional
        Share of synthetic patches in training, 0 to 1; 1.0 is synthetic patches alone [default: amount/(1+amount)].
    with_rejected : bool
        Also train on patches that a review of the set rejected.
    seed : int
        Of the initial weights and of the order of the data.
    preset, config, settings, logger
        As for :func:`train`.
    """
    from counterstain.data.patch_set import PatchSet
    from counterstain.data.review import review_of
    from counterstain.data.stains import check_stains, named_stains
    from counterstain.segmentation.train import train_segmenter

    recipe = recipe_of(preset, config, settings, logger)
    patches = synthetic if synthetic is None or isinstance(synthetic, PatchSet) else PatchSet.open(Path(synthetic))
    amount = (0.0 if patches is None else 1.0) if amount is None else amount
    mixed: dict[str, Any] = {"synthetic": patches, "amount": amount, "share": share}
    if patches is not None and not with_rejected and (review := review_of(patches)) is not None:
        mixed |= {"left_out": review.rejected, "review": review.provenance()}
    opened = open_cohort(cohort)
    check_stains(opened, named_stains(recipe.model_dump(mode="json", include={"segmenter"})))
    return train_segmenter(opened, recipe.segmenter, Path(out), size_px=recipe.size_px, seed=seed, **mixed)


@verb
def evaluate(
    segmenter: PathLike,
    cohort: PathLike | Cohort,
    *,
    split: str = "test",
    out: PathLike | None = None,
    device: str = "auto",
) -> pd.Series:
    """Score a segmenter on a split of a cohort, subtype by subtype.

    Parameters
    ----------
    segmenter : str or Path
        Folder of a trained segmenter.
    cohort : str, Path or Cohort
        Any cohort with the same subtypes and resolution.
    split : str
        train, val, test, or all regions: of an external cohort, for example.
    out : str or Path, optional
        Where counts.parquet, measures.csv and summary.csv go.
    device : str
        auto, cpu or cuda.

    Returns
    -------
    pandas.Series
        Every measure by its name. ``attrs["summary"]`` is a table of those that matter most, with 95 % intervals over
        patients and the numbers of patients, slides and instances; ``attrs["counts"]`` holds the count table (a row per
        slide and label) that all derive from, ``attrs["absent"]`` the subtypes without a pixel.
    """
    import pandas as pd

    from counterstain.checkpoints import read_header
    from counterstain.segmentation.counts import measures, pooled
    from counterstain.segmentation.evaluate import check_evaluable
    from counterstain.segmentation.evaluate import evaluate as count_pixels
    from counterstain.storage import claim, write_csv, write_parquet
    from counterstain.study.statistics.significance import summary_of

    segmenter, opened = Path(segmenter), open_cohort(cohort)
    header = read_header(segmenter)
    check_evaluable(segmenter, header, opened, split)
    if out is not None:
        claim(Path(out), "evaluate", {"segmenter": header.sha256, "cohort": opened.fingerprint, "split": split})
    counts = count_pixels(segmenter, opened, split, device=device)
    scores = pd.Series(measures(counts, opened.taxonomy), name=split)
    pixels = pooled(counts)
    absent = tuple(subtype.name for subtype in opened.taxonomy.subtypes if not pixels[subtype.id].any())
    scores.attrs = {"counts": counts, "absent": absent, "summary": summary_of(counts, opened)}
    if header.cohort == opened.fingerprint:
        scores.attrs |= _recorded(segmenter, split)
    if out is not None:
        write_parquet(Path(out) / "counts.parquet", counts)
        write_csv(Path(out) / "measures.csv", pd.DataFrame([{"split": split, **scores}]))
        write_csv(Path(out) / "summary.csv", scores.attrs["summary"])
    return scores


def _recorded(segmenter: Path, split: str) -> dict[Hashable, Any]:
    """Put on record that figures of a split were shown: in the run of its study, otherwise beside the segmenter."""
    from counterstain.study.records import read_looks, record_look, run_of, times_looked_at

    splits = ("val", "test") if split == "all" else (split,)
    home = run_of(segmenter) or segmenter
    if not record_look(home, "evaluate", splits) or "test" not in splits:
        return {}
    return {"test_looks": times_looked_at(read_looks(home), "test").total(), "test_log": str(home / "looks.jsonl")}


@verb
def predict(
    segmenter: PathLike,
    source: PathLike | Cohort,
    *,
    out: PathLike,
    format: str = "geojson",
    regions: str = "whole",
    mpp_level0: float | None = None,
    threshold: float = 0.5,
    min_area_um2: float = 0.0,
    origin: str | None = None,
    object_type: str = "annotation",
    regions_per_slide: int = 10,
    region_size_um: float = 1500.0,
    device: str = "auto",
) -> list[Prediction]:
    """Outline tumour on slides, in images or in a cohort, as GeoJSON for QuPath.

    If interrupted, the same command continues.

    Parameters
    ----------
    source : str, Path or Cohort
        A slide, an image (PNG, JPEG, TIFF, ...), a folder of them, or the folder or URL of a cohort.
    out : str or Path
        GeoJSON file; for a folder or a cohort, the folder of one file per image or slide.
    format : str
        geojson; qupath: a QuPath project of the slides and images, with outlines; or ome-zarr: OME-Zarr images with the
        outlines painted as labels, for napari. The last two make a folder.
    regions : str
        whole: all tissue (windows of mere glass are background: docs/performance.md says what counts as glass);
        auto: squares placed on tissue; or a CSV table of regions.
    mpp_level0 : float, optional
        Micrometres per pixel of an image, or per level-0 pixel of a slide that does not say.
    threshold : float
        Probability from which a pixel is tumour.
    min_area_um2 : float
        Smaller areas are left out.
    origin : str, optional
        Coordinates count from the corner of the scanned area (bounds), as QuPath's do, or of the whole canvas
        [default: bounds; canvas for a cohort].
    object_type : str
        annotation or detection, in QuPath.
    regions_per_slide, region_size_um
        As for :func:`import_slides`.
    segmenter, device
        As for :func:`evaluate`.
    """
    from counterstain.config import build
    from counterstain.progress import bar
    from counterstain.segmentation.predict import PredictConfig
    from counterstain.segmentation.predict_images import FORMATS, predict_cohort, predict_files

    settings = {"threshold": threshold, "min_area_um2": min_area_um2, "origin": origin, "object_type": object_type}
    settings |= {"regions_per_slide": regions_per_slide, "region_size_um": region_size_um}
    segmenter, place, out = Path(segmenter), folder_of(source), Path(out)
    config = build(PredictConfig, settings, f"prediction on {place}")
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: expected {', '.join(FORMATS)}")
    where: dict[str, Any] = {"file_format": format, "device": device, "progress": bar}
    if isinstance(place, Path) and not is_cohort(place):
        return predict_files(segmenter, place, out, config, regions=regions, mpp_level0=mpp_level0, **where)
    if regions != "whole" or mpp_level0 is not None:
        raise InputError(f"{place}: --regions and --mpp-level0 are for slides; a cohort has regions of its own")
    cohort = open_cohort(source)
    if out.suffix == ".geojson":
        raise InputError(f"{out}: of a cohort, --out is the folder of one file per slide; give it another name")
    return predict_cohort(segmenter, cohort, out, config, **where)


@verb
def compare_arms(
    run: PathLike,
    *,
    out: PathLike | None = None,
    arm: str | None = None,
    baseline: str = "subtype",
    repeat: int = 0,
    split: str = "test",
    most: int = 24,
    device: str = "auto",
) -> list[ComparedRegion]:
    """Compare two arms of a study region by region, those first where their segmenters differ most.

    Regions are sorted by the share of pixels on which the two differ, whichever is right.

    Parameters
    ----------
    run : str or Path
        Folder of a study that has run.
    out : str or Path, optional
        Folder of regions.csv and of a picture for each region: reference, outlines of both arms, difference.
    arm : str, optional
        The arm [default: the one that validation chose].
    baseline : str
        The arm that it is compared with.
    repeat : int
        Which training of both: 0, 1, …
    split : str
        test or val.
    most : int
        Regions that are shown.
    device : str
        auto, cpu or cuda.
    """
    from counterstain.storage import claim, name_on_disk, write_csv
    from counterstain.study.compare import compare_regions, table_of

    run = Path(run)
    if split not in {"val", "test"}:
        raise ConfigError(f"split {split!r}: expected val or test")
    if most < 1:
        raise ConfigError(f"most {most}: expected 1 region or more")
    if arm is None and (arm := _chosen(run)) is None:
        raise InputError(f"{run}: validation chose no arm; name one with --arm")
    asked = {"arm": arm, "baseline": baseline, "repeat": repeat, "split": split}
    if out is not None:
        claim(Path(out), "compare", {"run": str(run.resolve())} | asked)
    found = compare_regions(run, arm, baseline=baseline, repeat=repeat, split=split, most=most, device=device)
    if out is not None:
        from counterstain.report.figures import save_figure
        from counterstain.report.patch_figures import comparison

        for number, region in enumerate(found, start=1):
            save_figure(comparison(region), Path(out) / f"{number:02d}-{name_on_disk(region.region)}.png")
        write_csv(Path(out) / "regions.csv", table_of(found))
    return found


def arm_chosen_by_validation(run: PathLike) -> str | None:
    """Return the arm of a study that validation chose; None where it chose none, or the study is not finished."""
    from counterstain.errors import CounterstainError

    try:
        return _chosen(Path(run))
    except CounterstainError:
        return None


def _chosen(run: Path) -> str | None:
    from counterstain.report.results import read_results
    from counterstain.report.summary import chosen_arm

    chosen = chosen_arm(read_results(run))
    return None if chosen is None else chosen.name
