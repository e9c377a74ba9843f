"""Print what a study would have found with fewer test patients: the spread over all choices of 8 of its 40.

python benchmarks/small_test_parts.py RUN [PATIENTS]

Choices are stratified by score, as `counterstain split` deals patients. Shapes: A arms, R repeats, P patients,
L labels.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from counterstain.report.results import read_results
from counterstain.seeding import numpy_generator
from counterstain.segmentation.counts import dice, subtype_variance
from counterstain.study.statistics.arm_differences import CountArray

DRAWS = 2_000


def choices(scores: pd.Series, patients: int) -> np.ndarray:
    """Draw choices of patients, (DRAWS, P) booleans: of each score its share, the remainder by chance."""
    rng = numpy_generator(0, "test patients", patients)
    position = pd.Series(np.arange(len(scores)), index=scores.to_numpy())
    chosen = np.zeros((DRAWS, len(scores)), bool)
    for row in chosen:
        for _, of_score in position.groupby(level=0):
            wanted = len(of_score) * patients / len(scores)
            number = int(wanted) + (rng.random() < wanted % 1)
            row[rng.choice(of_score.to_numpy(), number, replace=False)] = True
    return chosen


def main() -> None:
    """Read the results of a study and print a row per arm."""
    results = read_results(Path(sys.argv[1]))
    patients = int(sys.argv[2]) if len(sys.argv) > 2 else 8
    study, table = results.study, results.counts[results.counts["split"] == "test"]
    array = CountArray.of(table, study.taxonomy.num_labels)
    score_of = table.drop_duplicates("patient").set_index("patient")["score"]
    weights = choices(score_of[list(array.patients)], patients).astype(float)
    counted = [s.id for s in study.taxonomy.subtypes if s.counted]
    print(f"{study.name}: {patients} of {len(array.patients)} test patients, {DRAWS} choices; 95 % of them lie in [ ]")
    for arm in array.arms:
        if arm == study.reference:
            continue
        pair = array.pair(study.reference, arm)  # (2, R, P, L, 2)
        few = np.einsum("dp,arpls->adrls", weights, pair)
        old, new = dice(few).mean(-1)
        old_all, new_all = dice(pair.sum(2)).mean(-1)
        low, high = 100 * np.quantile(new - old, [0.025, 0.975])
        found = 100 * (new_all - old_all)
        same_sign = (np.sign(new - old) == np.sign(found)).mean()
        with np.errstate(invalid="ignore", divide="ignore"):
            old, new = subtype_variance(few, counted).mean(-1)
            change = 100 * (new - old) / old
        low_v, high_v = np.nanquantile(change, [0.025, 0.975])
        old, new = subtype_variance(pair.sum(2), counted).mean(-1)
        print(
            f"{arm:16} Dice {found:+.1f} points [{low:+.1f}, {high:+.1f}], of this sign {same_sign:4.0%}; "
            f"variance {100 * (new - old) / old:+.0f} % [{low_v:+.0f}, {high_v:+.0f}]"
        )


if __name__ == "__main__":
    main()
