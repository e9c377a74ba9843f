"""The figures of the report by name: tables in, matplotlib figures out."""

from counterstain.report.figure_composition import balance, composition
from counterstain.report.figure_examples import examples
from counterstain.report.figure_results import boxplots, confusion
from counterstain.report.figure_style import save_svg, svg_text
from counterstain.report.figure_training import training_curves

__all__ = ["balance", "boxplots", "composition", "confusion", "examples", "save_svg", "svg_text", "training_curves"]
