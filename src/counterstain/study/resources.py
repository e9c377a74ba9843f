"""What the cells of a study may use while they run; nothing of it changes a cell's name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from counterstain.config import Config
from counterstain.study.stage_names import Stage
from counterstain.tracking import LoggerName


class StageResources(Config):
    """What one cell of a stage asks a cluster for."""

    cpus: Annotated[float, Field(gt=0)] | None = None
    """Processors; as many as threads if not given."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """Graphics processors; 0.5 lets two cells share one."""


class Resources(Config):
    """What cells may use. Results follow from the threads, not from how many cells run at once, nor where."""

    threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of each cell: sums round differently for another number of them. If not given: all that torch finds
    where cells run one after another in one process, otherwise 1."""
    retries: Annotated[int, Field(ge=0, le=100)] = 2
    """How often a cell starts again whose process or machine was lost."""
    synthesis_shards: Annotated[int, Field(ge=1)] | None = None
    """Shards of 64 patches that one cell draws, so that several draw one set; one cell draws all if not given."""
    logger: LoggerName | None = None
    """Where the curves of all trainings go beside TensorBoard and CSV: ``mlflow`` or ``wandb``."""
    stages: dict[Stage, StageResources] = Field(default_factory=dict)
    """What a cell of a stage asks a Ray cluster for, for example ``spade: {cpus: 4, gpus: 1}``."""

    def cpus(self, stage: Stage) -> float:
        """Return the processors that a cell of a stage asks for."""
        asked = self.stages.get(stage, StageResources()).cpus
        return float(self.threads or 1) if asked is None else asked

    def gpus(self, stage: Stage) -> float:
        """Return the graphics processors that a cell of a stage asks for."""
        return self.stages.get(stage, StageResources()).gpus
