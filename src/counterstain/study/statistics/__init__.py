"""How far the arms of a study lie from its reference arm, and how sure that is: tables in, tables out."""

from counterstain.study.statistics.arm_differences import differences, effects_of, measures_of, spread
from counterstain.study.statistics.bootstrap import CountArray, Measure
from counterstain.study.statistics.permutation_test import holm, smallest_p

__all__ = [
    "CountArray",
    "Measure",
    "differences",
    "effects_of",
    "holm",
    "measures_of",
    "smallest_p",
    "spread",
]
