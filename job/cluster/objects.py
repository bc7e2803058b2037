"""What workers tell each other besides tensors: values in torch's format, read without running what another worker sends.

Horovod's own `broadcast_object` and `allgather_object` are pickles, which run code where they are read, and its links ask
nobody who he is. Here come only numbers, text, containers, tensors, arrays, and the classes that say that they travel.
"""

import io
from typing import Any

import numpy as np
import torch

from job.cluster import comm
from job.cluster.travels import KINDS

ARRAYS: list[Any] = [
    np.ndarray,
    np.dtype,
    np.dtypes.UInt8DType,
    np.dtypes.Int64DType,
    np.empty(0).__reduce__()[0],  # rebuilds one
]


def encode(value: Any) -> torch.Tensor:
    """Return a value as bytes, (n,) uint8."""
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def decode(content: torch.Tensor) -> Any:
    """Return what `encode` was given. pickle.UnpicklingError: a class that does not travel, or code."""
    with torch.serialization.safe_globals(ARRAYS + KINDS):
        return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)


def broadcast(value: Any) -> Any:
    """Return rank 0's `value` on all workers. A collective."""
    if comm.size() == 1:
        return value
    content = encode(value) if comm.rank() == 0 else torch.zeros(0, dtype=torch.uint8)
    length = comm.broadcast(torch.tensor([len(content)]), "broadcast.length")
    if comm.rank():
        content = torch.zeros(int(length), dtype=torch.uint8)
    content = comm.broadcast(content, "broadcast.content")
    return decode(content) if comm.rank() else value


def allgather(value: Any, name: str) -> list:
    """Return every worker's `value`, by rank. A collective of that name."""
    return [decode(part) for part in allgather_bytes(encode(value), name)]


def allgather_text(text: str, name: str) -> list[str]:
    """Return every worker's `text`, not empty, by rank; of a worker with other versions as well. A collective of that name."""
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return [
        part.numpy().tobytes().decode(errors="replace") for part in allgather_bytes(content, name)
    ]


def allgather_bytes(content: torch.Tensor, name: str) -> tuple[torch.Tensor, ...]:
    """Return every worker's (n,) uint8, by rank. A collective of that name."""
    lengths = comm.gather(torch.tensor([len(content)]), f"{name}.length").tolist()
    return comm.gather(content, name).split(lengths)
