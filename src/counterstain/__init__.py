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

import sys
from types import ModuleType
from typing import Any

import lazy_loader

__version__ = "0.1.0"

# The names that stand in __init__.pyi, each loaded on first use: the command line's --help does not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Package(ModuleType):
    """Keeps ``audit`` and ``report`` functions once the packages of these names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
