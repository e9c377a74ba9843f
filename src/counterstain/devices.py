"""The devices to compute on, and one training in several processes, one for each device.

Every process runs the same stage with the same settings and works on its own part of each batch. They find each other
by torchrun's environment variables (RANK, WORLD_SIZE, LOCAL_RANK, …), which :func:`run_in_processes` sets where
torchrun did not start them.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor, distributed, multiprocessing, nn
from torch.multiprocessing.spawn import ProcessContext, ProcessException, start_processes
from torch.nn.modules.batchnorm import _BatchNorm

from counterstain.errors import ConfigError, CounterstainError, InputError, StorageError
from counterstain.training_config import TrainingConfig

START_METHOD = "spawn"  # a forked process could use neither CUDA nor OpenMP where its parent has


def choose_device(choice: str = "auto") -> torch.device:
    """Return the device called ``auto`` (the GPU where there is one), ``cpu`` or ``cuda``.

    Raises
    ------
    InputError
        This machine has no such device.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if choice not in {"auto", *devices}:
        raise InputError(f"device {choice!r}: not found on this machine; it has {', '.join(['auto', *devices])}")
    return torch.device(devices[-1] if choice == "auto" else choice)


def rank() -> int:
    """Return the number of this process among those of the training, 0 if there is only one."""
    return int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0


def started_processes() -> int:
    """Return how many processes work together, as torchrun or :func:`run_in_processes` started them."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1


def precision(config: TrainingConfig) -> str:
    """Return Lightning's name of the arithmetic of a training."""
    fast_bf16 = _on_gpu(config) or torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - torch has no public name for it
    auto = "bf16-mixed" if fast_bf16 else "32-true"
    return {"auto": auto, "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[config.precision]


def open_fabric(config: TrainingConfig) -> Fabric:
    """Open the device of this process, and its connection to the other processes."""
    for name in ("lightning.fabric", "lightning.pytorch"):  # whichever of them logs it
        logging.getLogger(name).setLevel(logging.WARNING)  # not which arithmetic it uses
    several = config.devices * config.num_nodes > 1  # a single process takes no notice of a cluster around it
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy="ddp" if several else "auto",
        precision=precision(config),  # type: ignore[arg-type]
        plugins=[TorchElasticEnvironment() if several else LightningEnvironment()],
    )
    fabric.launch()
    return fabric


def _on_gpu(config: TrainingConfig) -> bool:
    return config.accelerator != "cpu" and torch.cuda.is_available()


def starts_processes(config: TrainingConfig) -> bool:
    """Whether a training needs processes that nobody has started yet: call it with :func:`run_in_processes`.

    Raises
    ------
    ConfigError
        There are fewer GPUs; more than one node without torchrun; torchrun started another number of processes.
    """
    devices, nodes, started = config.devices, config.num_nodes, started_processes()
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("accelerator gpu: this machine has none that torch can use; set it to auto or cpu")
    if _on_gpu(config) and devices > torch.cuda.device_count():
        raise ConfigError(f"devices {devices}: this machine has {torch.cuda.device_count()}; set it to that")
    if started == devices * nodes:
        return False
    if started > 1:
        raise ConfigError(
            f"devices {devices} x num_nodes {nodes} = {devices * nodes}, but torchrun started {started} processes; "
            "set training.devices to its --nproc-per-node and training.num_nodes to its --nnodes"
        )
    if nodes > 1:
        raise ConfigError(
            f"num_nodes {nodes}: start the command on every node with "
            f"torchrun --nnodes {nodes} --nproc-per-node {devices} -m counterstain …"
        )
    return True


def run_in_processes(count: int, function: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Call ``function(*args, **options)`` in ``count`` new processes of this machine and wait for them.

    What it returns is dropped: results go to the disk. Function and arguments are pickled.

    Raises
    ------
    CounterstainError
        The first that a process raised; the others are ended.
    StorageError
        A process was killed. What the disk holds is kept.
    """
    errors = multiprocessing.get_context(START_METHOD).SimpleQueue()
    threads = max(1, torch.get_num_threads() // count)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host, port = probe.getsockname()
    world = {"GROUP_RANK": "0", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    work = (world | {"MASTER_ADDR": host, "MASTER_PORT": str(port)}, threads, errors)
    start: Any = start_processes  # without types of its own
    started: ProcessContext = start(
        _work, (*work, partial(function, *args, **options)), nprocs=count, join=False, start_method=START_METHOD
    )
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
        for process in started.processes:
            process.terminate()


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


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return _Summed.forward(_context, gradient)


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; gradients flow back to all of them.

    A loss computed from such sums is that of the whole batch in every process, and the gradients that
    :func:`average_gradients` averages are those of the whole batch.
    """
    if started_processes() == 1:
        return tensor
    total: Tensor = _Summed.apply(tensor)
    return total


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their means over all processes, in one message.

    torch's DDP would overlap this with the backward pass, but cannot follow the two updates that a GAN makes in a step.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if started_processes() == 1 or not gradients:
        return
    message = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(message.div_(started_processes()))
    means = torch.split(message, [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def share_batch_statistics(model: nn.Module, fabric: Fabric) -> None:
    """Let batch norm see the batches of all GPUs; on CPUs, which torch's cannot, say that it does not."""
    if fabric.world_size == 1:
        return
    if fabric.device.type == "cuda":
        convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm  # without types of its own
        convert(model)
    elif fabric.is_global_zero and any(isinstance(part, _BatchNorm) for part in model.modules()):
        sys.stderr.write("notice: on CPUs, batch norm sees each process's part of the batch, not the whole batch\n")
