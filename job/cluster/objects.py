"""Send Python values between workers, in torch's format, without running received code.

Horovod's own `broadcast_object` and `allgather_object` send pickles, which can run code when they
are loaded, and its connections are not authenticated. This module loads only numbers, text,
containers, tensors, arrays, and the classes marked by job/cluster/travels.py.
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
    np.empty(0).__reduce__()[0],  # the function that rebuilds an array
]


def encode(value: Any) -> torch.Tensor:
    """Return a value as bytes, (n,) uint8."""
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def decode(content: torch.Tensor) -> Any:
    """Return the value of `encode`. pickle.UnpicklingError: code, or a class without @travels."""
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
    return [decode(content) for content in allgather_bytes(encode(value), name)]


def allgather_text(text: str, name: str) -> list[str]:
    """Return every worker's `text`, not empty, by rank. A collective of that name.

    It also works if the workers have different versions of torch.
    """
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    texts = allgather_bytes(content, name)
    return [text.numpy().tobytes().decode(errors="replace") for text in texts]


def allgather_bytes(content: torch.Tensor, name: str) -> tuple[torch.Tensor, ...]:
    """Return every worker's (n,) uint8, by rank. A collective of that name."""
    lengths = comm.gather(torch.tensor([len(content)]), f"{name}.length").tolist()
    return comm.gather(content, name).split(lengths)
