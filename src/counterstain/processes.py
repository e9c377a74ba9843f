"""One training in several processes, one for each device: starting them, what they share, who writes.

Every process runs the same stage with the same settings and works on its own part of each batch. They find each other
by torchrun's environment variables (RANK, WORLD_SIZE, LOCAL_RANK, …), which :func:`run_in_processes` sets where
torchrun did not start them.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing
from torch.multiprocessing.spawn import ProcessContext, ProcessException, start_processes

from counterstain.errors import ConfigError, CounterstainError, StorageError

LOCALHOST = "127.0.0.1"
START_METHOD = "spawn"  # a forked process could use neither CUDA nor OpenMP where its parent has
SECONDS_TO_END = 5


def rank() -> int:
    """Return the number of this process among those of the training, 0 where there is one alone."""
    return int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0


def started_processes() -> int:
    """Return how many processes work together, as torchrun or :func:`run_in_processes` started them."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1


def are_to_be_started(devices: int, num_nodes: int) -> bool:
    """Whether a training needs processes that nobody has started yet.

    Raises
    ------
    ConfigError
        More than one node without torchrun, or another number of processes than torchrun started.
    """
    wanted, started = devices * num_nodes, started_processes()
    if started == wanted:
        return False
    if started > 1:
        raise ConfigError(
            f"devices {devices} x num_nodes {num_nodes} = {wanted}, but torchrun started {started} processes; "
            "set training.devices to its --nproc-per-node and training.num_nodes to its --nnodes"
        )
    if num_nodes > 1:
        raise ConfigError(
            f"num_nodes {num_nodes}: start the command on every node with "
            f"torchrun --nnodes {num_nodes} --nproc-per-node {devices} -m counterstain …"
        )
    return True


def run_in_processes(count: int, function: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Call ``function(*args, **options)`` in ``count`` new processes of this machine and wait for them.

    Parameters
    ----------
    count : int
    function : callable
        Of a module, not of a script without a main guard; what it returns is dropped, results go to the disk.
    *args, **options
        Anything that can be pickled.

    Raises
    ------
    CounterstainError
        The first that a process raised; the others are ended.
    StorageError
        A process was killed. What the disk holds is kept.
    """
    context = multiprocessing.get_context(START_METHOD)
    errors = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // count)
    world = {
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": LOCALHOST,
        "MASTER_PORT": str(_free_port()),
    }
    start: Any = start_processes  # without types of its own
    work = (world, threads, errors, partial(function, *args, **options))
    started: ProcessContext = start(_work, work, nprocs=count, join=False, start_method=START_METHOD)
    try:
        while not started.join(timeout=1):
            pass
    except ProcessException as ended:
        if not errors.empty():
            raise errors.get() from None
        if getattr(ended, "signal_name", None):
            raise StorageError(f"{ended}; perhaps memory ran out; the same command goes on from what is done") from None
        raise
    finally:
        _end(started)


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; gradients flow back to all of them.

    A loss computed from such sums is that of the whole batch in every process, and the gradients that DDP averages are
    those of the whole batch.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return tensor
    total: Tensor = _Summed.apply(tensor)
    return total


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, tensor: Tensor) -> Tensor:
        return _all_reduced(tensor)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return _all_reduced(gradient)


def _all_reduced(tensor: Tensor) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total


def _work(number: int, world: dict[str, str], threads: int, errors: Any, function: Callable[[], Any]) -> None:
    os.environ |= world | {"RANK": str(number), "LOCAL_RANK": str(number)}
    torch.set_num_threads(threads)
    try:
        function()
    except CounterstainError as error:
        errors.put(error)
        raise SystemExit(1) from None
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return int(probe.getsockname()[1])


def _end(started: ProcessContext) -> None:
    deadline = time.monotonic() + SECONDS_TO_END
    for process in started.processes:
        process.terminate()
    for process in started.processes:
        process.join(max(0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
