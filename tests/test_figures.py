from __future__ import annotations

import itertools

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from drawn_results import DEMO_ARMS, HER2, draw_composition, draw_counts, draw_losses, draw_synthetic, results_of

from counterstain.data.patches import Patch, Source
from counterstain.generators.methods import METHODS
from counterstain.report import figures, patch_figures
from counterstain.report.figures import STYLE, colour_of, save_figure, svg_text
from counterstain.report.patch_figures import examples
from counterstain.report.results import Example
from counterstain.study.arms import Arm, read_arm
from counterstain.synthesis.redraw import Redrawn
from counterstain.taxonomy import Subtype, Taxonomy

ARMS = [read_arm(name) for name in DEMO_ARMS]
_, SUBTYPE, SPADE, *_ = ARMS
LESION = Taxonomy(name="t", tissue_class="lesion", subtypes=(Subtype(id=1, name="a", colour="#112233"),))


def texts(figure):
    """Everything that is written in a figure."""
    figure.draw_without_rendering()
    found = [text for axes in figure.axes for text in axes.findobj(mpl.text.Text)]
    found += [text for legend in figure.legends for text in legend.get_texts()]
    return {text.get_text() for text in found if text.get_text()}


def drawn():
    counts = draw_counts(DEMO_ARMS, 2, patients=4)
    return counts, results_of(counts)


def example(size=16, methods=("spade", "oracle (ceiling)")):
    image = np.full((size, size, 3), 200, np.uint8)
    return Example(real=image, mask=image.copy(), new_mask=image.copy(), images=dict.fromkeys(methods, image))


def all_figures():
    counts, results = drawn()
    return {
        "composition": patch_figures.composition(draw_composition(), HER2, mpp=0.5),
        "balance": patch_figures.balance(draw_synthetic(), HER2),
        "boxplots": figures.boxplots(results, HER2, arms=ARMS, reference=SUBTYPE),
        "confusion": figures.confusion(counts, HER2, reference=SUBTYPE, arm=SPADE),
        "training": figures.training_curves(draw_losses(DEMO_ARMS, 1), ARMS),
        "examples": examples([example()], HER2, mpp=0.5),
    }


def test_no_text_is_smaller_than_8_points():
    for name, figure in all_figures().items():
        figure.draw_without_rendering()
        sizes = [t.get_fontsize() for t in figure.findobj(mpl.text.Text) if t.get_text() and t.get_visible()]
        assert min(sizes) >= 8, name


def test_the_same_table_gives_the_same_svg():
    first, second = (svg_text(patch_figures.composition(draw_composition(), HER2)) for _ in range(2))
    assert first == second
    assert first.startswith("<?xml")
    assert "<dc:date>" not in first


def test_drawing_leaves_the_settings_of_matplotlib_alone_and_one_file(tmp_path):
    before = {key: mpl.rcParams[key] for key in STYLE}
    save_figure(patch_figures.balance(draw_synthetic(), HER2), tmp_path / "figure.svg")
    assert {key: mpl.rcParams[key] for key in STYLE} == before
    assert [file.name for file in tmp_path.iterdir()] == ["figure.svg"]


def test_composition_counts_instances_by_part_or_for_the_whole_cohort():
    table = draw_composition()
    train = table.loc[table["split"] == "train", "instances"].sum()
    assert f"train: {train:,} instances" in texts(patch_figures.composition(table, HER2))
    written = texts(patch_figures.composition(table.assign(split=None), HER2, mpp=0.5))
    assert any(text.startswith("cohort: ") for text in written)
    assert any(text.endswith("mm²") for text in written)
    assert "no instances" in {t.get_text() for t in patch_figures.composition(table[:0], HER2).texts}


def test_large_numbers_over_the_bars_are_short():
    rows = [("train", name, n, 1) for name, n in zip(HER2.names, (7, 1234, 12_345, 1_234_567, 999_600), strict=True)]
    table = pd.DataFrame(rows, columns=["split", "subtype", "instances", "area_px"])
    assert {"7", "1,234", "12k", "1.2M", "1M"} <= texts(patch_figures.composition(table, HER2))


def test_balance_puts_methods_with_the_same_numbers_together():
    same = draw_synthetic()
    assert len(patch_figures.balance(same, HER2).axes) == 2
    same.loc[same["method"] == "spade", "instances"] += 1
    assert len(patch_figures.balance(same, HER2).axes) == 4


def test_boxplots_name_the_tissue_class_and_mark_the_oracle_and_an_arm_without_results():
    _, results = drawn()
    oracle = Arm(method="oracle", amount=1.0)
    results["arm"] = results["arm"].replace("spade+100", oracle.name)
    written = texts(figures.boxplots(results, LESION, arms=[SUBTYPE, oracle, Arm(name="lost")], reference=SUBTYPE))
    assert {"Lesion Dice", "no result", "oracle +100\N{NO-BREAK SPACE}% (ceiling)"} <= written


def test_the_box_is_mean_and_sd_and_the_whiskers_are_the_extremes():
    _, results = drawn()
    axes = figures.boxplots(results, HER2, arms=[SUBTYPE], reference=SUBTYPE).axes[0]
    values = results.query("arm == 'subtype' and split == 'test'")["dice"].to_numpy()
    box = axes.patches[0]
    assert box.get_x() == pytest.approx(values.mean() - values.std(ddof=1))
    assert box.get_width() == pytest.approx(2 * values.std(ddof=1))
    assert axes.lines[0].get_xdata() == pytest.approx([values.min(), values.max()])


def test_confusion_shows_recall_averaged_over_repeats():
    counts, results = drawn()
    written = texts(figures.confusion(counts, HER2, reference=SUBTYPE, arm=SPADE))
    recall = results.query("arm == 'subtype' and split == 'test'")["recall_HER2 0"].mean()
    assert {f"{100 * recall:.1f}", "Difference (points)"} <= written
    assert len(figures.confusion(counts, HER2, reference=SUBTYPE, arm=None).axes) == 1
    without_pixels = counts[counts["subtype"] != 5]
    assert "\N{EN DASH}" in texts(figures.confusion(without_pixels, HER2, reference=SUBTYPE, arm=SPADE))


def test_trainings_that_differ_by_arm_share_a_panel():
    figure = figures.training_curves(draw_losses(DEMO_ARMS, 2), ARMS)
    titles = [axes.get_title("left") for axes in figure.axes if axes.get_visible()]
    assert titles.count("segmenter: loss") == 1
    assert len(titles) == 7


def test_long_curves_are_thinned_and_values_that_are_not_finite_left_out():
    losses = draw_losses((), 0, steps=20_000)
    losses.loc[losses["step"] > 19_000, "value"] = np.nan
    x, y = figures.training_curves(losses, ()).axes[0].lines[0].get_data()
    assert (len(x), np.isfinite(y).all()) == (150, True)


def test_examples_stand_beside_their_methods_with_a_scale_bar_large_ones_shrunk():
    written = texts(examples([example(size=100)], HER2, mpp=1.0))
    assert {"real", "its labels", "new labels", "spade", "oracle\n(ceiling)", "50 µm"} <= written
    assert examples([example(size=1024)], HER2).axes[0].images[0].get_array().shape == (256, 256, 3)


def test_long_names_and_dollars_are_written_as_they_are_and_nothing_overlaps():
    names = [f"$x^2$ and ${i} of a subtype with the longest name that a taxonomy allows, nearly 80" for i in range(5)]
    named = dict(zip(HER2.names, names, strict=True))
    subtypes = [subtype.model_copy(update={"name": named[subtype.name]}) for subtype in HER2.subtypes]
    long = Taxonomy(name="long", subtypes=subtypes)
    counts, _ = drawn()
    image = np.zeros((16, 16, 3), np.uint8)
    source = Source(region="r", slide="s", patient="p", y_px=0, x_px=0)
    patch = Patch(image=image, instances=image[..., 0].astype(np.int32), subtypes={}, source=source)
    redrawn = [Redrawn(patch=patch, subtype=1, drawn=dict.fromkeys(range(1, 6), image))]
    for figure in (
        patch_figures.balance(draw_synthetic().replace(named), long),
        patch_figures.composition(draw_composition().replace(named), long),
        figures.confusion(counts, long, reference=SUBTYPE, arm=SPADE),
        patch_figures.redrawn_as_every_subtype(redrawn, long, mpp=0.5),
    ):
        written = texts(figure)
        assert any(text.startswith("$x^2$") for text in written)
        for axes in figure.axes:
            assert axes.get_position().width > 0.1
            for group in (axes.get_xticklabels(), axes.get_yticklabels(), axes.texts):
                boxes = [t.get_window_extent() for t in group if t.get_text() and not t.get_rotation()]
                assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_every_method_has_its_own_colour():
    assert len({colour_of(method) for method in (None, *METHODS)}) == len(METHODS) + 1
