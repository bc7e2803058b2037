"""Horovod's collectives for one worker, on tensors of the pretended GPU and of the CPU.

Each checks what Horovod would refuse: a missing or repeated name, a dtype, a tensor that is not contiguous.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch

from pretended_gpu import Pretended, found

REDUCED = {torch.int32, torch.int64, torch.float16, torch.float32, torch.float64}
SENT = REDUCED | {torch.uint8, torch.int8}


class Horovod:
    """What job/cluster/comm.py needs of `horovod.torch`."""

    Sum, Max = "sum", "max"
    mpi_ops = SimpleNamespace(HorovodInternalError=RuntimeError)

    def __init__(self):
        self.under_way: dict[
            int, tuple[str, Any, bool]
        ] = {}  # name, result, whether the host waits
        self.begun: list[str] = []

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
        place = "GPU" if isinstance(tensor, Pretended) else "CPU"
        if not name or any(name == other for other, *_ in self.under_way.values()):
            found.problem(f"{kind} {name!r}: no name, or one that is in use")
        if tensor.dtype not in (REDUCED if kind == "allreduce" else SENT):
            found.problem(f"{kind} {name}: {tensor.dtype} on the {place}")
        if not tensor.is_contiguous():
            found.problem(f"{kind} {name}: not contiguous, strides {tensor.stride()}")
        self.begun.append(name)
        # With this variable a stream of the device waits in place of the host.
        in_stream = os.environ.get("HOROVOD_ENABLE_ASYNC_COMPLETION") == "1"
        self.under_way[len(self.begun)] = name, result, place == "CPU" or not in_stream
        return len(self.begun)

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
        name, result, waits = self.under_way.pop(handle)
        if waits:
            found.wait(f"waits for {name}")
        return result
