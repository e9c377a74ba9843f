"""Scores: slides scored by the subtypes that their tissue is made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterstain.api import PathLike, folder_of, is_cohort, open_cohort, verb
from counterstain.errors import ConfigError, InputError

if TYPE_CHECKING:
    import pandas as pd

    from counterstain.data.cohort import Cohort
    from counterstain.segmentation.areas import SlidePart
    from counterstain.taxonomy import Taxonomy


@verb
def score(
    source: PathLike | Cohort,
    *,
    out: PathLike,
    segmenter: PathLike | None = None,
    rule: str | None = None,
    by: str = "area",
    split: str | None = None,
    calibration: PathLike | Cohort | None = None,
    regions: str = "whole",
    mpp_level0: float | None = None,
    device: str = "auto",
    seed: int = 0,
) -> pd.DataFrame:
    """Score slides by the subtypes that their tissue is made of, with intervals. For research, not for diagnosis.

    Parameters
    ----------
    source : str, Path or Cohort
        A cohort; or a slide, an image, or a folder of them.
    out : str or Path
        Folder of score.csv, score.png and score.json, and of confusion.csv where the cohort knows its scores.
    segmenter : str or Path, optional
        Folder of a segmenter trained with segmenter.classes=subtypes [default: the annotations are scored].
    rule : str, optional
        A score rule of the taxonomy, for HER2 2018 or 2007, or a YAML file with one [default: its first].
    by : str
        What shares are counted in: area, or cells, whose nuclei are counted at 1 um per pixel or finer.
    split : str, optional
        train, val, test or all of a cohort [default: test with a segmenter, all without].
    calibration : str, Path or Cohort, optional
        Cohort whose validation patients say how sure the segmenter may be [default: the scored cohort, if it has some].
    seed : int
        Of the intervals.
    regions, mpp_level0
        As for :func:`predict`.
    device
        As for :func:`evaluate`.

    Returns
    -------
    pandas.DataFrame
        A row per slide, then one per patient: the score, its interval and the probability of every score, the shares of
        the subtypes, the known score. ``attrs["agreement"]`` compares patients with their known scores (None where
        fewer than two have one), ``attrs["calibration"]`` is the segmenter's (None without).
    """
    from counterstain.checkpoints import read_header
    from counterstain.segmentation.score import agreement, calibrate, scored, with_known
    from counterstain.storage import claimed

    place, out, segmenter = folder_of(source), Path(out), None if segmenter is None else Path(segmenter)
    slides = isinstance(place, Path) and not is_cohort(place)
    if by not in {"area", "cells"}:
        raise ConfigError(f"--by {by}: expected area or cells")
    if slides and segmenter is None:
        what = "slides have no annotations to score" if place.exists() else "no such cohort"
        raise InputError(f"{place}: {what}; give --segmenter and slides, or a cohort")
    if not slides and (regions != "whole" or mpp_level0 is not None):
        raise InputError(f"{place}: --regions and --mpp-level0 are for slides; a cohort has regions of its own")
    if segmenter is None and calibration is not None:
        raise ConfigError("--calibration is for a segmenter's probabilities; give --segmenter too, or leave it out")
    cohort, header = None if slides else open_cohort(source), None if segmenter is None else read_header(segmenter)
    taxonomy: Taxonomy = (header if cohort is None else cohort).taxonomy  # type: ignore[union-attr] # one of both is there
    chosen, split = taxonomy.score_rule(rule), split or ("test" if header else "all")
    asked: dict[str, Any] = {"segmenter": header and header.sha256, "rule": chosen.model_dump(mode="json"), "by": by}
    asked |= {"source": str(place) if cohort is None else cohort.fingerprint, "regions": regions, "seed": seed}
    measured = None if calibration is None else open_cohort(calibration)
    if measured is None and cohort is not None and (cohort.regions["split"] == "val").any():
        measured = cohort
    with claimed(out, "score", asked | {"split": split, "calibration": measured and measured.fingerprint}):
        sure = None if segmenter is None or measured is None else calibrate(segmenter, measured, device, seed)
        of_slides = {"regions": regions, "mpp_level0": mpp_level0}
        where: dict[str, Any] = {"temperature": sure.temperature if sure else 1.0, "device": device}
        parts = _parts(segmenter, Path(str(place)) if cohort is None else cohort, split, where, of_slides)
        table: pd.DataFrame = with_known(scored(parts, taxonomy, chosen, by=by, seed=seed), cohort)
        known, given = (table.loc[table["level"] == "patient", name].tolist() for name in ("known", "score"))
        found = agreement(known, given, chosen, seed)
        table.attrs = {"calibration": sure, "agreement": found, "rule": chosen}
        _write(out, table, taxonomy, by)
    if header is not None and cohort is not None and header.cohort == cohort.fingerprint:
        _record(Path(str(segmenter)), split)
    return table


def _parts(
    segmenter: Path | None, source: Cohort | Path, split: str, where: dict[str, Any], of_slides: dict[str, Any]
) -> Iterator[SlidePart]:
    """Return the areas of a cohort, annotated or predicted, or of slides."""
    from counterstain.segmentation.areas import annotated_parts, predicted_parts, predicted_slide_parts

    if isinstance(source, Path):
        return predicted_slide_parts(Path(str(segmenter)), source, **of_slides, **where)
    return annotated_parts(source, split) if segmenter is None else predicted_parts(segmenter, source, split, **where)


def _write(out: Path, table: pd.DataFrame, taxonomy: Taxonomy, by: str) -> None:
    from counterstain.report.figures import save_figure
    from counterstain.report.patch_figures import scores
    from counterstain.segmentation.score import NOTICE
    from counterstain.storage import write_csv, write_json

    write_csv(out / "score.csv", table)
    sure, found, rule = (table.attrs[name] for name in ("calibration", "agreement", "rule"))
    save_figure(scores(table, taxonomy, rule, "cell_share" if by == "cells" else "share"), out / "score.png")
    if found is not None:
        write_csv(out / "confusion.csv", found.confusion.rename_axis("known").reset_index())
    about = {"notice": NOTICE, "rule": rule.model_dump(mode="json"), "by": by}
    about["calibration"] = None if sure is None else sure._asdict()
    about["agreement"] = None if found is None else {k: v for k, v in found._asdict().items() if k != "confusion"}
    write_json(out / "score.json", about)


def _record(segmenter: Path, split: str) -> None:
    """Put on record that figures of a split were shown, as ``evaluate`` does."""
    from counterstain.study.records import record_look, run_of

    record_look(run_of(segmenter) or segmenter, "score", ("val", "test") if split == "all" else (split,))
