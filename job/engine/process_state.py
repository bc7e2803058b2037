"""Process settings that a run changes, and how to restore them."""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cv2
import torch

from job.cluster import comm
from job.cluster.children import end_children
from job.cluster.memory import free_as_usual, give_back
from job.cluster.stop import SIGNALS, in_main_thread
from job.data.fork_server import stop_fork_server

VARIABLES = ("HOROVOD_", "MGD_", "NCCL_", "CUBLAS_")  # prefixes of variables that a start sets
CUDNN = ("deterministic", "benchmark")


@contextlib.contextmanager
def kept_state() -> Iterator[None]:
    """Let a run compute with torch's defaults, and restore the process's settings afterwards.

    They are signal handlers, environment variables, warning filters, the search path of modules,
    multiprocessing's start method, the threads of torch and OpenCV, torch's flags and random
    numbers, and loader processes. malloc gets its defaults, because its settings cannot be read.

    Not restored: the connection of several workers, with its variables; the SIGCHLD handler of
    torch's DataLoader and Python's resource tracker; formats added to Pillow; random numbers of
    GPUs that the process had not used before.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    variables, frozen = own_variables(), gc.get_freeze_count()
    used = torch.cuda.is_initialized()
    gpu = torch.cuda.current_device() if used else 0
    gpus = range(torch.cuda.device_count()) if used else ()
    settings = [(write, read()) for read, write in SETTINGS]
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(gpus):
            with torch.inference_mode(False), torch.enable_grad():
                torch.set_default_dtype(torch.float32)
                torch.backends.cudnn.benchmark = False
                yield
    finally:
        end_children()
        stop_fork_server()
        for write, value in settings:
            write(value)
        if used:
            torch.cuda.set_device(gpu)
        if not frozen:
            gc.unfreeze()
        free_as_usual()
        give_back()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if not comm.connected():
            restore_variables(variables)
        for number, handler in handlers.items():
            if handler is not None and in_main_thread():  # None: not set by Python
                signal.signal(number, handler)


def read_flags() -> list[bool]:
    """Return cuDNN's flags."""
    return [getattr(torch.backends.cudnn, name) for name in CUDNN]


def write_flags(flags: list[bool]) -> None:
    """Set cuDNN's flags."""
    for name, flag in zip(CUDNN, flags, strict=True):
        setattr(torch.backends.cudnn, name, flag)


def read_path() -> list[str]:
    """Return a copy of the search path of modules."""
    return list(sys.path)


def write_path(path: list[str]) -> None:
    """Set the search path of modules."""
    sys.path[:] = path


def read_start_method() -> str | None:
    """Return how multiprocessing starts processes, or None if the caller can still choose."""
    return multiprocessing.get_start_method(allow_none=True)


def write_start_method(method: str | None) -> None:
    """Set how multiprocessing starts processes."""
    multiprocessing.set_start_method(method, force=True)


SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (read_flags, write_flags),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (cv2.getNumThreads, cv2.setNumThreads),
    (read_path, write_path),
    (read_start_method, write_start_method),
]


def own_variables() -> dict[str, str]:
    """Return the environment variables that a start may set."""
    return {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}


def restore_variables(variables: Mapping[str, str]) -> None:
    """Restore the environment variables that a start may set."""
    for name in own_variables().keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
