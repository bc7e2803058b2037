"""The process that forks loader processes, because Horovod's threads survive no plain fork."""

import contextlib
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from types import ModuleType
from typing import Any

from job.cluster.children import Child
from job.cluster.stop import SIGNALS
from job.data.loader_process import Flag

started: int | None = None  # process id of the fork server that `start_fork_server` has started


class Context(multiprocessing.context.ForkServerContext):
    """Processes from the fork server, which survive each other's death."""

    Event = Flag  # type: ignore[assignment]
    Process = Child


def start_fork_server() -> Any:
    """Start the fork server and Python's resource tracker, with the stop signals blocked.

    If a signal goes to the process group, only the worker should handle it: it still needs the
    images of the current step. Because SIGTERM does not end the loader processes either, they are
    killed at the worker's exit.
    """
    global started
    context, before_id, preloaded = Context(), server_id(), preload()
    context.set_forkserver_preload([__name__])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with quiet_tracker():
            resource_tracker.ensure_running()
        # Again: the tracker's start unblocks some.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        context.set_forkserver_preload(preloaded)
    if server_id() != before_id:
        started = server_id()
    return context


def stop_fork_server() -> None:
    """Stop the fork server if `start_fork_server` has started it.

    SIGNALS are blocked in it, and would be in all processes that other code starts from it.
    """
    global started
    if started is not None and started == server_id():
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
    started = None


def server_id() -> int | None:
    """Return the process id of the fork server, if one runs."""
    return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]


def preload() -> list[str]:
    """Return the modules that the caller's fork servers import at their start."""
    return forkserver._forkserver._preload_modules  # type: ignore[attr-defined]


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Let processes that are started within not import the main script again.

    They do not use it. If a script calls `train` without the guard
    `if __name__ == "__main__"`, they would train too.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def quiet_tracker() -> Iterator[None]:
    """Silence the resource tracker's warnings about the leftovers of killed processes."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        with warnings.catch_warnings(action="ignore"):  # of a tracker that was killed
            yield
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before
