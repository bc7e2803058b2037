"""Loader processes prepare batches ahead of their use.

If one fails, the run ends with one line that names the cause and the file.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import connection
from typing import Any

from torch.utils.data import DataLoader

from job.cluster.children import REAPED, end_children
from job.cluster.stop import Stop
from job.data.fork_server import start_fork_server, without_main
from job.data.images import prepare_process
from job.data.loader_process import Failure, Reading, Tasks, Views, begin, failure, unchanged
from job.data.parcel import AHEAD, Shared
from job.errors import WorkerError
from job.text import printable

LOOK = 0.5  # s between two checks of the loader processes during a wait for a batch
GRACE = 45.0  # s to wait for a batch after a signal to stop, less than horovodrun's 60
FORK_SERVER = 255  # exit code of a loader process whose parent, the fork server, has ended
# Probable causes for the end of a loader process, by signal. For other signals: the decoder.
MEMORY = "probably because memory ran out. Use fewer --workers, or give the job more memory"
CAUSES = {
    "SIGKILL": MEMORY,
    "SIGBUS": "probably because memory or a disk ran out. Use fewer --workers, or make room",
}
SERVER_ENDED = f"the process that starts loader processes has ended, {MEMORY}"
DECODER = "which its decoder does not survive. Remove that file, or convert it"


class Batches:
    """Iterate over batches, which loader processes prepare.

    draws: the dataset's indices of each batch. processes: number of loader processes, from a fork
    server, because Horovod's threads do not survive a plain fork. With 0 this process prepares
    each batch, and waits for each read. pin: keep batches in page-locked memory, for a GPU.
    stop: the worker's signal to stop. patience: seconds to wait for a batch before a warning, and
    before an error. remark: prints a warning.

    WorkerError: a loader process has ended or cannot prepare a batch, or no batch is ready
    within GRACE seconds after a signal, or within `patience`.
    """

    def __init__(
        self,
        views: Views,
        draws: Iterable[Sequence],
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
                batch_sampler=draws,  # type: ignore[arg-type]  # ranges are fetched as lists are
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
                f"--workers {processes}: the loader processes cannot start: {error}; expected room"
                " in /dev/shm and in TMPDIR, and file descriptors (ulimit -n). Make room, or use"
                " --workers 0"
            ) from None
        self.processes = [
            process for process in multiprocessing.active_children() if process not in before
        ]

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
        """Return the error that ends the wait after DataLoader's `error`, or None to wait on."""
        timed_out = isinstance(error, RuntimeError) and "timed out" in str(error)
        # A batch of a process that has just ended may be lost before its end shows.
        connection.wait(
            [process.sentinel for process in self.processes], timeout=0 if timed_out else REAPED
        )
        for process in self.processes:
            if not process.is_alive():
                return WorkerError(self.obituary(process))
        if not timed_out:
            return WorkerError(failure(error, self.awaited()).text)
        now = time.monotonic()
        if self.stop and self.stop.signal and now - max(self.since, self.stop.time) > GRACE:
            return WorkerError(
                f"{self.stop.signal.name} arrived, but no batch in {GRACE:.0f} s: {self.doing()}."
                " Nothing is saved. --resume auto resumes from the newest checkpoint"
            )
        if now - self.since > self.end:
            return WorkerError(
                f"{self.doing()}, ended after HOROVOD_STALL_SHUTDOWN_TIME_SECONDS={self.end:.0f}"
            )
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
            ended = f"loader process {process.pid} ended with exit code {code} {when}"
            return f"{ended}. Its own last lines have the cause"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        cause = CAUSES.get(name, DECODER if paths else "as the system's log may explain")
        return f"loader process {process.pid} was ended by {name} {when}, {cause}"

    def doing(self) -> str:
        """Return the seconds of waiting for a batch, and the image being read, as text."""
        waited = f"no batch for {time.monotonic() - self.since:.0f} s"
        return f"{waited}, its loader process reads {self.awaited()}"

    def awaited(self) -> str:
        """Return the image that the next batch's loader process reads.

        DataLoader assigns batches to the processes in turn.
        """
        pid, index = self.reading.rows[self.done % len(self.reading.rows)]
        return self.path(index) if pid else "no image yet"

    def path(self, index: int) -> str:
        """Return the path of an image in `reading`."""
        return printable(self.images.path(int(index)))
