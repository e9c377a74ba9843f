"""What the commands print of studies, of reviews, of blind reading tests and of scores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from counterstain.cli.printing import SHOWN as SHOWN_CELLS
from counterstain.cli.printing import Arguments, number, pasted
from counterstain.cli.terminal import echo, print_rich, print_table
from counterstain.progress import counted

if TYPE_CHECKING:
    import pandas as pd

    from counterstain.audit.reading_result import ReadingResult
    from counterstain.audit.reading_test import ReadingTest
    from counterstain.data.review import Review
    from counterstain.study.compare import ComparedRegion
    from counterstain.study.headroom import Headroom
    from counterstain.study.status import StudyState

SHOWN = 12  # patches, or regions, that are listed


def first_study(file: Path, _: Arguments) -> None:
    """Print where a first study is."""
    echo(f"{file}: written, with reasons as comments\nnext: counterstain study plan {pasted(file)}")


def headroom(found: Headroom, arguments: Arguments) -> None:
    """Print what more patients would bring."""
    echo("\n".join(found.in_words()))
    out = arguments["out"]
    echo(f"{out / 'headroom.csv'}, {out / 'headroom.svg'}; a study with fewer patients: cohort.train_patients")


def released(out: Path, _: Arguments) -> None:
    """Print what a release says of itself, and what is left to its owner."""
    card = (out / "README.md").read_text(encoding="utf-8")
    echo(card.partition("## What may lead back to patients\n")[2].strip())
    echo(f"{out}: read its README.md and fill in the licence; SHA256SUMS holds the other files")


def study(report: Path, _: Arguments) -> None:
    """Print what a study found and where its report is."""
    from counterstain.report.results import read_results
    from counterstain.report.summary import overview

    found = overview(read_results(report.parent))
    print_table(found.columns, found.rows, title=found.title)
    echo("\n".join((*found.lines, f"report: {report}")))


def demo(report: Path, arguments: Arguments) -> None:
    """Print what the demo found, and why networks as small as its own may do harm."""
    study(report, arguments)
    echo("An arm below the baseline: networks trained for minutes may draw tissue less true than what it replaces")


def test(folder: Path, _: Arguments) -> None:
    """Print how the arms of a study differ on another cohort."""
    import pandas as pd

    from counterstain.storage import read_csv
    from counterstain.study.arms import read_arm
    from counterstain.study.statistics.significance import FEWEST_PATIENTS

    results, found = read_csv(folder / "results.csv"), folder / "differences.csv"
    table = read_csv(found) if found.exists() else pd.DataFrame()
    differences = {(row["arm"], row["measure"]): row for row in table.to_dict("records")}
    rows = []
    for arm, group in results.groupby("arm", sort=False):
        means = group[["dice", "subtype_variance"]].mean()
        row = [read_arm(str(arm)).label, str(len(group)), f"{means['dice']:.3f}", f"{means['subtype_variance']:.4f}"]
        for measure in ("dice", "subtype_variance"):
            known = differences.get((arm, measure))
            ends = "no interval" if known and math.isnan(known["low"]) else "{low:+.4f} to {high:+.4f}"
            row.append(f"{{mean:+.4f}} ({ends})".format_map(known) if known else "")
        rows.append(row)
    columns = ("arm", "repeats", "Dice", "variance", "difference in Dice", "difference in variance")
    title = f"{folder.name}: means over repeats; differences from the baseline, 95 % intervals"
    print_table(columns, rows, title=title)
    if pd.read_parquet(folder / "counts.parquet", columns=["patient"])["patient"].nunique() < FEWEST_PATIENTS:
        echo(f"no interval: fewer than {FEWEST_PATIENTS} patients")
    echo(f"tables: {folder}\nreport: {folder.parent.parent / 'report.html'}")


def status(state: StudyState, _: Arguments) -> None:
    """Print how far a study is."""
    from counterstain.study.status import running_and_failed, stage_table, time_left

    print_rich(stage_table(state))
    for line in running_and_failed(state, SHOWN_CELLS):
        echo(line)
    echo(time_left(state, int(state.journal.study["slots"]) if state.journal.study else 1))


def report(page: Path, arguments: Arguments) -> None:
    """Print where the page and its files are."""
    for name, place in {"report": page, "figures": arguments["figures"], "tables": arguments["tables"]}.items():
        if place is not None:
            echo(f"{name}: {place}")


def review(found: Review, arguments: Arguments) -> None:
    """Print how far a review is and which patches come next."""
    echo(f"{arguments['synthetic']}: {found.progress()}")
    table = found.table()
    left = table[table["decision"] == "undecided"].head(SHOWN).to_dict("records")
    rows = [
        (
            f"{row['index']}",
            row["slide"],
            ", ".join(row["subtypes"]),
            _share(row["agreement"]),
            _share(row["similarity"]),
        )
        for row in left
    ]
    if rows:
        print_table(("patch", "slide", "subtypes", "judge agrees", "similarity"), rows, title="next to be reviewed")
        echo(f"look at patches and decide: counterstain studio COHORT --set-dir {pasted(arguments['synthetic'])}")


def made(test: ReadingTest, arguments: Arguments) -> None:
    """Print where a test and its key are."""
    echo(f"{arguments['out']}: {len(test)} questions; the key, not for readers: {test.key_file}")
    where = pasted(arguments["out"])
    echo(f"readers answer in a browser: counterstain studio {pasted(arguments['cohort'])} --reading-test {where}")
    echo(f"when they have: counterstain reading-test result {where}")


def result(found: ReadingResult, arguments: Arguments) -> None:
    """Print what a test found."""
    names = ("accuracy", "subtype_of_real", "subtype_of_drawn")
    rows = [
        (
            row["reader"],
            f"{row['answers']:,}",
            *(f"{_share(row[n])} ({_share(row[f'{n}_low'])} to {_share(row[f'{n}_high'])})" for n in names),
            f"{row['d_prime']:.2f}",
        )
        for row in found.readers.to_dict("records")
    ]
    columns = ("reader", "answers", "real or drawn, right", "subtype of real", "subtype of drawn", "d'")
    print_table(columns, rows, title=f"{arguments['test']} (95 % intervals)")
    echo("\n".join(found.in_words()))


def compared(regions: list[ComparedRegion], arguments: Arguments) -> None:
    """Print the regions where two arms differ most."""
    baseline, arm = regions[0].arms
    rows = [
        (
            region.region,
            region.slide,
            *(f"{100 * share:.1f} %" for share in (region.disagreement, *(s for _, s in region.colours.values()))),
        )
        for region in regions[:SHOWN]
    ]
    columns = ("region", "slide", "differ", f"{arm} alone right", f"{baseline} alone right")
    print_table(columns, rows, title=f"{arguments['run']}: {arm} and {baseline}, pixels of each region")
    if arguments["out"] is not None:
        echo(f"pictures: {arguments['out']}")


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.0f} %"


def slide_scores(table: pd.DataFrame, arguments: Arguments) -> None:
    """Print the scores of patients, how they agree with known ones, and what they are not."""
    from counterstain.segmentation.score import NOTICE, TEMPERATURES

    patients, scores = table[table["level"] == "patient"], table.attrs["rule"].scores
    rows = [
        (
            row["patient"],
            row["known"] or "-",
            row["score"] or "-",
            "-"
            if row["low"] is None
            else f"{row['low']} to {row['high']}"
            if row["low"] != row["high"]
            else row["low"],
            *("-" if row["score"] is None else f"{row[f'probability_{score}']:.2f}" for score in scores),
            f"{row['area_mm2']:.3f}",
            number(row["cells"], ",.0f"),
        )
        for row in patients.to_dict("records")
    ]
    columns = ("patient", "known", "score", "95 % interval", *(f"P({score})" for score in scores), "mm²", "cells")
    rule = "" if arguments["rule"] is None else f"rule {arguments['rule']}, "
    print_table(columns, rows, title=f"{arguments['source']}, {rule}by {arguments['by']}: {NOTICE}", words=4)
    sure, found = table.attrs["calibration"], table.attrs["agreement"]
    if sure is not None:
        echo(
            f"Temperature {sure.temperature:.2f} from {sure.patients} validation patients; expected calibration error "
            f"{sure.ece_before:.3f} before, {sure.ece:.3f} after"
        )
        if sure.temperature > 0.99 * max(TEMPERATURES):
            echo("notice: on the validation patients its probabilities tell nothing; train on more patients", err=True)
    elif arguments["segmenter"] is not None:
        echo("notice: intervals are not calibrated; give --calibration, a cohort with validation patients", err=True)
    if found is not None:
        value, low, high = found.kappa
        echo(
            f"Against the known scores of {int(found.confusion.to_numpy().sum())} patients: equal {found.equal:.0%}, "
            f"within one {found.within_one:.0%}, kappa (quadratic weights) {number(value)} ({number(low)} to "
            f"{number(high)})"
        )
    slides, out = len(table) - len(patients), arguments["out"]
    echo(f"{out}/score.csv: the patients and their {counted(slides, 'slide')}, with shares of every subtype")
    echo(f"look: {out / 'score.png'}; rule, calibration and agreement: {out / 'score.json'}\n{NOTICE}")
