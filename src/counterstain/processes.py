"""Processes that share work: on this machine, or on a Ray cluster. They share no state and end with their driver."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from counterstain.config import Config, build
from counterstain.errors import ConfigError, CounterstainError, InputError, StorageError

SPAWN = multiprocessing.get_context("spawn")  # a forked process could use neither CUDA nor OpenMP
# Of a process that imports once what all need and does nothing else, so that it may be forked.
COPIES = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SECONDS_TO_SAVE = 20.0
CORES = "COUNTERSTAIN_CORES"  # environment variable: cores that a process may use where others share the machine
QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of processor time, in so many

Map = Callable[..., Iterable[Any]]
"""Called as ``map(function, items, ...)``, like Python's."""


class ExecutorConfig(Config):
    """Where work is done that can be shared, such as the cells of a study."""

    kind: Literal["local", "ray"] = "local"
    """On this machine, or on a Ray cluster."""
    processes: Annotated[int, Field(ge=1)] | None = None
    """Processes of the local executor; None works in the calling process."""
    address: str | None = None
    """A Ray cluster that runs already, ``auto`` to find it; None starts one on this machine that only it can reach."""


def executor_of(kind: str, processes: int | None, address: str | None) -> ExecutorConfig:
    """Return what --executor, --processes and --address ask for; ConfigError where they do not fit together."""
    if (processes is not None and kind == "ray") or (address is not None and kind != "ray"):
        raise ConfigError("--processes goes with --executor local, --address with --executor ray")
    return build(ExecutorConfig, {"kind": kind, "processes": processes, "address": address}, "--executor")


@contextmanager
def shared_out(config: ExecutorConfig) -> Iterator[Map]:
    """Yield what calls a function for every item and gives results, warnings and errors in the order of the items.

    Without ``processes``, this is Python's :func:`map`. Elsewhere function and items are pickled, every process has one
    thread, and an error in the block ends them.

    Raises StorageError where a process was killed, or a machine is gone.
    """
    if config.kind == "ray":
        ray = open_ray(config.address, threads=1)
        try:
            yield partial(_on_ray, ray)
        finally:
            ray.shutdown()
    elif (config.processes or 1) == 1:
        yield map
    else:
        ending, lifeline = SPAWN.Pipe(duplex=False)
        with ProcessPoolExecutor(
            config.processes, mp_context=COPIES, initializer=_watch_the_driver, initargs=(ending,)
        ) as pool:
            try:
                yield partial(_in_pool, pool)
            except BaseException as error:
                lifeline.close()  # ends the processes, whatever they do
                if isinstance(error, BrokenProcessPool):
                    raise StorageError(_LOST) from None
                raise


_LOST = "a process was killed; perhaps memory ran out; the same command goes on from what is done"


def _in_pool(pool: ProcessPoolExecutor, function: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
    multiprocessing.set_forkserver_preload([getattr(function, "func", function).__module__])
    with children_inherit(threads=1):
        outcomes = pool.map(partial(_outcome_of, function), *items)
    return _results_of(outcomes)


def _on_ray(ray: Any, function: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
    task = ray.remote(_outcome_of)
    references = [task.remote(function, *item) for item in zip(*items, strict=True)]
    try:
        yield from _results_of(map(ray.get, references))
    except ray.exceptions.RayTaskError:
        raise  # a defect
    except ray.exceptions.RayError as error:
        raise StorageError(_LOST) from error


def _outcome_of(function: Callable[..., Any], *item: Any) -> tuple[Any, CounterstainError | None, list[Warning]]:
    """Call a function; warnings and our errors are part of what it returns."""
    result, ended = None, None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = function(*item)
        except CounterstainError as error:
            ended = error
    return result, ended, [warning.message for warning in said if isinstance(warning.message, Warning)]


def _results_of(outcomes: Iterable[tuple[Any, CounterstainError | None, list[Warning]]]) -> Iterator[Any]:
    for result, ended, said in outcomes:
        for warning in said:
            warnings.warn(warning, stacklevel=2)
        if ended is not None:
            raise ended
        yield result


def _watch_the_driver(ending: Connection) -> None:
    threading.Thread(target=end_with_the_driver, args=(ending,), daemon=True).start()


def end_with_the_driver(*endings: Connection) -> None:
    """Wait until the process that started this one is gone, or closes a pipe, and end this one.

    A training saves its state first.
    """
    driver = multiprocessing.parent_process()
    assert driver is not None
    wait([driver.sentinel, *endings])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_SAVE)
    os._exit(1)


def cores() -> int:
    """Return how many cores this process may use: those that its study, its container or its batch system gives it."""
    if CORES in os.environ:
        return int(os.environ[CORES])
    known = hasattr(os, "sched_getaffinity")  # not on every system
    allowed = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no quota
        share, period = QUOTA_FILE.read_text().split()
        allowed = min(allowed, max(1, int(share) // int(period)))
    return allowed


@contextmanager
def children_inherit(threads: int, cpus: int | None = None) -> Iterator[None]:
    """Start children with their threads, which NumPy reads when it is imported, their cores, and Ctrl-C blocked.

    Ctrl-C then reaches the driver alone, which ends them.
    """
    before = dict(os.environ)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    variables = _thread_variables(threads) | ({} if cpus is None else {CORES: str(cpus)})
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _thread_variables(threads: int) -> dict[str, str]:
    return dict.fromkeys(THREAD_VARIABLES, str(threads))


def open_ray(address: str | None, threads: int) -> Any:
    """Connect to a Ray cluster, or start one on this machine that only it can reach; returns the module ``ray``.

    Raises ConfigError where Ray is not installed, and InputError where no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # asks the outside world for nothing
    if address is None:
        # Ray binds to all interfaces unless its node's address is the loopback's, and on Linux it replaces that by
        # the machine's address. This variable, read when Ray is imported, makes it keep it.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--executor ray: Ray is not installed; pip install 'counterstain[ray]'") from error
    options: dict[str, Any] = {"log_to_driver": False, "runtime_env": {"env_vars": _thread_variables(threads)}}
    if address is None:
        options |= {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"--address {address}: no Ray cluster answers there ({error}); start one first") from error
    return ray
