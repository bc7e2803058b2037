"""The work of a loader process, which prepares batches for its worker."""

import copy
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from job.cluster.memory import keep_freed_memory
from job.cluster.stop import SIGNALS
from job.data.images import Images, Names, prepare_process
from job.data.parcel import Parcel, Shared, shared
from job.data.views import collate
from job.errors import RunError
from job.text import printable

KEPT = 2**24  # bytes. Larger blocks of freed memory are returned to the system
LONGEST = 900  # characters of a Failure


class Views(Protocol):
    """A dataset of views of `images`: draw -> views and other values, for `collate`."""

    images: Images

    def __getitem__(self, draw: Any) -> tuple: ...


class Reading:
    """The image that each loader process reads, in memory shared with the worker.

    rows: (processes, 2) int64, the process id and the image's index of each.
    """

    def __init__(self, memory: Shared):
        self.memory = memory
        self.rows = np.frombuffer(memory.mapped(), dtype=np.int64).reshape(-1, 2)

    def __reduce__(self) -> tuple:
        return opened, (Reading, self.memory)


class Flag:
    """Replace DataLoader's event, without the lock that a killed process would never release."""

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
    """Return a Reading or a Flag on the worker's memory.

    End this loader process if its worker has ended.
    """
    try:
        return kind(memory)
    except FileNotFoundError:
        os._exit(1)


@dataclass
class Failure:
    """The item that a loader process sends instead of a batch that it cannot prepare."""

    text: str
    code: int


def failure(error: Exception, path: str) -> Failure:
    """Return an error of a loader process that was reading `path`, in one line."""
    if isinstance(error, RunError):
        return Failure(str(error)[:LONGEST], error.code)
    lines = [
        f"{os.path.basename(frame.filename)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    cause = f"{type(error).__name__}: {printable(str(error))}"
    where = ", ".join([*lines[-1:], path])
    text = f"a batch cannot be loaded: {cause[: LONGEST // 2]} ({where})"
    return Failure(text[:LONGEST], 1)


class Tasks(Dataset):
    """Prepare the batch of a list of draws: a batch, a Parcel between processes, or a Failure."""

    def __init__(self, views: Views, reading: Reading, packed: bool):
        self.views, self.reading, self.packed = views, reading, packed
        self.shared: Views | None = None

    def __getstate__(self) -> dict:
        """Return the state for a loader process: all processes map the same names and labels.

        A copy of them in each would grow with the number of images.
        """
        if self.shared is None:
            self.shared = copy.copy(self.views)
            self.shared.images = shared(self.views.images, (Images, Names))
        return self.__dict__ | {"views": self.shared, "shared": None}

    def __getitems__(self, draws: Sequence) -> Any:
        images, process = self.views.images, get_worker_info()
        row = self.reading.rows[process.id if process else 0]
        row[0], images.reading = os.getpid(), row[1:]
        try:
            batch = collate([self.views[draw] for draw in draws])
            return Parcel(batch) if self.packed else batch
        except Exception as error:
            return failure(error, images.path(int(row[1])))


def unchanged(batch: Any) -> Any:
    """Return `batch`: the dataset has joined it."""
    return batch


def begin(process: int) -> None:
    """Prepare a loader process: keep freed memory, and end if its worker is killed.

    Its parent is the fork server, which lives as long as its children do. Without this, each would
    wait for the other forever.
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
