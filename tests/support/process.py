"""The settings of this process, which a call of the program must not change."""

import ctypes
import gc
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from multiprocessing import forkserver

import cv2
import numpy as np
import torch

BLOCKS, BLOCK = 300, 2**20  # bytes
# Threads of CUDA or Horovod, or torch's DataLoader, may set these for their own processes.
ITS_OWN = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}


class MallInfo(ctypes.Structure):
    """The struct mallinfo2 of malloc.h."""

    _fields_ = [(f"field{number}", ctypes.c_size_t) for number in range(9)] + [
        ("keepcost", ctypes.c_size_t)
    ]


def state():
    """Return the settings, by name."""
    cudnn = torch.backends.cudnn
    return {
        "handlers": {number: signal.getsignal(number) for number in set(signal.Signals) - ITS_OWN},
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "hooks": (sys.exit, sys.excepthook, threading.excepthook),
        "arguments": list(sys.argv),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "variables": dict(os.environ),
        "filters": list(warnings.filters),
        "root logger": (logging.root.level, list(logging.root.handlers)),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), cv2.getNumThreads()),
        "flags": (cudnn.deterministic, cudnn.benchmark, torch.get_default_dtype()),
        "deterministic": torch.get_deterministic_debug_mode(),
        "precision": (torch.get_float32_matmul_precision(), cudnn.allow_tf32),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "random": (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        ),
        "garbage": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "processes": (
            multiprocessing.get_start_method(allow_none=True),
            multiprocessing.active_children(),
        ),
        "fork server": list(forkserver._forkserver._preload_modules),
    }


def different(before, after):
    """Return the settings that differ: {name: (before, after)}."""
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def kept_memory():
    """Return how many bytes malloc keeps after 300 MiB in blocks of 1 MiB are freed."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.mallinfo2.restype = ctypes.c_void_p, MallInfo
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    blocks = (ctypes.c_void_p * BLOCKS)()
    for number in range(BLOCKS):
        blocks[number] = libc.malloc(BLOCK)
    for number in reversed(range(BLOCKS)):
        libc.free(blocks[number])
    return libc.mallinfo2().keepcost
