"""Balance the rare subtypes of a tissue class with generated images, and test whether that helped.

As scikit-learn has fit and predict, counterstain has verbs that read a folder and write one. Each is a command of the
command line as well, with the same arguments; ``help(counterstain.train)`` explains them::

    import counterstain as cs

    cohort = cs.split(cs.make_phantom("cohort", slides=12))
    cs.train("spade", cohort, out="spade", preset="demo")
    cs.synthesize(cohort, method="spade", generator="spade", count=64, out="set", preset="demo")
    cs.segment(cohort, synthetic="set", out="segmenter", preset="demo")
    print(cs.evaluate("segmenter", cohort))

Get a cohort: images, the instances in them, the subtype of each
    make_phantom     make procedural tissue with exact masks, to try everything with
    import_table     from images and label files that are listed in a CSV table
    import_dataset   from a dataset in the layout of another tool: nnU-Net, COCO, Hugging Face, PanNuke, ...
    import_slides    from whole slides and their annotations
    import_labels    draft LABELS.yaml, the meaning of the annotations' labels
    import_exact     fetch annotations from an EXACT server
    split            decide which patients are train, val and test
    inspect          what a cohort is made of, as a table and a figure
    discover         subtypes that nobody annotated, from how instances look
    export           write images, masks or a checkpoint for other tools

Train generators and draw
    train            train a generator, or the judge of its images
    import_weights   make a checkpoint of weights that others published
    preview          see training patches redrawn as every subtype
    synthesize       draw a synthetic set: real masks with new subtypes, and an image for each
    redraw           the same for whole regions, as a new cohort
    audit            do the images look real, do they show what was asked for, are they copies?
    trace            can drawn images, or the network that drew them, be traced to patients?
    review           accept and reject the patches of a set (in a program: Review); rejected ones are not trained on
    make_reading_test   a blind test: can people tell drawn patches from real ones? A ReadingTest keeps their answers
    score_reading_test  its result, with intervals and the agreement between readers
    load_generator   open a Generator, whose draw(patch) returns a patch, and redraw(patch, ...) a Redrawing
    add_to_set       add a redrawn patch to a set of them
    studio           do all this in a browser
    release          what of a set may leave the hospital: images, masks, a card, and nothing that leads back
    push, pull       a checkpoint or a synthetic set to and from the Hugging Face Hub

Train segmenters and score them
    segment          train a segmenter, with or without a synthetic set
    evaluate         score it on a split, subtype by subtype
    predict          outline tumour on slides, as GeoJSON for QuPath
    score            score slides by the subtypes that they are made of (research use only)
    measures         every measure of a segmentation, from its pixel counts
    headroom         learning curve: would more data help at all?

Compare ways to train, in a study: arms x repeats of all of the above
    demo             run everything in minutes on two CPU cores
    init_study       write a first study for a cohort, settings chosen by what is measured of it
    plan_study       what a study is made of, and what time and disk it takes
    run_study        run it, or go on with it, and write its report
    study_status     how far it is
    test_study       test it on another cohort
    compare_arms     see where two arms differ, region by region
    clean_study      delete what its plan no longer needs
    report           write its report, figures and tables anew

Settings: presets paper, best and demo, each changed by ``settings={"spade.latent": 64}``
    config_show, config_explain, config_reference   every setting with its value and meaning
    config_schema, config_taxonomy                  templates for the files that you write
    load_recipe, load_study                         read and check them: Recipe, StudyConfig

Records that go in and come out
    Cohort           regions of slides on disk; cohort.patch(...) cuts a Patch
    Patch            image (H, W, 3), instances (H, W), and the subtype of each; a Source says where it is from
    PatchSet         a synthetic set on disk, a sequence of patches
    PatchSampler     an endless stream of training patches, by SamplingConfig
    Taxonomy         the subtypes: id, name and colour of each Subtype
    relabel          new subtypes for instances, by RelabelConfig
    CohortWriter     writes a cohort Region by Region, for formats that are not read

Errors are CounterstainError: InputError (ConfigError, TaxonomyError), LeakageError, MismatchError, StorageError and
DivergenceError; what stops nothing is a CounterstainWarning. A generator of your own is a Method with its Training: an
ImageGenerator that draws one image for each DrawRequest, made known by register.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import lazy_loader

__version__ = "0.1.0"

# The names that stand in __init__.pyi, each loaded on first use: the command line's --help does not wait for torch.
__getattr__, __dir__, PUBLIC = lazy_loader.attach_stub(__name__, __file__)
# What help() shows at length and "import *" takes; dir() lists all.
__all__ = [name for name in PUBLIC if name.islower() or name in {"Cohort", "Generator", "Patch", "PatchSet"}]


class _Package(ModuleType):
    """Keeps ``audit`` and ``report`` functions once the packages of these names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
