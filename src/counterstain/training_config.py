"""Settings that all trainings share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from counterstain.config import Config
from counterstain.tracking import LoggerName


class TrainingConfig(Config):
    """How long and on what a model trains."""

    steps: Annotated[int, Field(ge=1)]
    """Optimiser steps."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Patches per optimiser step, over all devices and micro-batches together."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches that make up one optimiser step."""
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """Arithmetic; ``auto`` is bf16 autocast on a GPU and on CPUs with bf16 units, otherwise fp32."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device type."""
    devices: Annotated[int, Field(ge=1)] = 1
    """Devices per node, a process for each. The batch is shared among them and its losses and statistics are those of
    the whole batch, so that their number changes results by rounding alone."""
    num_nodes: Annotated[int, Field(ge=1)] = 1
    """Nodes; more than one are started with torchrun."""
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true"] = "auto"
    """How Lightning brings devices together; ``auto`` is DDP, which looks for weights without a gradient where a model
    has two optimisers."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that prepare batches beside the training; 0 = none."""
    checkpoint_every_steps: Annotated[int, Field(ge=1)] = 500
    """Steps that a kill can cost at most; Ctrl-C and SIGTERM cost none on one device."""
    log_every_steps: Annotated[int, Field(ge=1)] = 10
    """Distance of the points of the loss curves."""
    gradient_clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient."""
    logger: Annotated[LoggerName | None, Field(exclude=True)] = None
    """Where curves go beside TensorBoard and CSV; changes no result, so it is no part of what is saved or compared."""
