"""Where cells run: in this process, in processes beside it, or on a Ray cluster. The results are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from counterstain.config import Config
from counterstain.study.executors.interface import Executor
from counterstain.study.resources import Resources


class ExecutorConfig(Config):
    """Where the cells of a study run."""

    kind: Literal["local", "ray"] = "local"
    """On this machine, or on a Ray cluster."""
    processes: Annotated[int, Field(ge=1)] | None = None
    """Processes of the local executor; None runs the cells one after another in the calling process."""
    address: str | None = None
    """A Ray cluster that runs already, ``auto`` to find it; None starts one on this machine that only it can reach."""


def open_executor(config: ExecutorConfig, resources: Resources, root: Path) -> Executor:
    """Start what runs cells; ``root`` is the folder of all cells."""
    if config.kind == "ray":
        from counterstain.study.executors.ray_tasks import RayExecutor

        return RayExecutor(root, resources, config.address)
    if config.processes is not None:
        from counterstain.study.executors.processes import ProcessExecutor

        return ProcessExecutor(root, config.processes, resources.threads or 1)
    from counterstain.study.executors.in_process import InProcessExecutor

    return InProcessExecutor(root, resources.threads)
