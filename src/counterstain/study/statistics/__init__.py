"""How far the arms of a study lie from its reference arm, and how sure that is: tables in, tables out."""

from counterstain.study.statistics.count_array import CountArray, Measure
from counterstain.study.statistics.effects import effects_of
from counterstain.study.statistics.exchange import holm, smallest_p
from counterstain.study.statistics.paired import differences, measures_of, spread

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
