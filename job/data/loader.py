"""Loader processes prepare batches ahead of their use.

If one fails, the run ends with one line that names the cause and the file.
"""

import contextlib
import copy
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset, get_worker_info

from job.cluster.children import REAPED, Child, end_children
from job.cluster.memory import keep_freed_memory
from job.cluster.stop import SIGNALS, Stop
from job.data.images import Images, Names, prepare_process
from job.data.parcel import AHEAD, Parcel, Shared, shared
from job.data.views import collate
from job.errors import RunError, WorkerError
from job.text import printable

KEPT = 2**24  # bytes; what larger images take is given back
LOOK = 0.5  # s between two looks at the loader processes while a batch is awaited
GRACE = 45.0  # s that a batch may still take after a signal to stop; horovodrun waits 60
LONGEST = 900  # characters of a Failure
FORK_SERVER = 255  # exit code of a loader process whose parent, the fork server, has ended
# Probable causes for the end of a loader process, by signal. For any other signal it is the decoder.
MEMORY = "probably because memory ran out. Use fewer --workers, or give the job more memory"
CAUSES = {"SIGKILL": MEMORY, "SIGBUS": "probably because memory or a disk ran out. Use fewer --workers, or make room"}
SERVER_ENDED = f"the process that starts loader processes has ended, {MEMORY}"
DECODER = "which its decoder does not survive. Remove that file, or convert it"

started: int | None = None  # process id of the fork server that `start_fork_server` has started


class Views(Protocol):
    """A dataset of views of `images`: draw -> views, and what else `collate` joins."""

    images: Images

    def __getitem__(self, draw: Any) -> tuple: ...


class Reading:
    """The image that each loader process reads, in memory that the processes share with their worker.

    rows: (processes, 2) int64, the process id and the image's index of each.
    """

    def __init__(self, memory: Shared):
        self.memory, self.rows = memory, np.frombuffer(memory.mapped(), dtype=np.int64).reshape(-1, 2)

    def __reduce__(self) -> tuple:
        return opened, (Reading, self.memory)


class Flag:
    """A replacement for DataLoader's event. It has no lock, which a killed process would never release."""

    def __init__(self, memory: Shared | None = None):
        self.memory = memory or Shared(1)
        self.bytes = self.memory.mapped()

    def __reduce__(self) -> tuple:
        return opened, (Flag, self.memory)

    def set(self) -> None:
        """Set the flag in all processes that have it."""
        self.bytes[0] = 1

    def is_set(self) -> bool:
        """Whether it is set."""
        return self.bytes[0] == 1


def opened(kind: type, memory: Shared) -> Reading | Flag:
    """Return a Reading or a Flag on the worker's memory; end this loader process if its worker has ended meanwhile."""
    try:
        return kind(memory)
    except FileNotFoundError:
        os._exit(1)


class Context(multiprocessing.context.ForkServerContext):
    """Processes from the fork server, which survive each other's death."""

    Event = Flag  # type: ignore[assignment]
    Process = Child


@dataclass
class Failure:
    """A loader process's answer in place of a batch that it cannot prepare."""

    text: str
    code: int


def failure(error: Exception, path: str) -> Failure:
    """Return an error of a loader process that was reading `path`, in one line."""
    if isinstance(error, RunError):
        return Failure(str(error)[:LONGEST], error.code)
    places = [f"{os.path.basename(place.filename)}:{place.lineno}" for place in traceback.extract_tb(error.__traceback__)]
    what = f"{type(error).__name__}: {printable(str(error))}"
    return Failure(f"a batch cannot be loaded: {what[: LONGEST // 2]} ({', '.join([*places[-1:], path])})"[:LONGEST], 1)


class Tasks(Dataset):
    """The work of loader processes: a list of draws -> a batch, or a Parcel of it between processes, or a Failure."""

    def __init__(self, views: Views, reading: Reading, packed: bool):
        self.views, self.reading, self.packed = views, reading, packed
        self.shared: Views | None = None

    def __getstate__(self) -> dict:
        """Return what a loader process gets: all processes map the same names and labels.

        A copy of them in each would grow with the number of images.
        """
        if self.shared is None:
            self.shared = copy.copy(self.views)
            self.shared.images = shared(self.views.images, (Images, Names))
        return self.__dict__ | {"views": self.shared, "shared": None}

    def __getitems__(self, draws: list) -> Any:
        images, process = self.views.images, get_worker_info()
        row = self.reading.rows[process.id if process else 0]
        row[0], images.reading = os.getpid(), row[1:]
        try:
            batch = collate([self.views[draw] for draw in draws])
            return Parcel(batch) if self.packed else batch
        except Exception as error:
            return failure(error, images.path(int(row[1])))


class Batches:
    """An iterator over the batches of `draws` (lists of the dataset's indices), which `processes` loader processes prepare.

    The processes come from a fork server, because Horovod's threads do not survive a plain fork. With 0 processes this
    process prepares each batch, and waits for each read. pin: keep batches in page-locked memory, for a GPU. stop: the
    worker's wish to stop. patience: seconds to wait for a batch before a warning, and before an error. remark: prints a warning.

    WorkerError: a loader process has ended or cannot prepare a batch; no batch has come for GRACE seconds after a signal,
    or within `patience`.
    """

    def __init__(
        self,
        views: Views,
        draws: Iterable[list],
        processes: int,
        pin: bool = False,
        stop: Stop | None = None,
        patience: tuple[float, float] = (60, 900),
        remark: Callable[[str], None] = print,
    ):
        self.images, self.stop, self.remark = views.images, stop, remark
        self.warn, self.end = patience
        self.since, self.warned, self.done = time.monotonic(), False, 0
        self.reading = Reading(Shared(16 * max(1, processes)))
        prepare_process()
        before = multiprocessing.active_children()
        try:
            loader = DataLoader(
                Tasks(views, self.reading, packed=processes > 0),
                batch_sampler=draws,
                num_workers=processes,
                multiprocessing_context=start_fork_server() if processes else None,
                worker_init_fn=begin,
                prefetch_factor=AHEAD if processes else None,
                collate_fn=unchanged,
                pin_memory=pin,
                timeout=LOOK if processes else 0,
            )
            with without_main():
                self.batches = iter(loader)
        except (EOFError, ConnectionError):
            raise WorkerError(SERVER_ENDED) from None
        except OSError as error:
            raise WorkerError(
                f"--workers {processes}: the loader processes cannot start: {error}; expected room in /dev/shm and in "
                "TMPDIR, and file descriptors (ulimit -n). Make room, or use --workers 0"
            ) from None
        self.processes = [process for process in multiprocessing.active_children() if process not in before]

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Any:
        self.since, self.warned = time.monotonic(), False
        while True:
            try:
                batch = next(self.batches)
            except StopIteration:
                raise
            except Exception as error:
                batch = error
            if isinstance(batch, Exception):
                failed = self.ended(batch)
            elif isinstance(batch, Failure):
                failed = WorkerError(batch.text, batch.code)
            else:
                self.done += 1
                return batch
            if failed:
                end_children()
                raise failed

    def ended(self, error: Exception) -> WorkerError | None:
        """Return the error that ends the wait, after DataLoader has raised `error`; None: only LOOK seconds are over."""
        looked = isinstance(error, RuntimeError) and "timed out" in str(error)
        # A batch of a process that has just ended may be lost before its end shows.
        connection.wait([process.sentinel for process in self.processes], timeout=0 if looked else REAPED)
        for process in self.processes:
            if not process.is_alive():
                return WorkerError(self.obituary(process))
        if not looked:
            return WorkerError(failure(error, self.awaited()).text)
        now = time.monotonic()
        if self.stop and self.stop.signal and now - max(self.since, self.stop.time) > GRACE:
            return WorkerError(
                f"{self.stop.signal.name} came, and no batch in {GRACE:.0f} s more: {self.doing()}. Nothing is saved; "
                "--resume auto starts from the newest checkpoint"
            )
        if now - self.since > self.end:
            return WorkerError(f"{self.doing()}; ended after HOROVOD_STALL_SHUTDOWN_TIME_SECONDS={self.end:.0f}")
        if now - self.since > self.warn and not self.warned:
            self.warned = True
            self.remark(f"{self.doing()}. Its file system may be slow, or not answer")
        return None

    def obituary(self, process: Any) -> str:
        """Return how a loader process has ended, and the probable cause."""
        code = process.exitcode
        if code == FORK_SERVER:
            return SERVER_ENDED
        paths = [self.path(index) for pid, index in self.reading.rows if pid == process.pid]
        when = f"while it read {paths[0]}" if paths else "before it read an image"
        if code >= 0:
            return f"loader process {process.pid} ended with exit code {code} {when}; its own last lines say why"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        cause = CAUSES.get(name, DECODER if paths else "as the system's log may explain")
        return f"loader process {process.pid} was ended by {name} {when}, {cause}"

    def doing(self) -> str:
        """Return how long the worker has waited for a batch, and the image that its loader process reads."""
        return f"no batch for {time.monotonic() - self.since:.0f} s, its loader process reads {self.awaited()}"

    def awaited(self) -> str:
        """Return the image that the next batch's loader process reads; DataLoader deals batches to the processes in turn."""
        pid, index = self.reading.rows[self.done % len(self.reading.rows)]
        return self.path(index) if pid else "nothing yet"

    def path(self, index: int) -> str:
        """Return the path of an image in `reading`."""
        return printable(self.images.path(int(index)))


def unchanged(batch: Any) -> Any:
    """Return `batch`: the dataset has joined it."""
    return batch


def start_fork_server() -> Any:
    """Start the process that loader processes are forked from, and Python's resource tracker, with the signals to stop blocked.

    A signal to a whole process group is for the worker alone, which still needs the images of the step in
    progress. As SIGTERM does not end the loader processes either, they are killed at the worker's exit.
    """
    global started
    context, before_id, preloaded = Context(), server_id(), preload()
    context.set_forkserver_preload(["job.data.loader"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with quiet_tracker():
        resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # again: the tracker's start unblocks some
    forkserver.ensure_running()
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

    They need nothing of it. If a script calls `train` without the guard
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
    """Let the resource tracker that is started within free, without a warning, what a process that was ended has left."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    with warnings.catch_warnings(action="ignore"):  # of a tracker that was killed
        yield
    if before is None:
        del os.environ["PYTHONWARNINGS"]
    else:
        os.environ["PYTHONWARNINGS"] = before


def begin(process: int) -> None:
    """Prepare a loader process: quick with memory, and to end when the worker that it loads for is killed.

    Its parent is the fork server, which lives as long as it does: each would wait for the other for ever.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the fork server may be other code's
    keep_freed_memory(KEPT)
    prepare_process()
    worker = multiprocessing.parent_process()
    assert worker

    def follow() -> None:
        worker.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
