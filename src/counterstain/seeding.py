"""Seeds for every random choice, derived from one number and the names of what is drawn.

Nothing in counterstain uses a global random state: each sample has a generator of its own, so it depends on its seed
and its keys alone, not on the order, the batch or the process in which it is drawn.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, *keys: int | str) -> int:
    """Derive a 63-bit seed from a seed and keys, the same on every machine and in every process.

    Examples
    --------
    >>> derive(0, "patch", 7) == derive(0, "patch", 7)
    True
    >>> derive(0, "patch", 7) == derive(0, "patch", 8)
    False
    """
    text = "\x1f".join([str(int(seed)), *(f"s{key}" if isinstance(key, str) else f"i{int(key)}" for key in keys)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def numpy_generator(seed: int, *keys: int | str) -> np.random.Generator:
    """Return numpy's generator for ``derive(seed, *keys)``."""
    return np.random.Generator(np.random.PCG64(derive(seed, *keys)))


def torch_generator(seed: int, *keys: int | str) -> torch.Generator:
    """Return torch's CPU generator for ``derive(seed, *keys)``; draw on the CPU so that devices agree."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *keys))
