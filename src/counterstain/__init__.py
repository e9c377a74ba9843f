"""Balance the rare subtypes of a tissue class with generated images, and prove that it helped."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from counterstain.audit.adherence import AuditConfig
    from counterstain.audit.audit import audit_sets
    from counterstain.audit.judge import train_judge
    from counterstain.audit.judge_config import JudgeConfig
    from counterstain.data.cohort import Cohort, CohortWriter, Region
    from counterstain.data.patch_set import PatchSet
    from counterstain.data.patches import Patch, Source
    from counterstain.data.relabel import RelabelConfig, relabel
    from counterstain.data.sampling import PatchSampler, SamplingConfig
    from counterstain.errors import (
        ConfigError,
        CounterstainError,
        DivergenceError,
        InputError,
        LeakageError,
        MismatchError,
        StorageError,
        TaxonomyError,
    )
    from counterstain.generators.interface import load_generator
    from counterstain.generators.train import train_autoencoder, train_diffusion, train_spade
    from counterstain.recipe import Recipe, load_recipe
    from counterstain.report.page import write_report
    from counterstain.segmentation.evaluate import evaluate
    from counterstain.segmentation.train import train_segmenter
    from counterstain.study.config import StudyConfig, load_study
    from counterstain.study.run import run_study
    from counterstain.synthesis.masks import SynthesisConfig
    from counterstain.synthesis.synthesize import synthesize
    from counterstain.taxonomy import Subtype, Taxonomy

__version__ = "0.1.0"

# Loaded on first use, so that the command line's --help does not wait for torch.
_HOMES = {
    "AuditConfig": "audit.adherence",
    "Cohort": "data.cohort",
    "CohortWriter": "data.cohort",
    "ConfigError": "errors",
    "CounterstainError": "errors",
    "DivergenceError": "errors",
    "InputError": "errors",
    "JudgeConfig": "audit.judge_config",
    "LeakageError": "errors",
    "MismatchError": "errors",
    "Patch": "data.patches",
    "PatchSampler": "data.sampling",
    "PatchSet": "data.patch_set",
    "Recipe": "recipe",
    "Region": "data.cohort",
    "RelabelConfig": "data.relabel",
    "SamplingConfig": "data.sampling",
    "Source": "data.patches",
    "StorageError": "errors",
    "StudyConfig": "study.config",
    "Subtype": "taxonomy",
    "SynthesisConfig": "synthesis.masks",
    "Taxonomy": "taxonomy",
    "TaxonomyError": "errors",
    "audit_sets": "audit.audit",
    "evaluate": "segmentation.evaluate",
    "load_generator": "generators.interface",
    "load_recipe": "recipe",
    "load_study": "study.config",
    "relabel": "data.relabel",
    "run_study": "study.run",
    "synthesize": "synthesis.synthesize",
    "train_autoencoder": "generators.train",
    "train_diffusion": "generators.train",
    "train_judge": "audit.judge",
    "train_segmenter": "segmentation.train",
    "train_spade": "generators.train",
    "write_report": "report.page",
}

__all__ = [
    "AuditConfig",
    "Cohort",
    "CohortWriter",
    "ConfigError",
    "CounterstainError",
    "DivergenceError",
    "InputError",
    "JudgeConfig",
    "LeakageError",
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
    "SynthesisConfig",
    "Taxonomy",
    "TaxonomyError",
    "audit_sets",
    "evaluate",
    "load_generator",
    "load_recipe",
    "load_study",
    "relabel",
    "run_study",
    "synthesize",
    "train_autoencoder",
    "train_diffusion",
    "train_judge",
    "train_segmenter",
    "train_spade",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'counterstain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"counterstain.{_HOMES[name]}"), name)
