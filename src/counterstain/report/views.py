"""The figures of a report with what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from matplotlib.figure import Figure

from counterstain.report import figures
from counterstain.report.arms import CEILING, is_oracle, label_of
from counterstain.report.numbers import counted
from counterstain.report.results import Results


@dataclass(frozen=True, slots=True)
class FigureView:
    """A figure on the page."""

    anchor: str
    figure: Figure
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """Data URI of the figure as SVG."""
        svg = figures.svg_text(self.figure)
        return "data:image/svg+xml," + quote(" ".join(svg.split("\n")), safe=" /:;=,'()!*@+$?~")


def figure_views(results: Results, chosen: str | None) -> list[FigureView]:
    """Draw every figure; ``chosen`` is the arm that validation chose."""
    study, taxonomy = results.study, results.study.taxonomy
    tissue, reference = taxonomy.tissue_class, label_of(study.reference)
    beside = f" beside {label_of(chosen)}, chosen on validation, and their difference" if chosen else ""
    return [
        FigureView(
            "boxplots",
            figures.boxplots(results.results, taxonomy, arms=results.arms, reference=study.reference),
            f"Box plots of {tissue} Dice and subtype variance on the test part for {_listed(results.arms)}. "
            "The numbers stand in the results table.",
            f"{tissue.capitalize()} Dice and subtype variance on the test part. Box: mean ± standard deviation; "
            f"whiskers: smallest and largest repeat; dots: repeats; dashed line: mean of {reference}."
            + (f" Oracle: {CEILING}." if any(map(is_oracle, results.arms)) else ""),
        ),
        FigureView(
            "confusion",
            figures.confusion(results.counts, taxonomy, reference=study.reference, arm=chosen),
            f"Confusion by subtype of {reference}{beside}, in percent of each row.",
            f"Confusion by subtype on the test part: {reference}{beside}. Pixels pooled over the part, percent of each "
            "row, averaged over repeats.",
        ),
        FigureView(
            "composition",
            figures.composition(results.composition, taxonomy, mpp=study.cohort.mpp),
            f"Bars of the share of {', '.join(taxonomy.names)} in each part of the cohort, by instances and by area.",
            "Subtypes in each part of the cohort, by instances and by annotated area.",
        ),
        FigureView(
            "balance",
            figures.balance(results.synthetic, taxonomy),
            "Bars of the share of every subtype in the synthetic sets before and after relabelling.",
            "Subtypes in the synthetic sets before (hatched) and after (filled) relabelling. Dashed: equal shares. "
            "Relabelling balances what it was told to, so instances and area differ.",
        ),
        FigureView(
            "examples",
            figures.examples(results.examples, taxonomy, mpp=study.cohort.mpp),
            f"{counted(len(results.examples), 'patch', 'patches')}: real image, its labels, new labels and the image "
            "that every method made of them.",
            "Real patches, their labels, the new labels, and what every method made of them.",
        ),
        FigureView(
            "training",
            figures.training_curves(results.losses),
            "Training curves of every generator and segmenter, one panel for each loss.",
            "Losses by optimiser step; a line for each training. Long curves are drawn as means over equal numbers of "
            "steps.",
        ),
    ]


def _listed(arms: Sequence[str]) -> str:
    return ", ".join(label_of(arm) for arm in arms)
