"""Horovod's collectives for one worker, on tensors of the pretended GPU and of the CPU.

Each collective is checked for errors of Horovod: a missing or repeated name, a dtype, a tensor that
is not contiguous.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch

from pretended_gpu import Pretended, monitor

REDUCED = {torch.int32, torch.int64, torch.float16, torch.float32, torch.float64}
SENT = REDUCED | {torch.uint8, torch.int8}


class Horovod:
    """The functions of `horovod.torch` that job/cluster/comm.py uses."""

    Sum, Max = "sum", "max"
    mpi_ops = SimpleNamespace(HorovodInternalError=RuntimeError)

    def __init__(self):
        # Name, result, and whether the host waits, by handle.
        self.running: dict[int, tuple[str, Any, bool]] = {}
        self.names: list[str] = []  # of all collectives so far

    def rank(self) -> int:
        """Return the number of this worker."""
        return 0

    def size(self) -> int:
        """Return the number of workers."""
        return 1

    def nccl_built(self) -> int:
        """Return a version of NCCL."""
        return 23007

    local_rank, local_size, cross_size = rank, size, size

    def begin(self, kind: str, tensor: torch.Tensor, name: str, result: Any) -> int:
        """Begin a collective."""
        device = "GPU" if isinstance(tensor, Pretended) else "CPU"
        if not name or any(name == other for other, *_ in self.running.values()):
            monitor.problem(f"{kind} {name!r}: no name, or a name in use")
        if tensor.dtype not in (REDUCED if kind == "allreduce" else SENT):
            monitor.problem(f"{kind} {name}: {tensor.dtype} on the {device}")
        if not tensor.is_contiguous():
            monitor.problem(f"{kind} {name}: not contiguous, strides {tensor.stride()}")
        self.names.append(name)
        # With this variable a stream of the device waits instead of the host.
        in_stream = os.environ.get("HOROVOD_ENABLE_ASYNC_COMPLETION") == "1"
        self.running[len(self.names)] = name, result, device == "CPU" or not in_stream
        return len(self.names)

    def allreduce_async(self, tensor, op, name):
        return self.begin("allreduce", tensor, name, tensor.detach().clone())

    def allreduce_async_(self, tensor, op, name):
        return self.begin("allreduce", tensor, name, tensor)

    def allgather_async(self, tensor, name):
        return self.begin("allgather", tensor, name, tensor.detach().clone())

    def broadcast_async(self, tensor, root_rank, name):
        return self.begin("broadcast", tensor, name, tensor.detach().clone())

    def broadcast_async_(self, tensor, root_rank, name):
        return self.begin("broadcast", tensor, name, tensor)

    def alltoall_async(self, tensor, splits, name):
        assert not isinstance(splits, Pretended) and splits.dtype == torch.int32
        assert splits.tolist() == [len(tensor)]
        return self.begin("alltoall", tensor, name, (tensor.detach().clone(), splits))

    def synchronize(self, handle):
        name, result, waits = self.running.pop(handle)
        if waits:
            monitor.wait(f"waits for {name}")
        return result
