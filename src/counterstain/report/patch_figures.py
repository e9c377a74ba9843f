"""Figures of patches: the subtypes in a cohort and in synthetic sets, generated tissue beside real tissue."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch as Key
from matplotlib.patches import Rectangle
from PIL import Image

from counterstain.report.figures import (
    EDGE,
    FAINT,
    INK,
    WIDTH_IN,
    empty,
    light_grid,
    new_figure,
    styled,
    subtype_key,
    wrapped,
)
from counterstain.report.results import Example
from counterstain.taxonomy import ScoreRule, Taxonomy

if TYPE_CHECKING:
    from counterstain.study.compare import ComparedRegion
    from counterstain.synthesis.redraw import Redrawn

MOST_NUMBERS, ROOMY = 24, 15  # bars that have room for a number over them, and for a larger one
MOST_EXAMPLES = 6
MOST_SCORED = 60  # patients in a figure
SHOWN_PX = 256  # of a patch; sharper than a screen shows it in a row of five
GAP = 0.03  # around a picture, as a share of its width
BARS_UM = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@styled
def composition(table: pd.DataFrame, taxonomy: Taxonomy, *, mpp: float | None = None) -> Figure:
    """Draw the share of each subtype in each split, by instances and by area (the paper's figure 2).

    ``table`` has the columns split (all missing: the cohort is not split), subtype (name), instances and area_px. With
    ``mpp``, the micrometres per pixel, areas are written in mm².
    """
    unsplit = "cohort" if table["split"].isna().all() else "no split"
    table = table.assign(split=table["split"].astype(object).where(table["split"].notna(), unsplit).astype(str))
    parts = sorted(table["split"].unique(), key=lambda part: ({"train": 0, "val": 1, "test": 2}.get(part, 3), part))
    if not parts:
        return empty("no instances")
    figure = new_figure(4.8)
    upper, lower = figure.subplots(2, 1)
    instances, area = (
        table.pivot_table(index="split", columns="subtype", values=column, aggfunc="sum")
        .reindex(index=parts, columns=list(taxonomy.names))
        .fillna(0)
        .to_numpy(float)
        for column in ("instances", "area_px")
    )
    mm2 = area * (mpp * 1e-3) ** 2 if mpp else None
    _grouped_bars(upper, instances, taxonomy, [_few_figures(n) for n in instances.T.ravel()])
    _grouped_bars(lower, area, taxonomy, [_few_figures(a) for a in mm2.T.ravel()] if mm2 is not None else [])
    upper.set_title("Instances")
    lower.set_title("Area (mm² over the bars)" if mm2 is not None else "Area")
    of_area = (lower, area, "px") if mm2 is None else (lower, mm2, "mm²")
    for axes, amounts, unit in ((upper, instances, "instances"), of_area):
        totals = zip(parts, amounts.sum(axis=1), strict=True)
        axes.set_xticks(range(len(parts)), [f"{part}: {_short(total)} {unit}" for part, total in totals])
    subtype_key(figure, taxonomy.subtypes)
    return figure


@styled
def balance(table: pd.DataFrame, taxonomy: Taxonomy) -> Figure:
    """Draw the share of each subtype in the synthetic sets, before and after relabelling.

    ``table`` has the columns method (name of the set), subtype (name), instances, area_px, instances_before and
    area_px_before. Sets with the same numbers share a row of the figure.
    """
    groups = _same_balance(table)
    if not groups:
        return empty("no synthetic set")
    figure = new_figure(0.6 + 2.1 * len(groups))
    rows = figure.subplots(len(groups), 2, sharey=True, squeeze=False)
    for axes_row, (methods, part) in zip(rows, groups, strict=True):
        by_subtype = part.groupby("subtype").sum(numeric_only=True).reindex(taxonomy.names, fill_value=0)
        named = "All methods" if len(groups) == 1 else fill(", ".join(methods), 44)
        for axes, column, title in zip(axes_row, ("instances", "area_px"), ("instances", "area"), strict=True):
            _before_and_after(axes, by_subtype[f"{column}_before"], by_subtype[column], taxonomy)
            axes.set_title(f"{named}: {title}" if column == "instances" else title)
        axes_row[0].set_ylabel("share (%)")
    before = Key(facecolor="white", hatch="////", label="before relabelling", **EDGE)
    after = Key(facecolor=FAINT, label="after", **EDGE)
    figure.legend(handles=[before, after], loc="outside lower center", ncols=2)
    return figure


@styled
def scores(table: pd.DataFrame, taxonomy: Taxonomy, rule: ScoreRule, prefix: str = "share") -> Figure:
    """Draw what the scored tissue of each patient is made of, with its score, interval and known score beside it.

    ``table`` is that of :func:`counterstain.score`, ``prefix`` of its columns says what shares are counted in. What a
    ``rule`` does not count is left out, so that bars show the shares that it looks at.
    """
    counted = [subtype for subtype in taxonomy.subtypes if subtype.name in rule.counted]
    left_out = [name for name in taxonomy.names if name not in rule.counted]
    rows = table[table["level"] == "patient"].head(MOST_SCORED)
    figure = new_figure(1.2 + 0.24 * len(rows))
    axes = figure.subplots()
    places, left = np.arange(len(rows)), np.zeros(len(rows))
    whole = rows[[f"{prefix}_{subtype.name}" for subtype in counted]].sum(axis=1).to_numpy(float)
    for subtype in counted:
        share = 100 * rows[f"{prefix}_{subtype.name}"].fillna(0).to_numpy(float) / np.where(whole > 0, whole, 1)
        axes.barh(places, share, 0.8, left, color=subtype.colour, **EDGE)
        left += share
    of = f"{taxonomy.tissue_class} without {', '.join(left_out)}" if left_out else taxonomy.tissue_class
    for place, row in zip(places.tolist(), rows.to_dict("records"), strict=True):
        between = "" if row["low"] in {None, row["high"]} else f" ({row['low']} to {row['high']})"
        known = "" if row["known"] is None else f", known {row['known']}"
        axes.text(102, place, f"{row['score'] or 'no score'}{between}{known}", va="center")
    axes.set(xlim=(0, 100), ylim=(len(rows) - 0.4, -0.6), xlabel=wrapped(f"share of the {of} (%)", 70))
    axes.set_yticks(places, [wrapped(str(name), 30) for name in rows["patient"]])
    axes.set_title("Scores for research only, not for diagnosis")
    subtype_key(figure, counted)
    return figure


def _grouped_bars(axes: Axes, values: np.ndarray, taxonomy: Taxonomy, numbers: Sequence[str]) -> None:
    parts, subtypes = values.shape
    shares = _percent(values, axis=1)
    width = 0.84 / subtypes
    for k, subtype in enumerate(taxonomy.subtypes):
        x = np.arange(parts) + (k - (subtypes - 1) / 2) * width
        bars = axes.bar(x, shares[:, k], width, color=subtype.colour, **EDGE)
        if numbers and parts * subtypes <= MOST_NUMBERS:
            size = 8 if parts * subtypes <= ROOMY else 7
            axes.bar_label(bars, numbers[k * parts : (k + 1) * parts], padding=1.5, fontsize=size)
    axes.set_ylabel("share (%)")
    axes.set_ylim(0, max(shares.max() * 1.15, 1))
    axes.tick_params(axis="x", length=0)
    light_grid(axes, "y")


def _before_and_after(axes: Axes, before: pd.Series, after: pd.Series, taxonomy: Taxonomy) -> None:
    x = np.arange(len(taxonomy.subtypes))
    colours = [s.colour for s in taxonomy.subtypes]
    axes.bar(x - 0.2, _percent(before.to_numpy(float)), 0.38, color="white", hatch="////", **EDGE)
    axes.bar(x + 0.2, _percent(after.to_numpy(float)), 0.38, color=colours, **EDGE)
    axes.axhline(100 / len(x), color=FAINT, linewidth=0.9, linestyle="--")
    many = len(x) > 6 or max(map(len, taxonomy.names)) > 60 // len(x)  # letters that stand side by side
    names = [wrapped(name, 18) for name in taxonomy.names]
    axes.set_xticks(x, names, rotation=45 if many else 0, ha="right" if many else "center")
    axes.tick_params(axis="x", length=0)
    light_grid(axes, "y")


def _same_balance(table: pd.DataFrame) -> list[tuple[list[str], pd.DataFrame]]:
    """Group sets with the same numbers: methods mostly share their relabelled masks."""
    groups: dict[str, tuple[list[str], pd.DataFrame]] = {}
    for method, part in table.groupby("method", sort=False):
        numbers = part.drop(columns="method").sort_values("subtype")
        groups.setdefault(numbers.to_csv(index=False), ([], numbers))[0].append(str(method))
    return list(groups.values())


def _percent(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    total = values.sum(axis=axis, keepdims=True)
    return 100 * values / np.where(total > 0, total, 1)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"


def _few_figures(value: float) -> str:
    """Write a number that fits over a bar: 0.034, 34, 1,234, 12k, 1.2M."""
    if value < 10_000:
        return _short(value)
    return f"{value / 1e3:.0f}k" if value < 999_500 else f"{value / 1e6:.2g}M"


@styled
def examples(patches: Sequence[Example], taxonomy: Taxonomy, *, mpp: float | None = None) -> Figure:
    """Draw patches beside the image that each method drew for their new labels (the paper's figure 4).

    With ``mpp``, the micrometres per pixel of the patches, there is a scale bar.
    """
    shown = patches[:MOST_EXAMPLES]
    if not shown:
        return empty("no examples")
    methods = list(dict.fromkeys(method for patch in shown for method in patch.images))
    titles = ["real", "its labels", "new labels", *(method.replace(" (", "\n(") for method in methods)]
    rows = [[patch.real, patch.mask, patch.new_mask, *(patch.images.get(m) for m in methods)] for patch in shown]
    figure, _ = _pictures(titles, rows, mpp=mpp, masks=(1, 2))
    subtype_key(figure, taxonomy.subtypes, background=True)
    return figure


@styled
def redrawn_as_every_subtype(rows: Sequence[Redrawn], taxonomy: Taxonomy, *, mpp: float) -> Figure:
    """Draw real patches in frames of their subtypes' colours, each beside what it became as every subtype.

    ``rows`` are one at least; ``mpp`` are the micrometres per pixel of the patches, for the scale bar.
    """
    of_id = {subtype.id: subtype for subtype in taxonomy.subtypes}
    titles = ["real", *(of_id[subtype].name for subtype in rows[0].drawn)]
    frames = [of_id[row.subtype].colour for row in rows]
    figure, axes = _pictures(titles, [[row.patch.image, *row.drawn.values()] for row in rows], mpp=mpp, frames=frames)
    for number, row in enumerate(rows):
        axes.text(-GAP, number + 0.5, wrapped(of_id[row.subtype].name, 20), ha="right", va="center", rotation=90)
    axes.set_xlim(left=-0.16)
    return figure


@styled
def comparison(region: ComparedRegion) -> Figure:
    """Draw a region with the outlines of the reference and of two arms, and where these differ."""
    baseline, arm = (wrapped(name, 24) for name in region.arms)
    shown = {
        "image": region.image,
        "reference": region.reference(),
        baseline: region.outlined("baseline"),
        arm: region.outlined("arm"),
        "difference": region.difference(),
    }
    height, width = region.image.shape[:2]
    figure = new_figure(WIDTH_IN / len(shown) * height / width + 1.0)
    for axes, (title, picture) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        axes.imshow(picture)
        axes.set_title(title)
        axes.axis("off")
    figure.suptitle(f"{region.region}, slide {region.slide}: {100 * region.disagreement:.1f} % of the pixels differ")
    keys = [Key(facecolor=s.colour, label=wrapped(s.name, 40), **EDGE) for s in region.taxonomy.subtypes]
    for name, ((red, green, blue), share) in region.colours.items():
        text = f"{wrapped(name, 24)} alone right: {100 * share:.1f} %"
        keys.append(Key(facecolor=(red / 255, green / 255, blue / 255), label=text, **EDGE))
    figure.legend(handles=keys, loc="outside lower center", ncols=4)
    return figure


def _pictures(
    titles: Sequence[str],
    rows: Sequence[Sequence[np.ndarray | None]],
    *,
    mpp: float | None,
    masks: Sequence[int] = (),
    frames: Sequence[str] | None = None,
) -> tuple[Figure, Axes]:
    """Draw rows of pictures under titles; ``masks`` are columns of masks, ``frames`` colours for the first column."""
    figure = new_figure(WIDTH_IN / len(titles) * len(rows) + (0.35 if frames else 0.75))
    axes = figure.subplots()  # one for all pictures: an axes for each takes seconds to draw
    for column, title in enumerate(titles):
        lines = "\n".join(wrapped(line, max(70 // len(titles), 6)) for line in title.split("\n"))
        axes.text(column + 0.5, -GAP, lines, ha="center", va="bottom", weight="bold")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            frame = frames[row] if frames and column == 0 else None
            edge: dict[str, Any] = {"edgecolor": frame or "#c8c8c8", "linewidth": 3.0 if frame else 0.8}
            left, top, side = column + GAP, row + GAP, 1 - 2 * GAP
            axes.add_patch(Rectangle((left, top), side, side, fill=False, **edge))
            if image is None:
                axes.text(column + 0.5, row + 0.5, "none", ha="center", va="center", color=FAINT)
            else:
                shown = _shrunk(image, Image.Resampling.NEAREST if column in masks else Image.Resampling.LANCZOS)
                axes.imshow(shown, extent=(left, left + side, top + side, top))
    if mpp:
        _scale_bar(axes, len(rows), next(im for im in rows[-1] if im is not None).shape[1], mpp)
    axes.set(xlim=(0, len(titles)), ylim=(len(rows) + (0.16 if mpp else 0), -GAP), aspect="equal")
    axes.axis("off")
    return figure, axes


def _shrunk(image: np.ndarray, how: Image.Resampling) -> np.ndarray:
    longest = max(image.shape[:2])
    if longest <= SHOWN_PX:
        return image
    height, width = (max(1, round(n * SHOWN_PX / longest)) for n in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), how))


def _scale_bar(axes: Axes, row: int, width_px: int, mpp: float) -> None:
    """Draw a bar of a round length under the first picture of the last row, at most 0.6 of its width."""
    width_um = width_px * mpp
    length = max((um for um in BARS_UM if um <= 0.6 * width_um), default=BARS_UM[0])
    share = min(length / width_um, 1) * (1 - 2 * GAP)
    axes.plot([GAP, GAP + share], [row, row], color=INK, linewidth=2, solid_capstyle="butt")
    axes.text(GAP, row + 0.03, f"{length} µm", ha="left", va="top")
