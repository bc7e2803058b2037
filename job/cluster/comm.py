"""The one door to Horovod: what the workers send each other.

Every collective has a name, because unnamed ones hang if the workers' calls differ. A single worker does not need
Horovod: each function then returns what Horovod would return.
"""

import contextlib
import importlib.metadata
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from job.cluster import device_errors
from job.errors import RunError

horovod: ModuleType | None = None  # horovod.torch, while several workers are connected


class WorkerGone(Exception):
    """Another worker has ended, or cannot be reached. cause: Horovod's message, of which the first line counts."""

    def __init__(self, cause: str):
        first = cause.partition("\n")[0] or "Horovod stopped"
        super().__init__(f"another worker is gone ({first}); its own last lines say why")


@dataclass(frozen=True)
class Pending:
    """A collective that has begun. handle: Horovod's number of it, or a single worker's result."""

    name: str
    handle: Any


@dataclass(frozen=True)
class Wait:
    """The main thread's wait for a collective. since: as time.monotonic() has it."""

    name: str
    since: float


waits: Wait | None = None  # what the main thread waits for now


def load() -> ModuleType:
    """Return horovod.torch. RunError: Horovod is not installed."""
    try:
        import horovod.torch
    except ImportError:
        raise RunError(
            f"Horovod is not installed for this Python, and several workers need it: run build_horovod.sh {sys.executable} "
            "(the script is in the folder of mgd-train, and in docker/ of a clone)"
        ) from None
    return horovod.torch


def start() -> None:
    """Connect all workers; return when all are connected. WorkerGone: they cannot be connected."""
    global horovod
    loaded = load()
    with gone_is_an_error(loaded):
        loaded.init()
        loaded.barrier()
    horovod = loaded


def connected() -> bool:
    """Return whether this worker is connected to others."""
    return horovod is not None


def stop() -> None:
    """Disconnect this worker from the others."""
    global horovod
    if horovod:
        horovod.shutdown()
        horovod = None


def rank() -> int:
    """Return this worker's number, from 0."""
    return horovod.rank() if horovod else 0


def size() -> int:
    """Return the number of workers."""
    return horovod.size() if horovod else 1


def local_rank() -> int:
    """Return this worker's number among those on its node, from 0."""
    return horovod.local_rank() if horovod else 0


def local_size() -> int:
    """Return the number of workers on this node."""
    return horovod.local_size() if horovod else 1


def nodes() -> int:
    """Return the number of nodes."""
    return horovod.cross_size() if horovod else 1


def has_nccl() -> bool:
    """Return whether Horovod sends tensors from GPU to GPU."""
    return bool(horovod and horovod.nccl_built())


def uses_nccl() -> bool:
    """Return whether this worker can have communicators of NCCL.

    Their end waits for workers that are gone.
    """
    return has_nccl() and torch.cuda.is_initialized()


def version() -> str:
    """Return the version of Horovod, or nothing with one worker."""
    return importlib.metadata.version("horovod") if horovod else ""


def versions() -> str:
    """Return the versions of Horovod and NCCL, for people."""
    if not horovod:
        return "no Horovod, as one worker needs none"
    nccl = "NCCL " + ".".join(map(str, torch.cuda.nccl.version())) if has_nccl() else "no NCCL"
    return f"Horovod {version()}, {nccl}"


@contextlib.contextmanager
def gone_is_an_error(horovod: ModuleType) -> Iterator[None]:
    """Raise Horovod's internal errors as WorkerGone, except those of this worker's GPU or NCCL."""
    try:
        yield
    except horovod.mpi_ops.HorovodInternalError as error:
        if device_errors.kind(error):
            raise
        raise WorkerGone(str(error)) from None


@contextlib.contextmanager
def waiting(name: str) -> Iterator[None]:
    """Show the watchdog that the main thread waits for a collective."""
    global waits
    waits = Wait(name, time.monotonic())
    try:
        yield
    finally:
        waits = None


def wait(pending: Pending) -> torch.Tensor:
    """Return a collective's result. WorkerGone: it cannot complete.

    On a GPU the result may still be computed. Its stream waits for it, and the host goes on.
    """
    if not horovod:
        return pending.handle
    with waiting(pending.name), gone_is_an_error(horovod):
        result = horovod.synchronize(pending.handle)
    return (
        result[0] if isinstance(result, tuple) else result
    )  # an alltoall gives the received numbers of rows too


def begun(name: str, call: Callable[..., int], *arguments: Any, **named: Any) -> Pending:
    """Begin a collective by a call of Horovod's. WorkerGone: it cannot begin."""
    assert horovod
    with gone_is_an_error(horovod):
        return Pending(name, call(*arguments, name=name, **named))


def begin_sum_(tensor: torch.Tensor, name: str) -> Pending:
    """Begin to replace a tensor by its sum over the workers."""
    if not horovod:
        return Pending(name, tensor)
    return begun(name, horovod.allreduce_async_, tensor, op=horovod.Sum)


def total(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return the sum of a tensor over the workers."""
    if not horovod:
        return tensor.clone()
    return wait(begun(name, horovod.allreduce_async, tensor, op=horovod.Sum))


def to_host(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return a tensor on the CPU, when it is computed.

    The watchdog sees this as a wait for collective `name`: a GPU may still compute the collectives
    before.
    """
    with waiting(name):
        return tensor.cpu()


def highest(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return the highest value of each element over the workers."""
    if not horovod:
        return tensor.clone()
    return wait(begun(name, horovod.allreduce_async, tensor, op=horovod.Max))


def begin_gather(tensor: torch.Tensor, name: str) -> Pending:
    """Begin to gather all workers' rows (n, ...), by rank."""
    if not horovod:
        return Pending(name, tensor.clone())
    return begun(name, horovod.allgather_async, tensor)


def gather(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return all workers' rows (n, ...), by rank: (sum of n, ...)."""
    return wait(begin_gather(tensor, name))


def begin_exchange(tensor: torch.Tensor, counts: list[int], name: str) -> Pending:
    """Begin to send the first counts[0] rows of a tensor (n, ...) to worker 0, the next counts[1] to worker 1, and so on.

    The result has the rows that all workers send to this one, by rank.
    """
    if not horovod:
        return Pending(name, tensor.clone())
    splits = torch.tensor(counts, dtype=torch.int32)
    return begun(name, horovod.alltoall_async, tensor, splits=splits)


def exchange(tensor: torch.Tensor, counts: list[int], name: str) -> torch.Tensor:
    """Return the result of `begin_exchange`."""
    return wait(begin_exchange(tensor, counts, name))


def broadcast(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return worker 0's tensor, which has this shape on all workers."""
    if not horovod:
        return tensor.clone()
    return wait(begun(name, horovod.broadcast_async, tensor, root_rank=0))


def broadcast_(tensors: dict[str, torch.Tensor]) -> None:
    """Replace tensors by worker 0's."""
    if horovod:
        call, named = horovod.broadcast_async_, sorted(tensors.items())
        for pending in [begun(name, call, value, root_rank=0) for name, value in named]:
            wait(pending)
