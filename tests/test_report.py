from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from drawn_results import METHODS, draw_results
from typer.testing import CliRunner

from counterstain.cli import app
from counterstain.errors import CounterstainError, InputError, StorageError
from counterstain.report.page import data_sheet, render, write_report
from counterstain.report.results import find_results, read_results
from counterstain.report.summary import chosen_arm, overview, smallest_p_caution, summarise
from counterstain.report.tables import (
    Effect,
    differences_table,
    effects_on_test,
    filter_table,
    fixed,
    interval,
    missed_most,
    needed_text,
    p_text,
    power_table,
    results_table,
    signed,
)
from counterstain.storage import claim
from counterstain.study.arms import Arm

ARMS = ("tumor", "subtype", "spade+100")
SPADE, ORACLE = Arm(method="spade", amount=1.0), Arm(method="oracle", amount=1.0)
MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return draw_results(tmp_path_factory.mktemp("demo") / "run")


@pytest.fixture(scope="module")
def page(demo):
    return render(read_results(demo))


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    return draw_results(tmp_path_factory.mktemp("small") / "run", ARMS, 2, patients=3, methods=("spade",))


@pytest.fixture
def small(unharmed, tmp_path):
    """A run whose files a test may damage."""
    return Path(shutil.copytree(unharmed, tmp_path / "run"))


def edit_study(run, **changes):
    path = run / "results" / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_results(run, change):
    path = run / "results" / "results.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)


def summary_of(tmp_path, arms=ARMS, repeats=5, **kwargs):
    results = read_results(draw_results(tmp_path / "run", arms, repeats, methods=("spade",), **kwargs))
    return summarise(results, effects_on_test(results, draws=300), chosen_arm(results))


# --- the page


def test_the_page_asks_for_nothing_from_outside(page):
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#|cells/)""", page)
    assert not re.findall(r"url\((?!%23)|@import|https?://(?!www\.w3\.org)", page)
    assert "default-src 'none'" in page


def test_the_page_has_every_section_every_image_an_alt_text_and_the_record_of_what_ran(page):
    for text in ("background_share: 0.5", "2.15.0", "Images rejected by the filter", "cpu, 2 threads", *METHODS):
        assert text in page
    anchors = {"boxplots", "confusion", "composition", "balance", "examples", "training", "summary", "record"}
    assert anchors <= set(re.findall(r'id="(\w+)"', page))
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 6 + 16  # figures, gallery
    assert all(re.search(r'alt="[^"]{20,}"', image) for image in images)


def test_names_are_escaped_and_failures_shown(small):
    failed = [{"cell": "segmenter spade+100 #1", "why": "the loss became NaN"}]
    edit_study(small, name="<script>alert(1)</script>", failed=failed)
    edit_results(small, lambda t: t[(t["arm"] != "spade+100") | (t["repeat"] == 0)])
    html = render(read_results(small), draws=50)
    assert "<script>alert" not in html
    for text in ("&lt;script&gt;alert", "the loss became NaN", "1 cell of the study failed"):
        assert text in html


def test_a_study_without_synthetic_images_has_a_page_and_chooses_no_arm(tmp_path):
    run = draw_results(tmp_path / "run", ("tumor", "subtype", "subtype+mixup"), 1, patients=2, methods=())
    assert chosen_arm(read_results(run)) is None
    for name in ("synthetic.csv", "losses.csv", "examples/examples.json"):
        (run / "results" / name).unlink()
    html = render(read_results(run), draws=50)
    assert "Nothing to compare" in html


def test_data_sheets_say_what_of_the_real_patch_goes_into_an_image(tmp_path):
    results = read_results(draw_results(tmp_path / "run", ("subtype", "spade+100", "inpainting+100"), 1))
    sets = {found.name: found for found in results.sets}
    shown = {"counterstain": {"shows": "contrast"}, "synthesis": {"style": {"source": "own"}}}

    def method(name, settings):
        return data_sheet(sets[name].model_copy(update={"settings": settings}), (), results.study).facts["Method"]

    assert method("spade", {}) == "SPADE: the whole image is drawn from the mask and random latent values"
    assert "the mask, the nuclei of the real patch (its haematoxylin) and the style of its own" in method(
        "spade", shown
    )
    assert "the patch around them and noise; the rest is the real patch" in method("inpainting", {})
    assert "the style of its own slide and noise; the rest" in method("inpainting", shown)


# --- what it says


def test_an_improvement_is_said_with_its_interval_and_p_value_corrected_for_the_other_arms(tmp_path):
    summary = summary_of(tmp_path, gain={"spade+100": 0.2, "tumor": -0.1})
    assert summary.verdict.startswith("Improved")
    assert "spade +100\N{NO-BREAK SPACE}% was chosen on validation." in summary.finding
    assert re.search(r"95\N{NO-BREAK SPACE}% interval [^)]*; p.=.0\.\d+\)", summary.finding)
    assert re.search(r"p.=.0\.\d+, corrected 0\.\d+\)", dict(summary.arms)["tumor-sampled"])


def test_the_first_screen_says_how_much_of_the_subtype_that_is_missed_most_is_found_and_names_harm(tmp_path):
    results = read_results(draw_results(tmp_path / "run", ARMS, 5, gain={"spade+100": -0.3}, methods=("spade",)))
    effects = effects_on_test(results, draws=300)
    summary = summarise(results, effects, SPADE)
    of_missed = effects["spade+100", "recall_HER2 0"]
    before, after = (f"{100 * share:.0f}\N{NO-BREAK SPACE}%" for share in (of_missed.reference, of_missed.value))
    assert summary.headline.startswith(f"HER2 0: {before} of its pixels found")
    assert after in summary.headline
    assert "less HER2 0 is found" in summary.finding.partition("Harm: ")[2]
    table = summary.by_subtype
    assert [row.head for row in table.rows] == [
        *results.study.taxonomy.names,
        "Dice of tumour",
        "Spread of the recalls",
    ]
    assert table.rows[0].tags == ("missed most",)
    assert table.rows[0].cells[2].text == signed(100 * of_missed.mean, 1)


def test_a_terminal_shows_the_subtype_that_is_missed_most_first_and_every_arm_that_does_harm(tmp_path):
    found = overview(
        read_results(draw_results(tmp_path / "run", ARMS, 5, gain={"spade+100": -0.3}, methods=("spade",)))
    )
    assert found.columns[2:4] == ("HER2 0 found", "difference")
    arms = {row[0]: row for row in found.rows}
    assert arms["subtype-sampled"][3] == ""
    assert float(arms[SPADE.label][3].replace(MINUS, "-")) < -20
    assert any(line.startswith(f"{SPADE.label}. Harm: ") and "less HER2 0 is found" in line for line in found.lines)


def test_the_subtype_that_is_missed_most_is_chosen_on_validation(tmp_path):
    results = read_results(draw_results(tmp_path / "run", ARMS, 2, methods=("spade",)))
    spoilt = results.results["split"] == "test"
    changed = results.results.assign(**{"recall_HER2 3+": results.results["recall_HER2 3+"].mask(spoilt, 0.01)})
    assert missed_most(replace(results, results=changed)) == missed_most(results) == "HER2 0"


def test_a_variance_that_grows_by_thousands_of_per_cent_is_told_as_the_spread_of_recalls(tmp_path):
    results = read_results(draw_results(tmp_path / "run", ARMS, 5, methods=("spade",)))
    huge = Effect(n=5, reference=0.0004, value=0.0225, mean=0.0221, relative=55.2, low=0.01, high=0.03, p=0.1)
    effects = {("spade+100", "subtype_variance"): replace(huge, relative_low=20, relative_high=71.7)}
    summary = summarise(results, effects | {("spade+100", "dice"): Effect(n=5, mean=0.0)}, SPADE)
    assert "from 2.0 to 15.0 points (p" in summary.finding
    assert "5520" not in summary.finding + differences_table(results, effects, SPADE).rows[1].cells[2].text


def test_gains_whose_intervals_include_zero_are_not_demonstrated_whatever_the_test_says(tmp_path):
    results = read_results(draw_results(tmp_path / "run", ARMS, 5, methods=("spade",)))
    gain = Effect(n=5, mean=0.003, relative=0.003, low=-0.001, high=0.008, relative_low=-0.1, relative_high=0.1, p=0.3)
    sure = replace(gain, mean=-0.003, relative=-0.5, p=0.01, p_holm=0.04)
    effects = {("spade+100", "dice"): gain, ("spade+100", "subtype_variance"): sure}
    summary = summarise(results, effects, SPADE)
    assert summary.verdict == "No improvement shown"
    assert "both intervals include zero, although the test of variance alone" in summary.finding
    assert "corrected 0.040): undecided" in summary.arms[0][1]


def test_no_improvement_is_said_plainly_and_a_baseline_that_validation_ranks_higher_is_named(tmp_path):
    summary = summary_of(tmp_path, gain={"spade+100": -0.3, "subtype": 0.1})
    assert summary.verdict == "No improvement"
    assert summary.finding.startswith("Synthetic images brought no improvement.")
    assert re.search(
        r"validation, where subtype-sampled did better still \(Dice 0\.\d+ versus 0\.\d+\)", summary.finding
    )


@pytest.mark.parametrize("gain", [{"spade+100": 0.2}, {"spade+100": -0.3, "subtype": 0.1}])
def test_few_repeats_and_few_patients_are_said_to_prove_nothing(tmp_path, gain):
    summary = summary_of(tmp_path, repeats=2, patients=3, gain=gain)
    assert "With 2 repeats nothing can be concluded" in summary.finding
    assert all("no improvement" not in sentence.lower() for _, sentence in summary.arms)
    for words in ("Run at least 5 repeats", "3 patients"):
        assert any(words in caution for caution in summary.cautions)


def test_two_patients_are_too_few_for_an_interval(tmp_path):
    summary = summary_of(tmp_path, patients=2, gain={"spade+100": -0.3})
    assert any("too few patients for an interval" in caution for caution in summary.cautions)
    assert "no interval" in summary.finding
    assert "interval +" not in summary.finding


def test_a_subtype_of_one_test_patient_leaves_the_variance_without_an_interval(tmp_path):
    run = draw_results(tmp_path / "run", ARMS, 5, methods=("spade",))
    counts = pd.read_parquet(run / "results" / "counts.parquet")
    last = counts.loc[counts["split"] == "test", "patient"].max()
    elsewhere = (counts["subtype"] == 1) & (counts["split"] == "test") & (counts["patient"] != last)
    counts.loc[elsewhere, ["predicted_background", "predicted_tumour"]] = 0
    counts.to_parquet(run / "results" / "counts.parquet")
    results = read_results(run)
    effects = effects_on_test(results, draws=300)
    summary = summarise(results, effects, SPADE)
    assert any(caution.startswith("HER2 0: found in only one test patient") for caution in summary.cautions)
    assert re.search(r"variance .[\d.]+.%, no interval[;)]", summary.finding)
    assert "no interval" in differences_table(results, effects, SPADE).rows[0].cells[2].note


def test_the_best_arm_is_chosen_on_validation(demo):
    results = read_results(demo)
    chosen, table = chosen_arm(results), results.results
    for split, same in (("test", True), ("val", False)):
        spoilt = (table["arm"] == chosen.name) & (table["split"] == split)
        worse = replace(results, results=table.assign(dice=table["dice"].mask(spoilt, 0.01)))
        assert (chosen_arm(worse) == chosen) is same


def test_the_oracle_is_a_ceiling_and_never_the_best_arm(tmp_path):
    arms = ("subtype", "spade+100", "oracle+100")
    run = draw_results(tmp_path / "run", arms, 2, gain={"oracle+100": 0.4}, methods=("spade", "oracle"))
    results = read_results(run)
    assert chosen_arm(results) == SPADE
    effects = effects_on_test(results, draws=50)
    sentences = dict(summarise(results, effects, SPADE).arms)
    assert sentences[ORACLE.label].startswith("Ceiling, phantom only.")
    assert results_table(results, "test", SPADE).rows[-1].tags == ("ceiling, phantom only",)
    assert filter_table(results).rows[-1].head == "oracle (ceiling, phantom only)"


def test_power_is_said_for_the_chosen_arm_and_tabulated_for_all(tmp_path):
    results = read_results(draw_results(tmp_path / "run", ARMS, 4, gain={"spade+100": 0.05}, methods=("spade",)))
    effects = effects_on_test(results, draws=50)
    assert effects["spade+100", "dice"].low < effects["spade+100", "dice"].high
    assert pd.isna(effects["spade+100", "precision"].low)  # further measures have no interval
    said = summarise(results, effects, SPADE).power
    assert "difference in Dice of this size" in said
    table = power_table(results, effects)
    assert [row.head for row in table.rows] == ["tumor-sampled", SPADE.label]
    assert len(table.rows[0].cells) == len(table.columns) - 1


def test_it_is_said_where_p_values_end_with_few_patients():
    assert smallest_p_caution(8, 1) == ""
    assert "no p-value can be below 0.008, and corrected for 13 arms none below 0.10" in smallest_p_caution(8, 13)
    assert smallest_p_caution(40, 13) == ""


def test_numbers_p_values_and_needs_are_written_as_people_read_them():
    written = [p_text(p).replace("\N{NO-BREAK SPACE}", " ") for p in (0.0004, 0.0312, 0.4567, math.nan)]
    assert written == ["p < 0.001", "p = 0.031", "p = 0.46", ""]
    needs = [needed_text(number, "repeat") for number in (9.0, math.inf, math.nan)]
    assert needs == ["9 repeats", "not achievable", ""]
    assert signed(-1.26, 1) == f"{MINUS}1.3"
    assert signed(1.26, 1) == "+1.3"
    assert [signed(value, 1) for value in (-0.01, 0.0, 0.01)] == [f"{MINUS}0.0", "0.0", "+0.0"]
    assert signed(float("nan"), 1) == "\N{EN DASH}"
    assert fixed(float("nan"), 2) == "\N{EN DASH}"
    assert interval(-1, 2, 0) == f"{MINUS}1 to +2"


# --- bad input


def test_a_results_folder_is_found_from_the_run_and_from_itself(demo):
    assert find_results(demo) == find_results(demo / "results") == demo / "results"


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(InputError, match="contains no results of a study"):
        read_results(tmp_path)
    claim(tmp_path, "study", {"name": "small"})
    with pytest.raises(InputError, match="the study is not finished"):
        read_results(tmp_path)


@pytest.mark.parametrize("name", ["counts.parquet", "results.csv", "composition.csv", "losses.csv", "study.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x81broken\n\x9d,", b""])
def test_a_damaged_file_is_named_and_a_missing_table_means_not_finished(small, name, content):
    file = small / "results" / name
    file.write_bytes(content)
    with pytest.raises(CounterstainError, match=name):
        read_results(small)
    file.unlink()
    if name not in {"losses.csv", "study.json"}:  # a study of an earlier version wrote no losses
        with pytest.raises(InputError, match=f"{name}: no such file; the study is not finished"):
            read_results(small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[t["repeat"] == 0], r"not finished \(3 of 6 cells have no result\)"),
        (lambda t: t.drop(columns="recall_HER2 2+"), r"results.csv: no column 'recall_HER2 2\+'"),
        (lambda t: t.replace({"arm": {"spade+100": "magic"}}), "arm is 'magic'; expected tumor, subtype, spade"),
        (lambda t: pd.concat([t, t[:1]]), "arm tumor, repeat 0, val is listed twice"),
        (
            lambda t: t.astype({"dice": object}).replace({"dice": {t["dice"][2]: "oops"}}),
            r"results.csv: line 4, column dice: 'oops' is not a number",
        ),
    ],
)
def test_a_table_that_does_not_fit_its_study_is_refused(small, change, message):
    edit_results(small, change)
    with pytest.raises(CounterstainError, match=message):
        read_results(small)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"reference": "nobody"}, "'nobody' is not one of the arms"), ({"repeats": "many"}, r"study.json: repeats: ")],
)
def test_a_record_that_is_wrong_is_refused(small, change, message):
    edit_study(small, **change)
    with pytest.raises(InputError, match=message):
        read_results(small)


def test_an_example_that_is_no_image_or_outside_of_its_folder_is_refused(small):
    path = small / "results" / "examples" / "examples.json"
    (path.parent / "0-spade.png").write_bytes(b"not a png")
    with pytest.raises(StorageError, match=r"0-spade.png: not an image"):
        read_results(small)
    listing = json.loads(path.read_text())
    listing[0]["real"] = "../../run.json"
    path.write_text(json.dumps(listing))
    with pytest.raises(InputError, match="is outside"):
        read_results(small)


def test_a_folder_as_output_is_refused(small):
    with pytest.raises(InputError, match="is a folder; use a file name"):
        write_report(small, small)


# --- the command


def test_the_command_writes_the_same_page_beside_the_results(demo, page):
    result = CliRunner().invoke(app, ["report", str(demo)])
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    assert (demo / "report.html").read_text() == page


def test_figures_are_written_as_files_of_equal_bytes(small, tmp_path):
    options = ["report", str(small), "--out", str(tmp_path / "r.html"), "--figures", str(tmp_path / "f")]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    names = {file.name for file in (tmp_path / "f").iterdir()}
    assert {"boxplots.svg", "boxplots.png", "confusion.svg", "examples.png"} <= names
    before = {file.name: file.read_bytes() for file in (tmp_path / "f").iterdir()}
    CliRunner().invoke(app, options)
    assert {file.name: file.read_bytes() for file in (tmp_path / "f").iterdir()} == before


def test_a_reading_test_of_the_study_is_a_section_of_its_page(small):
    readers = "reader,answers,{0},d_prime\n<b>ada</b>,8,{1},0.5\n"
    shares = ("accuracy", "drawn_found", "real_found", "subtype_of_real", "subtype_of_drawn")
    columns = ",".join(f"{name}{end}" for name in shares for end in ("", "_low", "_high"))
    assert "Reading tests" not in write_report(small).read_text()
    place = small / "reading-tests" / "first"
    place.mkdir(parents=True)
    (place / "readers.csv").write_text(readers.format(columns, ",".join(["0.75,0.35,0.97"] * 5)))
    (place / "confusion.csv").write_text("reader,kind,shown,answered,answers\nada,real,HER2 0,HER2 1+,3\n")
    (place / "agreement.csv").write_text('readers,what,statistic,kappa,questions\n"ada, ben",drawn,Cohen,0.25,8\n')
    (place / "result.json").write_text(json.dumps({"found": ["Ada found half of it."]}))
    page = write_report(small).read_text()
    assert "Ada found half of it." in page
    assert "&lt;b&gt;ada&lt;/b&gt;" in page
    assert "35 to 97" in page
    (place / "readers.csv").write_text("nothing\n")
    with pytest.raises(StorageError, match=r"reading-tests/first: damaged .*give 'reading-test result' again"):
        write_report(small)


def test_a_data_sheet_says_what_people_rejected_of_a_reviewed_set(demo):
    results = read_results(demo)
    reviewed = {"decisions": "ab", "patches": 64, "accepted": 8, "rejected": 3, "unsure": 1}
    found = results.sets[0].model_copy(update={"review": reviewed, "patches": 64})
    said = data_sheet(found, results.trainings, results.study).facts["Reviewed"]
    assert said.startswith("12 of 64 patches by people: 8 accepted, 1 unsure, 3 rejected")
    assert "Reviewed" not in data_sheet(results.sets[0], results.trainings, results.study).facts
