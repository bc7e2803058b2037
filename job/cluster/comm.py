"""All collectives: the only module that calls Horovod for them.

Every collective has a name, because unnamed ones hang if the workers' calls differ. With a single
worker Horovod is not needed: each function then returns the result of Horovod's collective.
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

horovod: ModuleType | None = None  # horovod.torch, if several workers are connected


class WorkerGone(Exception):
    """Another worker has ended, or cannot be reached.

    cause: Horovod's message. Its first line is reported.
    """

    def __init__(self, cause: str):
        first = cause.partition("\n")[0] or "Horovod stopped"
        super().__init__(f"another worker is gone ({first}). See its own last lines")


@dataclass(frozen=True)
class Pending:
    """A collective in progress.

    handle: Horovod's number of it. With a single worker: the result.
    """

    name: str
    handle: Any


@dataclass(frozen=True)
class Wait:
    """The main thread's wait for a collective. since: time.monotonic() at its start, in s."""

    name: str
    since: float


waits: Wait | None = None  # the current wait of the main thread


def load() -> ModuleType:
    """Return horovod.torch. RunError: Horovod is not installed."""
    try:
        import horovod.torch
    except ImportError:
        raise RunError(
            "Horovod is not installed for this Python, and several workers need it. Run "
            f"build_horovod.sh {sys.executable} (the script is next to mgd-train, and in docker/ "
            "of a clone)"
        ) from None
    return horovod.torch


def start() -> None:
    """Connect all workers, and wait until all are connected. WorkerGone: this fails."""
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
    """Return the rank of this worker, from 0."""
    return horovod.rank() if horovod else 0


def size() -> int:
    """Return the number of workers."""
    return horovod.size() if horovod else 1


def local_rank() -> int:
    """Return this worker's number among the workers of its node, from 0."""
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

    Destroying these waits for workers that are gone.
    """
    return has_nccl() and torch.cuda.is_initialized()


def version() -> str:
    """Return the version of Horovod; "" with one worker."""
    return importlib.metadata.version("horovod") if horovod else ""


def versions() -> str:
    """Return the versions of Horovod and NCCL, for a log line."""
    if not horovod:
        return "no Horovod (one worker)"
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
    """Let the watchdog see that the main thread waits for a collective."""
    global waits
    waits = Wait(name, time.monotonic())
    try:
        yield
    finally:
        waits = None


def wait(pending: Pending) -> torch.Tensor:
    """Return the result of a collective. WorkerGone: it cannot complete.

    On a GPU the result may be incomplete at the return: the GPU's stream waits for it, not the
    host.
    """
    if not horovod:
        return pending.handle
    with waiting(pending.name), gone_is_an_error(horovod):
        result = horovod.synchronize(pending.handle)
    # An alltoall also returns the received numbers of rows.
    return result[0] if isinstance(result, tuple) else result


def enqueue(name: str, call: Callable[..., int], *arguments: Any, **named: Any) -> Pending:
    """Begin a collective by a function of Horovod. WorkerGone: it cannot begin."""
    assert horovod
    with gone_is_an_error(horovod):
        return Pending(name, call(*arguments, name=name, **named))


def begin_sum_(tensor: torch.Tensor, name: str) -> Pending:
    """Begin to sum a tensor over the workers, in place."""
    if not horovod:
        return Pending(name, tensor)
    return enqueue(name, horovod.allreduce_async_, tensor, op=horovod.Sum)


def total(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return the sum of a tensor over the workers."""
    if not horovod:
        return tensor.clone()
    return wait(enqueue(name, horovod.allreduce_async, tensor, op=horovod.Sum))


def to_host(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Wait until a tensor is computed, and return it on the CPU.

    The watchdog sees this as a wait for collective `name`, because the GPU may still compute
    earlier collectives.
    """
    with waiting(name):
        return tensor.cpu()


def highest(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return the elementwise maximum of a tensor over the workers."""
    if not horovod:
        return tensor.clone()
    return wait(enqueue(name, horovod.allreduce_async, tensor, op=horovod.Max))


def begin_gather(tensor: torch.Tensor, name: str) -> Pending:
    """Begin to gather all workers' rows (n, ...), by rank."""
    if not horovod:
        return Pending(name, tensor.clone())
    return enqueue(name, horovod.allgather_async, tensor)


def gather(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return all workers' rows (n, ...), by rank: (sum of n, ...)."""
    return wait(begin_gather(tensor, name))


def begin_exchange(tensor: torch.Tensor, counts: list[int], name: str) -> Pending:
    """Begin to send the rows of a tensor (n, ...) to the workers.

    The first counts[0] rows go to rank 0, the next counts[1] to rank 1, and so on. The result
    has the rows that all workers send to this one, by rank.
    """
    if not horovod:
        return Pending(name, tensor.clone())
    splits = torch.tensor(counts, dtype=torch.int32)
    return enqueue(name, horovod.alltoall_async, tensor, splits=splits)


def exchange(tensor: torch.Tensor, counts: list[int], name: str) -> torch.Tensor:
    """Return the result of `begin_exchange`."""
    return wait(begin_exchange(tensor, counts, name))


def broadcast(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return rank 0's tensor. `tensor` must have the same shape on all workers."""
    if not horovod:
        return tensor.clone()
    return wait(enqueue(name, horovod.broadcast_async, tensor, root_rank=0))


def broadcast_(tensors: dict[str, torch.Tensor]) -> None:
    """Replace tensors by rank 0's."""
    if horovod:
        call, named = horovod.broadcast_async_, sorted(tensors.items())
        for pending in [enqueue(name, call, value, root_rank=0) for name, value in named]:
            wait(pending)
