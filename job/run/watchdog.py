"""Says who keeps the others waiting: a worker that stands still, is out of reach, or does something else.

Each worker answers, from a thread, what it is doing. When one has waited too long in a collective, the lowest
rank that waits asks all the others; those that do not answer stand still, or are gone with their node.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import horovod.torch as hvd

from job.data.loader import Batches
from job.run.exchange import allgather

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
OURS = tuple(os.path.join(ROOT, package, "") for package in ("job", "mgd", "moco"))
COLLECTIVES = hvd.mpi_ops.__file__
GRADIENTS = os.path.join(ROOT, "job", "gradients.py")
ANSWER = 3.0  # s to wait for another worker's answer
MAIN = threading.main_thread().ident or 0  # it has started


class Watchdog:
    """Watches this worker's main thread, and ends the process when that waits for others longer than `end` seconds.

    address: where this machine listens; node: its name; warn: s of waiting after which that is said. A collective:
    all workers make theirs at the same time. `say` is given one line at a time.
    """

    def __init__(self, address: str, node: str, warn: float, end: float, say: Callable[[str], None]):
        self.rank, self.warn, self.end, self.say = hvd.rank(), warn, end, say
        self.since = time.monotonic()
        self.handle: int | None = None
        self.server = socket.create_server((address, 0), backlog=128)
        self.peers = allgather((node, *self.server.getsockname()), "watchdog")  # (node, address, port)
        self.over = threading.Event()
        for work in (self.answer, self.watch):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        """Stop watching and answering."""
        self.over.set()
        self.server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self.server.close()

    def answer(self) -> None:
        """Tell the job's own machines, whenever one asks, what this worker is doing."""
        known = {address for _, address, _ in self.peers}
        while not self.over.is_set():
            try:
                connection, (client, _) = self.server.accept()
                with connection:
                    if client in known:
                        connection.sendall(self.doing().encode())
            except OSError:  # closed, or the other has gone away
                continue

    def ask(self, rank: int) -> str:
        """What another worker says that it is doing; nothing if it does not answer."""
        try:
            own = self.peers[self.rank][1], 0  # by this address the other knows this worker
            with socket.create_connection(self.peers[rank][1:], timeout=ANSWER, source_address=own) as connection:
                return connection.makefile().read()
        except OSError:
            return ""

    def doing(self) -> str:
        """`waits for NAME at PLACE`, `has no batch ... at PLACE` or `is at PLACE`: what this worker's main thread does."""
        frame = sys._current_frames()[MAIN]
        if pending(frame) is not None:
            doing = f"waits for {collective(frame)}"
        else:
            doing = f"has {loading.doing()}," if (loading := batches(frame)) else "is"
        return f"{doing} at {place(frame)}"

    def waited(self) -> float:
        """The seconds for which the main thread has waited for one collective."""
        handle = pending(sys._current_frames()[MAIN])
        if handle is None or handle != self.handle:
            self.handle, self.since = handle, time.monotonic()
        return time.monotonic() - self.since

    def watch(self) -> None:
        """Report a wait longer than `warn` seconds, and end the process after `end` seconds of it."""
        warned = False
        while not self.over.wait(min(1.0, self.warn / 4)):
            waited = self.waited()
            if waited < self.warn:
                warned = False
            elif waited >= self.end:
                if report := self.report(waited):
                    self.say(f"error: {report}; ended after HOROVOD_STALL_SHUTDOWN_TIME_SECONDS={self.end:.0f}")
                else:
                    time.sleep(2 * ANSWER)  # a lower rank's report is to come first
                os._exit(1)
            elif not warned:
                warned = True
                if report := self.report(waited):
                    self.say(report)

    def report(self, waited: float) -> str:
        """Who waits for whom, if no lower rank waits that can say it."""
        with ThreadPoolExecutor(32) as pool:
            below = list(pool.map(self.ask, range(self.rank)))
            if any(answer.startswith("waits") for answer in below):
                return ""
            answers = below + [self.doing()] + list(pool.map(self.ask, range(self.rank + 1, len(self.peers))))
        mine = answers[self.rank]
        text = f"rank {self.rank} on {self.peers[self.rank][0]} {mine} for {waited:.0f} s"
        for rank, answer in enumerate(answers):
            if answer != mine:
                text += f"; rank {rank} on {self.peers[rank][0]} {answer or 'does not answer: it is stopped, or out of reach'}"
        return text


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames from the innermost outwards."""
    while frame:
        yield frame
        frame = frame.f_back


def pending(frame: FrameType) -> int | None:
    """Horovod's handle of the collective that a thread waits for, or None: it waits for none."""
    for level in outwards(frame):
        if level.f_code.co_filename == COLLECTIVES and level.f_code.co_name == "synchronize":
            return level.f_locals.get("handle")
    return None


def batches(frame: FrameType) -> Batches | None:
    """The batches of which a thread awaits the next, or None: it awaits none."""
    levels = (level for level in outwards(frame) if level.f_code is Batches.__next__.__code__)
    return next((level.f_locals["self"] for level in levels), None)


def collective(frame: FrameType) -> str:
    """The name of the collective that a thread waits for, as far as the calls that led there have it."""
    for level in outwards(frame):
        if level.f_code.co_filename == GRADIENTS and "bucket" in level.f_locals:
            return f"the gradient of {level.f_locals['bucket'].name}"
        if level.f_code.co_filename == COLLECTIVES and isinstance(level.f_locals.get("name"), str):
            return f"'{level.f_locals['name']}'"
    return "a collective"


def place(frame: FrameType) -> str:
    """Where a thread is: the innermost line of this project's code, or of any where there is none."""
    levels = list(outwards(frame))
    level = next((level for level in levels if level.f_code.co_filename.startswith(OURS)), levels[0])
    return f"{level.f_code.co_filename.removeprefix(ROOT)}:{level.f_lineno}"
