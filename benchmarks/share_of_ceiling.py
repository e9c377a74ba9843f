"""Print how much of what a perfect generator gains each arm of a study gains, with intervals.

    python benchmarks/share_of_ceiling.py RESULTS [CEILING]

RESULTS is a study's results folder with a ceiling among its arms (oracle+100 by default). The share is the mean
difference from the reference arm over that of the ceiling, in Dice and in the variance between the subtypes' recalls,
of pooled test pixels. Intervals are 2.5 and 97.5 percentiles of draws of patients and repeats, as the report's without
their correction for few patients (docs/statistics.md). Where the ceiling's own gain may be zero, they run off: then
nothing is known of the share. ``above`` is the share of the draws in which an arm gains more than the ceiling.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np

from counterstain.report.results import read_results
from counterstain.segmentation.counts import dice, recalls
from counterstain.study.cells import REFERENCE
from counterstain.study.statistics.arm_differences import CountArray
from counterstain.study.statistics.significance import Measure, bootstrap_weights, pooled_draws

DRAWS = 4000


def variance(labels: list[int], counts: np.ndarray) -> np.ndarray:
    return np.asarray(recalls(counts)[..., labels].var(axis=-1))


def gains(counts: CountArray, arm: str, measure: Measure) -> tuple[float, np.ndarray]:
    """Return the mean difference from the reference, and that of every draw, (B,)."""
    pair = counts.pair(REFERENCE, arm)
    _, repeats, patients = pair.shape[:3]
    of_patients = bootstrap_weights(0, "patients", patients, DRAWS)
    of_repeats = bootstrap_weights(0, "repeats", repeats, DRAWS)
    old, new = (measure(pooled_draws(pair, of_patients)) * of_repeats).sum(axis=-1)
    found = measure(pair.sum(axis=2))
    return float((found[1] - found[0]).mean()), new - old


def main() -> None:
    results = read_results(Path(sys.argv[1]))
    ceiling = sys.argv[2] if len(sys.argv) > 2 else "oracle+100"
    taxonomy, table = results.study.taxonomy, results.counts
    counts = CountArray.of(table[table["split"] == "test"], taxonomy.num_labels)
    measures: dict[str, Measure] = {"Dice": dice, "variance": partial(variance, [i - 1 for i in taxonomy.counted_ids])}
    print("| | gain | of the ceiling's | 95 % | above it |\n|---|---|---|---|---|")
    for name, measure in measures.items():
        best, best_draws = gains(counts, ceiling, measure)
        for arm in counts.arms:
            if arm in {REFERENCE, ceiling}:
                continue
            found, draws = gains(counts, arm, measure)
            low, high = np.nanpercentile(draws / best_draws, (2.5, 97.5))
            above = np.mean(draws / np.sign(best) > best_draws / np.sign(best))
            print(f"| {name}, {arm} | {found:+.4f} | {found / best:.0%} | {low:.0%} to {high:.0%} | {above:.0%} |")
        print(f"| {name}, {ceiling} | {best:+.4f} | | |")


if __name__ == "__main__":
    main()
