"""Errors of this worker's GPU, its memory and NCCL: how they are recognised, and what helps."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from job.cluster import nccl
from job.errors import WorkerError

MEMORY, NCCL, GPU = "memory", "nccl", "gpu"
# How torch's, Horovod's and NCCL's texts show each kind; the first that fits counts.
PATTERNS = {
    MEMORY: r"(CUDA|cuda|cuBLAS|cuDNN).*out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED",
    NCCL: r"\bnccl[A-Z]\w+ failed: |NCCL (async )?error",
    GPU: r"\b(CUDA|cuDNN|cuFFT)( driver)? error: |"
    r"\b(cuda[A-Z]\w+|\w*GpuEvent) failed: |Triton Error \[CUDA\]",
}
GONE = "remote process exited"  # NCCL's text if another worker is gone


class DeviceError(WorkerError):
    """An error of this worker's GPU, its memory or NCCL. kind: MEMORY, NCCL or GPU."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


def kind(error: BaseException | None) -> str:
    """Return MEMORY, NCCL or GPU for an error of this worker's device; "" for any other."""
    if not isinstance(error, RuntimeError) or GONE in str(error):
        return ""
    if isinstance(error, torch.OutOfMemoryError):
        return MEMORY
    found = (each for each, pattern in PATTERNS.items() if re.search(pattern, str(error)))
    return next(found, GPU if isinstance(error, torch.AcceleratorError) else "")


def describe(error: BaseException, place: str, options: Mapping[str, Any]) -> DeviceError:
    """Return the error that ends this worker, one line with what helps.

    error: one that has a `kind`. place: the line of code that raised it, or "".
    options: the program's, by name.
    """
    which, text = kind(error), words(error)
    at = f" at {place}" if place else ""
    if which == MEMORY:
        line = f"this GPU's memory is full{at} ({text}). {less_memory(options)}"
    elif which == NCCL:
        own = nccl.cause()
        line = (
            f"NCCL failed{at} ({text}{own and f'; its log: {own}'}). "
            "NCCL_DEBUG=INFO prints the cause: mostly the network "
            "(NCCL_SOCKET_IFNAME), a small /dev/shm (in Docker --ipc host) or a full GPU. "
            f"If it is full: {less_memory(options)}"
        )
    else:
        line = (
            f"this GPU failed{at} ({text}). CUDA_LAUNCH_BLOCKING=1 shows the operation; "
            "nvidia-smi, and Xid in dmesg, show a faulty GPU"
        )
    found = DeviceError(line, which)
    found.__cause__ = error
    return found


def words(error: BaseException) -> str:
    """Return the cause in an error's own text, without advice on torch's allocator."""
    return str(error).partition("\n")[0].partition(" Of the allocated memory")[0].rstrip(". ")


def less_memory(options: Mapping[str, Any]) -> str:
    """Return what needs less memory on the GPU, as far as the program has options for it."""
    ways = []
    if "batch_size" in options:
        ways.append(f"a --batch-size below {options['batch_size']}")
    if "accumulate" in options:
        ways.append(f"--accumulate {2 * options['accumulate']}")
    if options.get("precision") == "float32":
        ways.append("--precision bf16")
    use = f"Use {' or '.join(ways)}; " if ways else ""
    return f"{use}nvidia-smi shows what else uses this GPU"
