"""What a training runs on: its device, the arithmetic there, its processes, and the workers that prepare its batches.

Every process runs the same stage with the same settings and works on its own part of each batch. They find each other
by torchrun's environment variables (RANK, WORLD_SIZE, LOCAL_RANK, …), which :func:`run_in_processes` sets where
torchrun did not start them.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.multiprocessing.spawn import ProcessContext, ProcessException, start_processes
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, get_worker_info

from counterstain.errors import ConfigError, CounterstainError, InputError, StorageError
from counterstain.processes import cores
from counterstain.training_config import TrainingConfig

if TYPE_CHECKING:
    from lightning.fabric import Fabric  # takes seconds to import, and only trainings need it

START_METHOD = "spawn"  # a forked process could use neither CUDA nor OpenMP where its parent has
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - through which workers hand over their batches
MOST_WORKERS = 6  # an H200 that trains a segmenter at 512 px would need three to four (docs/performance.md)
AHEAD = 2  # batches that each worker prepares ahead of the training
ModuleT = TypeVar("ModuleT", bound=nn.Module)
Batch = dict[str, Tensor]


def choose_device(choice: str = "auto") -> torch.device:
    """Return the device called ``auto`` (the GPU where there is one), ``cpu`` or ``cuda``.

    Raises InputError where this machine has no such device.
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
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    for name in ("lightning.fabric", "lightning.pytorch"):  # whichever of them logs it
        logging.getLogger(name).setLevel(logging.WARNING)  # not which arithmetic it uses
    several = config.devices * config.num_nodes > 1  # a single process takes no notice of a cluster around it
    chosen = [torch.cuda.current_device()] if _on_gpu(config) and not several else config.devices
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=chosen,
        num_nodes=config.num_nodes,
        strategy="ddp" if several else "auto",
        precision=precision(config),  # type: ignore[arg-type]
        plugins=[TorchElasticEnvironment() if several else LightningEnvironment()],
    )
    fabric.launch()
    return fabric


def _on_gpu(config: TrainingConfig) -> bool:
    return config.accelerator != "cpu" and torch.cuda.is_available()


def device_of(config: TrainingConfig) -> torch.device:
    """Return the device that this process of a training will use."""
    if not _on_gpu(config):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def place(network: ModuleT, device: torch.device) -> ModuleT:
    """Move a network to a device; on a GPU its weights become channels-last, as tensor cores read them."""
    if device.type == "cuda":
        return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
    return network.to(device)


def fused_optimizers(config: TrainingConfig) -> bool:
    """Whether Adam may update all weights in one call.

    In fp16 its gradients cannot be clipped then; on CPUs in bf16 they could, but results would round differently.
    """
    arithmetic = precision(config)
    clippable = arithmetic == "32-true" or (_on_gpu(config) and arithmetic == "bf16-mixed")
    return config.gradient_clip is None or clippable


@contextmanager
def fast_arithmetic(device: torch.device) -> Iterator[None]:
    """Train on a GPU with TF32 products and the kernels that are fastest for its batches, whose shapes do not change.

    Nothing changes on a CPU, nor for what is drawn afterwards. Which kernels are fastest is measured anew in each
    process, so that two trainings on a GPU agree up to rounding.
    """
    if device.type != "cuda":
        yield
        return
    # The newer fp32_precision cannot be set here: torch.compile still reads this one, and refuses a mixture.
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]


@contextmanager
def compiled(networks: Iterable[nn.Module], config: TrainingConfig) -> Iterator[None]:
    """Compile networks in place where a training asks for it; their weights keep their names.

    Raises ConfigError where they cannot be compiled here.
    """
    if not config.compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    for network in networks:
        network.compile()
    try:
        yield
    except TorchDynamoException as error:
        told = " ".join(str(error).split())
        reason = told[max(0, told.find("error: ")) :][:200]  # a compiler's own words come after its command
        raise ConfigError(
            f"compile: torch.compile failed on this machine ({reason}); set training.compile to false"
        ) from error


def choose_workers(config: TrainingConfig, batch_bytes: Callable[[], int]) -> int:
    """Return how many processes prepare a training's batches, of so many bytes each.

    ``auto`` is none where this process has two cores or fewer, which the training itself needs; otherwise one for a
    CPU, whose steps take long, and for a GPU all cores but one, up to 6. They must find room in shared memory.
    """
    if config.workers != "auto":
        return config.workers
    here = cores() // (int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1)
    if here <= 2 or sys.platform != "linux":  # others cannot fork safely
        return 0
    room = shutil.disk_usage(SHARED_MEMORY).free // 2 if SHARED_MEMORY.exists() else 0
    return min(min(MOST_WORKERS, here - 1) if _on_gpu(config) else 1, room // ((AHEAD + 1) * batch_bytes()))


def prepared(
    batches: Dataset[Batch], items: range, config: TrainingConfig, device: torch.device
) -> Generator[Batch, None, None]:
    """Yield some batches in order, prepared ahead by workers; the batches do not depend on how many there are.

    Raises what was raised while a batch was prepared, in whichever process, and StorageError where a worker was killed.
    """
    workers = choose_workers(config, lambda: sum(part.nbytes for part in batches[items[0]].values())) if items else 0
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    if workers:
        forks = "fork" if sys.platform == "linux" else None
        options |= {"worker_init_fn": _begin_work, "prefetch_factor": AHEAD, "multiprocessing_context": forks}
    try:
        for found in DataLoader(_Answers(batches), batch_size=None, sampler=items, **options):
            if isinstance(found, CounterstainError):
                raise found
            yield found
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        said = f"{error}".partition("\n")[0] or type(error).__name__
        is_lost = ("DataLoader worker (pid", "received 0 items of ancdata")
        lost = said.startswith(is_lost) if isinstance(error, RuntimeError) else "Caught" not in said
        if not workers or not lost:  # a worker's own error is told as caught; one that is gone cannot be reached
            raise
        raise StorageError(
            f"a process that prepares batches was killed ({said}); perhaps memory, or shared "
            "memory (/dev/shm), ran out: set training.workers lower; the same command goes on from what is done"
        ) from None


class _Answers(Dataset[Any]):
    """Batches, or what went wrong: an error that a worker raised would arrive as the text of a traceback."""

    def __init__(self, batches: Dataset[Batch]) -> None:
        self._batches = batches

    def __getitem__(self, item: int) -> Batch | CounterstainError:
        if get_worker_info() is None:
            return self._batches[item]
        try:
            return self._batches[item]
        except CounterstainError as error:
            return error


def _begin_work(_worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the training; end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def starts_processes(config: TrainingConfig) -> bool:
    """Whether a training needs processes that nobody has started yet: call it with :func:`run_in_processes`.

    Raises ConfigError where there are fewer GPUs; more than one node without torchrun; torchrun started another number
    of processes.
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

    Raises the first error that a process raised, the others are ended, and StorageError where a process
    was killed. What the disk holds is kept.
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


def free_memory() -> None:
    """Give back the memory of networks that are no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
