"""Runs that Python code calls: a script or a notebook, whose process continues afterwards."""

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from job import output
from job.checkpoints.folder import LAST
from job.cluster import comm
from job.cluster.children import end_children
from job.cluster.memory import give_back
from job.cluster.stop import SIGNALS, Stopped, in_main_thread
from job.data.loader import stop_fork_server
from job.engine.run import Run
from job.errors import RunError

VARIABLES = ("HOROVOD_", "MGD_", "NCCL_")  # begin the names of variables that a start sets
RESUME = 'stopped by a signal; resume="auto" continues from here'

in_progress = threading.Lock()


@dataclass(frozen=True)
class Result:
    """What a run has left.

    folder: of the run. checkpoint: the newest, or "" if there is none.
    numbers: the newest losses and accuracies, by their names in metrics.jsonl.
    """

    folder: str
    checkpoint: str
    numbers: dict[str, float]


def result(run: Run, numbers: Mapping[str, float] | None = None) -> Result:
    """Return what a run has left, on all workers. A collective.

    numbers: by default those of its records.
    """

    def find() -> tuple[str, dict[str, float]]:
        last = os.path.join(run.folder, LAST)
        found = run.log.newest() if numbers is None else dict(numbers)
        return last if os.path.exists(last) else "", found

    return Result(run.folder, *run.on_first(find))


@contextlib.contextmanager
def called(run: Run, incomplete: str = "") -> Iterator[Run]:
    """Enter a run, and leave the process as it was before.

    incomplete: the message of KeyboardInterrupt if a stopped run saves nothing.
    RunError: another run is in progress in this process, or what the run raises.
    KeyboardInterrupt, on all workers: a signal, such as Ctrl-C's, came to one. The run has saved
    what it can.
    """
    if not in_progress.acquire(blocking=False):
        problem = "another run is in progress in this process; expected one at a time"
        raise RunError(f"{problem}. Wait for its end")
    try:
        with kept_state(), output.guarded(output.ignore):
            run.called = True
            with run:
                try:
                    yield run
                    return
                except Stopped:
                    if not incomplete:
                        run.stopped()
    finally:
        in_progress.release()
    raise KeyboardInterrupt(incomplete or RESUME)


@contextlib.contextmanager
def kept_state() -> Iterator[None]:
    """Put back what a run changes in its process, and let it compute with torch's defaults.

    These are signal handlers, torch's threads, flags and random numbers, environment variables and
    loader processes. Workers that are connected stay so, with their variables. malloc keeps its
    settings (job/cluster/memory.py).
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    variables, frozen = own_variables(), gc.get_freeze_count()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    used = torch.cuda.is_initialized()
    gpu = torch.cuda.current_device() if used else 0
    try:
        torch.set_default_dtype(torch.float32)
        cudnn.benchmark = False
        with torch.random.fork_rng(range(torch.cuda.device_count()) if used else ()):
            with torch.inference_mode(False), torch.enable_grad():
                yield
    finally:
        end_children()
        stop_fork_server()
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        cudnn.deterministic, cudnn.benchmark = flags
        if used:
            torch.cuda.set_device(gpu)
        if not frozen:
            gc.unfreeze()
        give_back()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if not comm.connected():
            put_back(variables)
        for number, handler in handlers.items():
            if handler is not None and in_main_thread():  # None: not Python's
                signal.signal(number, handler)


def own_variables() -> dict[str, str]:
    """Return the environment variables that a start may set."""
    return {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}


def put_back(variables: Mapping[str, Any]) -> None:
    """Give the environment variables that a start may set their values of before."""
    for name in own_variables().keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
