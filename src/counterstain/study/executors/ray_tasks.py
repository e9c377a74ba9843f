"""Cells as tasks of a Ray cluster: on this machine, on Slurm, on Kubernetes. The nodes share the study's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from counterstain.errors import ConfigError, InputError
from counterstain.study.attempt import Outcome, attempt_elsewhere
from counterstain.study.plan import Cell
from counterstain.study.resources import Resources

LOCALHOST = "127.0.0.1"
QUEUED_PER_CPU = 4


class RayExecutor:
    """One Ray task for each attempt at a cell; Ray finds a node with the processors that it asks for."""

    def __init__(self, root: Path, resources: Resources, address: str | None = None) -> None:
        self._ray = _ray(alone=address is None)
        self._root, self._resources = root.resolve(), resources
        self._threads = resources.threads or 1
        self._running: dict[Any, Cell] = {}
        self._connect(address)
        processors = int(self._ray.cluster_resources().get("CPU", 1))
        self.name = f"ray, {processors} processors, {address or 'this machine'}"
        self.slots = max(1, processors // self._threads)
        self.queue = QUEUED_PER_CPU * self.slots + 16
        # Lost attempts are counted by the scheduler, the same for all executors.
        self._task = self._ray.remote(max_retries=0, max_calls=0)(attempt_elsewhere)

    def start(self, cell: Cell) -> None:
        """Hand a cell to the cluster."""
        options = {
            "num_cpus": self._resources.cpus(cell.stage),
            "num_gpus": self._resources.gpus(cell.stage),
            "name": cell.name,
        }
        self._running[self._task.options(**options).remote(cell, self._root, self._threads)] = cell

    def wait(self) -> list[Outcome]:
        """Return what ended; a node or process that is gone has lost its cell."""
        ended, _ = self._ray.wait(list(self._running), num_returns=1)
        return [self._outcome(reference) for reference in ended]

    def stop(self) -> None:
        """Leave the cluster; it ends this study's tasks."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()

    def _outcome(self, reference: Any) -> Outcome:
        cell = self._running.pop(reference)
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:
            raise  # a defect outside the cell's own work
        except self._ray.exceptions.RayError:
            return Outcome(cell, lost=True)
        assert isinstance(outcome, Outcome)
        return outcome

    def _connect(self, address: str | None) -> None:
        variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self._threads))
        options: dict[str, Any] = {"log_to_driver": False, "runtime_env": {"env_vars": variables}}
        if address is None:
            options |= {"address": "local", "_node_ip_address": LOCALHOST, "include_dashboard": False}
        else:
            options |= {"address": address}
        try:
            self._ray.init(**options)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"--address {address}: no Ray cluster answers there ({error}); start one first") from error


def _ray(*, alone: bool) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # asks the outside world for nothing
    if alone:
        # Ray binds to all interfaces unless its node's address is the loopback's, and on Linux it replaces that by
        # the machine's address. This variable, read when Ray is imported, makes it keep it.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--executor ray: Ray is not installed; pip install 'counterstain[ray]'") from error
    return ray
