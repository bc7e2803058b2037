"""How a batch travels from a loader process to its worker: in anonymous memory, which needs no room in /dev/shm."""

import itertools
import json
import mmap
import os
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch

AHEAD = 2  # batches that a loader process prepares before they are used
ALIGNMENT = 64  # bytes, of a part of a parcel


class Shared:
    """Anonymous memory, which needs no room in /dev/shm; pickled to another process of the same user, it is the same memory.

    It is there as long as the object is that made it. OSError: there is none.
    """

    def __init__(self, size: int):
        self.process, self.fd, self.size = os.getpid(), os.memfd_create("loader"), size
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)

    def mapped(self) -> memoryview:
        """Return the memory. FileNotFoundError: the process that made it has ended."""
        fd = os.open(f"/proc/{self.process}/fd/{self.fd}", os.O_RDWR)
        try:
            return memoryview(mmap.mmap(fd, self.size))
        finally:
            os.close(fd)


class Parcel:
    """A batch on its way to the worker, which unpickles the batch itself, in shared memory.

    What is pickled has less than 4 KiB, which a pipe takes whole or not at all. OSError: there is no memory for the batch.
    """

    sent: deque[Shared] = deque(maxlen=AHEAD)  # by this process; the worker has mapped what drops out

    def __init__(self, batch: Any):
        tensors: list[memoryview] = []

        def described(value: Any) -> dict[str, Any]:
            if not torch.is_tensor(value):
                raise TypeError(f"a batch holds a {type(value).__name__}; expected tensors, text and numbers")
            flat = value.as_strided((value.numel(),), (1,)).numpy()  # dense, in any order of the dimensions
            tensors.append(flat.data)
            return {"part": len(tensors), "dtype": flat.dtype.str, "shape": value.shape, "stride": value.stride()}

        parts = [memoryview(json.dumps(batch, default=described).encode()), *tensors]
        self.sizes = [part.nbytes for part in parts]
        self.memory = Shared(ends(self.sizes)[-1])
        with open(self.memory.fd, "wb", closefd=False) as file:  # where memory runs out a write fails; a mapping would crash
            for part, size, end in zip(parts, self.sizes, ends(self.sizes), strict=True):
                file.seek(end - size)
                file.write(part)
        self.sent.append(self.memory)

    def __reduce__(self) -> tuple:
        return unpack, (self.memory, self.sizes)


def ends(sizes: list[int]) -> list[int]:
    """Return where parts of these sizes end, in bytes, each aligned."""
    return list(itertools.accumulate(sizes, lambda end, size: end + -end % ALIGNMENT + size))


def unpack(memory: Shared, sizes: list[int]) -> Any:
    """Return the batch of a Parcel; or an OSError, which would end a thread of DataLoader's without a word if it were raised."""
    try:
        view = memory.mapped()
    except OSError as error:
        return error
    parts = [view[end - size : end] for size, end in zip(sizes, ends(sizes), strict=True)]

    def tensor(found: dict[str, Any]) -> torch.Tensor:
        flat = np.frombuffer(parts[found["part"]], found["dtype"])
        return torch.from_numpy(flat).as_strided(found["shape"], found["stride"])

    return json.loads(bytes(parts[0]), object_hook=tensor)
