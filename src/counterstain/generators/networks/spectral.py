"""Spectral norms of weights that were not reached by training steps, such as averaged ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

ITERATIONS = 50


@torch.no_grad()
def settle_spectral_norms(network: nn.Module) -> None:
    """Find the singular vectors of the weights as they are, in place, by power iterations.

    A training step follows them by one iteration. An average of weights needs vectors of its own: averages of the
    vectors are shorter than 1, which makes the norm too small and the weight too large.
    """
    for module in network.modules():
        if parametrize.is_parametrized(module, "weight"):
            was_training = module.training
            module.train()
            for _ in range(ITERATIONS):
                _ = module.weight  # an iteration each time it is looked at
            module.train(was_training)
