"""Balance the rare subtypes of a tissue class with generated images, and test whether that helped.

Every command of the command line is a function here, with the same arguments; paths may be strings::

    import counterstain as cs

    cohort = cs.split(cs.make_phantom("cohort", slides=12))
    cs.train("spade", cohort, out="spade", preset="demo")
    cs.synthesize(cohort, method="spade", generator="spade", count=64, out="set", preset="demo")
    cs.segment(cohort, synthetic="set", out="segmenter", preset="demo")
    print(cs.evaluate("segmenter", cohort))

Below them are the records that they take and return (:class:`Cohort`, :class:`Patch`, :class:`PatchSet`, ...).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from counterstain.api.cohorts import export, inspect, make_phantom, split
    from counterstain.api.evaluation import audit, evaluate, predict, segment
    from counterstain.api.generators import Generator, load_generator, preview, redraw, synthesize, train
    from counterstain.api.imports import import_exact, import_labels, import_slides, import_table, import_weights
    from counterstain.api.settings import config_explain, config_reference, config_schema, config_show, config_taxonomy
    from counterstain.api.studies import clean_study, demo, headroom, plan_study, report, run_study, study_status
    from counterstain.data.cohort import Cohort, CohortWriter
    from counterstain.data.patch_set import PatchSet
    from counterstain.data.patches import Patch, Source
    from counterstain.data.region_store import Region
    from counterstain.data.relabel import RelabelConfig, relabel
    from counterstain.data.sampling import PatchSampler, SamplingConfig
    from counterstain.errors import (
        ConfigError,
        CounterstainError,
        CounterstainWarning,
        DivergenceError,
        InputError,
        LeakageError,
        MismatchError,
        StorageError,
        TaxonomyError,
    )
    from counterstain.generators.interface import DrawRequest
    from counterstain.generators.methods import Method, Training, register
    from counterstain.recipe import Recipe, load_recipe
    from counterstain.segmentation.counts import measures
    from counterstain.study.config import StudyConfig, load_study
    from counterstain.taxonomy import Subtype, Taxonomy

__version__ = "0.1.0"

# Loaded on first use, so that the command line's --help does not wait for torch.
_HOMES = {
    "api.cohorts": ("export", "inspect", "make_phantom", "split"),
    "api.generators": ("Generator", "load_generator", "preview", "redraw", "synthesize", "train"),
    "api.imports": ("import_exact", "import_labels", "import_slides", "import_table", "import_weights"),
    "api.evaluation": ("audit", "evaluate", "predict", "segment"),
    "api.settings": ("config_explain", "config_reference", "config_schema", "config_show", "config_taxonomy"),
    "api.studies": ("clean_study", "demo", "headroom", "plan_study", "report", "run_study", "study_status"),
    "data.cohort": ("Cohort", "CohortWriter"),
    "data.patch_set": ("PatchSet",),
    "data.patches": ("Patch", "Source"),
    "data.region_store": ("Region",),
    "data.relabel": ("RelabelConfig", "relabel"),
    "data.sampling": ("PatchSampler", "SamplingConfig"),
    "errors": (
        "ConfigError",
        "CounterstainError",
        "CounterstainWarning",
        "DivergenceError",
        "InputError",
        "LeakageError",
        "MismatchError",
        "StorageError",
        "TaxonomyError",
    ),
    "generators.interface": ("DrawRequest",),
    "generators.methods": ("Method", "Training", "register"),
    "recipe": ("Recipe", "load_recipe"),
    "segmentation.counts": ("measures",),
    "study.config": ("StudyConfig", "load_study"),
    "taxonomy": ("Subtype", "Taxonomy"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Cohort",
    "CohortWriter",
    "ConfigError",
    "CounterstainError",
    "CounterstainWarning",
    "DivergenceError",
    "DrawRequest",
    "Generator",
    "InputError",
    "LeakageError",
    "Method",
    "MismatchError",
    "Patch",
    "PatchSampler",
    "PatchSet",
    "Recipe",
    "Region",
    "RelabelConfig",
    "SamplingConfig",
    "Source",
    "StorageError",
    "StudyConfig",
    "Subtype",
    "Taxonomy",
    "TaxonomyError",
    "Training",
    "audit",
    "clean_study",
    "config_explain",
    "config_reference",
    "config_schema",
    "config_show",
    "config_taxonomy",
    "demo",
    "evaluate",
    "export",
    "headroom",
    "import_exact",
    "import_labels",
    "import_slides",
    "import_table",
    "import_weights",
    "inspect",
    "load_generator",
    "load_recipe",
    "load_study",
    "make_phantom",
    "measures",
    "plan_study",
    "predict",
    "preview",
    "redraw",
    "register",
    "relabel",
    "report",
    "run_study",
    "segment",
    "split",
    "study_status",
    "synthesize",
    "train",
]


class _Package(ModuleType):
    """Keeps ``audit`` and ``report`` functions once the packages of these names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'counterstain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"counterstain.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
