"""Transfer batches from a loader process to its worker in anonymous memory, not in /dev/shm."""

import copy
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
SMALL = 2**16  # bytes. Smaller arrays are copied
ALIGNMENT = 64  # bytes, of each block of a parcel


class Shared:
    """Anonymous memory, which stays the same if pickled to another process of the same user.

    It exists as long as the object that allocated it. OSError: the system has no memory left.
    """

    def __init__(self, size: int):
        self.process, self.fd, self.size = os.getpid(), os.memfd_create("loader"), size
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)

    def mapped(self) -> memoryview:
        """Return the memory. FileNotFoundError: the process that allocated it has ended."""
        fd = os.open(f"/proc/{self.process}/fd/{self.fd}", os.O_RDWR)
        try:
            return memoryview(mmap.mmap(fd, self.size))
        finally:
            os.close(fd)


class SharedArray:
    """An array (n,) in memory that loader processes map when they unpickle it."""

    def __init__(self, array: np.ndarray):
        self.memory, self.dtype = Shared(array.nbytes), array.dtype.str
        with open(self.memory.fd, "wb", closefd=False) as file:  # without memory a write fails
            file.write(np.ascontiguousarray(array).view(np.uint8).data)

    def __reduce__(self) -> tuple:
        return mapped_array, (self.memory, self.dtype)


def mapped_array(memory: Shared, dtype: str) -> np.ndarray:
    """Return the array of a SharedArray. End this process if the memory's owner has ended."""
    try:
        return np.frombuffer(memory.mapped(), dtype)
    except FileNotFoundError:
        os._exit(1)


def shared(value: Any, kinds: tuple[type, ...]) -> Any:
    """Return a copy of a value to pickle to loader processes, its large arrays shared.

    kinds: classes whose attributes are shared too. Other objects stay unchanged.
    """
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.nbytes >= SMALL:
        return SharedArray(value)
    if isinstance(value, list) and value and isinstance(value[0], kinds):
        return [shared(item, kinds) for item in value]
    if not isinstance(value, kinds):
        return value
    copied = copy.copy(value)
    copied.__dict__.update({name: shared(item, kinds) for name, item in vars(value).items()})
    return copied


class Parcel:
    """A batch in shared memory. Unpickled by the worker, it is the batch.

    The pickle is smaller than 4 KiB, which a pipe transfers in one piece.
    OSError: the system has no memory left.
    """

    # Sent by this process. The worker has already mapped those that drop out.
    sent: deque[Shared] = deque(maxlen=AHEAD)

    def __init__(self, batch: Any):
        tensors: list[memoryview] = []

        def described(value: Any) -> dict[str, Any]:
            if not torch.is_tensor(value):
                raise TypeError(
                    f"a batch holds a {type(value).__name__}; expected tensors, text and numbers"
                )
            # Dense, in any order of the dimensions.
            flat = value.as_strided((value.numel(),), (1,)).numpy()
            tensors.append(flat.data)
            return {
                "block": len(tensors),
                "dtype": flat.dtype.str,
                "shape": value.shape,
                "stride": value.stride(),
            }

        blocks = [memoryview(json.dumps(batch, default=described).encode()), *tensors]
        self.sizes = [block.nbytes for block in blocks]
        self.memory = Shared(ends(self.sizes)[-1])
        # Without memory a write fails, while a mapping would crash.
        with open(self.memory.fd, "wb", closefd=False) as file:
            for block, size, end in zip(blocks, self.sizes, ends(self.sizes), strict=True):
                file.seek(end - size)
                file.write(block)
        self.sent.append(self.memory)

    def __reduce__(self) -> tuple:
        return unpack, (self.memory, self.sizes)


def ends(sizes: list[int]) -> list[int]:
    """Return the end of each block of these sizes, in bytes, each aligned."""
    return list(itertools.accumulate(sizes, lambda end, size: end + -end % ALIGNMENT + size))


def unpack(memory: Shared, sizes: list[int]) -> Any:
    """Return the batch of a Parcel, or an OSError.

    If raised, the error would silently end DataLoader's thread for pinned memory.
    """
    try:
        view = memory.mapped()
    except OSError as error:
        return error
    blocks = [view[end - size : end] for size, end in zip(sizes, ends(sizes), strict=True)]

    def tensor(described: dict[str, Any]) -> torch.Tensor:
        flat = np.frombuffer(blocks[described["block"]], described["dtype"])
        return torch.from_numpy(flat).as_strided(described["shape"], described["stride"])

    return json.loads(bytes(blocks[0]), object_hook=tensor)
