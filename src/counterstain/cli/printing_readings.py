"""What the commands print of reviews, blind reading tests and compared regions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from counterstain.cli.terminal import echo, print_table

if TYPE_CHECKING:
    from counterstain.audit.reading_result import ReadingResult
    from counterstain.audit.reading_test import ReadingTest
    from counterstain.data.review import Review
    from counterstain.study.compare import ComparedRegion

Arguments = dict[str, Any]
SHOWN = 12  # patches, or regions, that are listed


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


def made(test: ReadingTest, arguments: Arguments) -> None:
    """Print where a test and its key are."""
    echo(f"{arguments['out']}: {len(test)} questions; the key, not for readers: {test.key_file}")
    echo(f"when readers have answered: counterstain reading-test result {arguments['out']}")


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
