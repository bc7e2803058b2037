"""Errors of this worker's GPU, its memory and NCCL: recognise them, and suggest a fix."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from job.cluster import nccl
from job.errors import WorkerError

MEMORY, NCCL, GPU = "memory", "nccl", "gpu"
# Messages of torch, Horovod and NCCL for each kind. The first match counts.
PATTERNS = {
    MEMORY: r"(CUDA|cuda|cuBLAS|cuDNN).*out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED",
    NCCL: r"\bnccl[A-Z]\w+ failed: |NCCL (async )?error",
    GPU: r"\b(CUDA|cuDNN|cuFFT)( driver)? error: |"
    r"\b(cuda[A-Z]\w+|\w*GpuEvent) failed: |Triton Error \[CUDA\]",
}
GONE = "remote process exited"  # in NCCL's message if another worker is gone


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
    kinds = (each for each, pattern in PATTERNS.items() if re.search(pattern, str(error)))
    return next(kinds, GPU if isinstance(error, torch.AcceleratorError) else "")


def describe(error: BaseException, location: str, options: Mapping[str, Any]) -> DeviceError:
    """Return the error that ends this worker: one line, with a suggested fix.

    error: an error whose `kind` is not "". location: the line of code that raised it, or "".
    options: of the program, by name.
    """
    error_kind, text = kind(error), cause(error)
    at = f" at {location}" if location else ""
    if error_kind == MEMORY:
        line = f"this GPU's memory is full{at} ({text}). {less_memory(options)}"
    elif error_kind == NCCL:
        own = nccl.cause()
        line = (
            f"NCCL failed{at} ({text}{own and f'; its log: {own}'}). "
            "Set NCCL_DEBUG=INFO to print the cause: mostly the network "
            "(NCCL_SOCKET_IFNAME), a small /dev/shm (in Docker, use --ipc host) or a full GPU. "
            f"If it is full: {less_memory(options)}"
        )
    else:
        line = (
            f"this GPU failed{at} ({text}). CUDA_LAUNCH_BLOCKING=1 shows the operation; "
            "nvidia-smi, and Xid in dmesg, show a faulty GPU"
        )
    device_error = DeviceError(line, error_kind)
    device_error.__cause__ = error
    return device_error


def cause(error: BaseException) -> str:
    """Return the cause from an error's message, without advice on torch's allocator."""
    return str(error).partition("\n")[0].partition(" Of the allocated memory")[0].rstrip(". ")


def less_memory(options: Mapping[str, Any]) -> str:
    """Return advice on how to use less GPU memory, by the options that the program has."""
    changes = []
    if "batch_size" in options:
        changes.append(f"a --batch-size below {options['batch_size']}")
    if "accumulate" in options:
        changes.append(f"--accumulate {2 * options['accumulate']}")
    if options.get("precision") == "float32":
        changes.append("--precision bf16")
    use = f"Use {' or '.join(changes)}; " if changes else ""
    return f"{use}nvidia-smi shows the other programs on this GPU"
