"""Report the worker for which others wait: it hangs, is unreachable or elsewhere.

A thread of each worker answers requests for its state. If a wait in a collective is too long, the
lowest rank that waits requests the state of all others. A worker without an answer hangs, or its
node is gone.

Both sides prove that they have the key of the answering worker, which all workers received by a
collective:

    server  OWN_NONCE
    client  NONCE HMAC(key, "ask", NONCE, OWN_NONCE)
    server  HMAC(key, "answer", NONCE, TEXT) TEXT
"""

import os
import secrets
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

from job.cluster import comm, guard
from job.cluster.objects import allgather

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
OURS = tuple(os.path.join(ROOT, package, "") for package in ("job", "mgd", "moco"))
ANSWER = 3.0  # s to wait for another worker's answer
LINE = 16384  # bytes of a line between two workers, at most: an answer can contain a path
MAIN = threading.main_thread().ident or 0  # never 0, because it has started


class Handler(socketserver.BaseRequestHandler):
    """Answer a worker that proves the key."""

    server: "Server"

    def handle(self) -> None:
        """Send a nonce. If the client proves the key with it, send this worker's state."""
        own_nonce = guard.nonce()
        lines = guard.bounded(self.request, LINE, ANSWER)
        self.request.sendall(f"{own_nonce}\n".encode())
        nonce, _, proof = lines.readline().decode(errors="replace").rstrip().partition(" ")
        if guard.proves(proof, self.server.key, "ask", nonce, own_nonce):
            text = self.server.doing()
            self.request.sendall(
                f"{guard.prove(self.server.key, 'answer', nonce, text)} {text}\n".encode()
            )


class Server(guard.BoundedServer):
    """The server of a worker for the job's other workers."""

    def __init__(self, address: str, doing: Callable[[], str]):
        super().__init__((address, 0), Handler)
        self.doing = doing
        self.key = secrets.token_hex(32).encode()
        self.most += comm.size()


class Watchdog:
    """Watch this worker's main thread, and end the process if a wait lasts longer than `end` s.

    The constructor is a collective.

    address: of the server. node: the name of this node. warn: s of waiting after which the wait is
    reported. remark: is called with "warning" or "error", an id and one line.
    """

    def __init__(
        self,
        address: str,
        node: str,
        warn: float,
        end: float,
        remark: Callable[[str, str, str], None],
    ):
        self.rank, self.warn, self.end, self.remark = comm.rank(), warn, end, remark
        self.server = Server(address, self.doing)
        # (node, address, port, key)
        self.peers = allgather(
            (node, *self.server.server_address, self.server.key.decode()), "watchdog"
        )
        self.server.allowed = {address for _, address, _, _ in self.peers}
        self.over = threading.Event()
        for work in (self.answer, self.watch):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        """Stop watching and answering."""
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self) -> None:
        """Answer other workers, until the server is shut down."""
        self.server.serve_forever(poll_interval=0.1)

    def ask(self, rank: int) -> str:
        """Return another worker's state; "" if it does not answer or cannot prove its key."""
        _, address, port, key = self.peers[rank]
        own = self.peers[self.rank][1], 0  # the other worker allows this address
        nonce = guard.nonce()
        try:
            with socket.create_connection(
                (address, port), timeout=ANSWER, source_address=own
            ) as connection:
                lines = guard.bounded(connection, LINE, ANSWER)
                own_nonce = lines.readline().decode(errors="replace").rstrip()
                connection.sendall(
                    f"{nonce} {guard.prove(key.encode(), 'ask', nonce, own_nonce)}\n".encode()
                )
                proof, _, text = (
                    lines.readline().decode(errors="replace").rstrip("\n").partition(" ")
                )
        except OSError:
            return ""
        return text if guard.proves(proof, key.encode(), "answer", nonce, text) else ""

    def doing(self) -> str:
        """Return the state of the main thread, with its location in the code.

        `waits for NAME at LOCATION`, `has no batch ... at LOCATION` or `is at LOCATION`.
        """
        frame = sys._current_frames()[MAIN]
        if wait := comm.waits:
            state = f"waits for '{wait.name}'"
        else:
            state = f"has {text}," if (text := awaited(frame)) else "is"
        line = f"{state} at {location(frame)}"
        return "".join(sign if sign.isprintable() else "?" for sign in line)

    def waited(self) -> float:
        """Return the s for which the main thread has waited for one collective."""
        wait = comm.waits
        return time.monotonic() - wait.since if wait else 0.0

    def watch(self) -> None:
        """Report a wait after `warn` s, and end the process after `end` s of it."""
        warned = False
        while not self.over.wait(min(1.0, self.warn / 4)):
            waited = self.waited()
            if waited < self.warn:
                warned = False
            elif waited >= self.end:
                if report := self.report(waited):
                    ended = f"ended after HOROVOD_STALL_SHUTDOWN_TIME_SECONDS={self.end:.0f}"
                    self.remark("error", "stalled_worker", f"{report}; {ended}")
                else:
                    time.sleep(2 * ANSWER)  # so that a lower rank reports first
                os._exit(1)
            elif not warned:
                warned = True
                if report := self.report(waited):
                    self.remark("warning", "stalled_worker", report)

    def report(self, waited: float) -> str:
        """Return which workers wait for which others; "" if a lower rank waits and reports it."""
        with ThreadPoolExecutor(32) as pool:
            below = list(pool.map(self.ask, range(self.rank)))
            if any(answer.startswith("waits") for answer in below):
                return ""
            answers = (
                below
                + [self.doing()]
                + list(pool.map(self.ask, range(self.rank + 1, len(self.peers))))
            )
        mine = answers[self.rank]
        text = f"rank {self.rank} on {self.peers[self.rank][0]} {mine} for {waited:.0f} s"
        for rank, answer in enumerate(answers):
            if answer != mine:
                answer = answer or "does not answer: it is stopped or unreachable"
                text += f"; rank {rank} on {self.peers[rank][0]} {answer}"
        return text


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and its callers, innermost first."""
    while frame:
        yield frame
        frame = frame.f_back


def awaited(frame: FrameType) -> str:
    """Return `doing()` of the iterator for whose next item a thread waits; "" without one.

    frame: the innermost frame of the thread.
    """
    owners = (
        level.f_locals.get("self")
        for level in outwards(frame)
        if level.f_code.co_name == "__next__"
    )
    return next((owner.doing() for owner in owners if owner and hasattr(owner, "doing")), "")


def location(frame: FrameType) -> str:
    """Return a thread's innermost line of this project's code, except comm.py.

    If there is none, return its innermost line of any code.
    """
    levels = list(outwards(frame))
    names = [level.f_code.co_filename for level in levels]
    ours = (
        level
        for level, name in zip(levels, names, strict=True)
        if name.startswith(OURS) and name != comm.__file__
    )
    level = next(ours, levels[0])
    return f"{level.f_code.co_filename.removeprefix(ROOT)}:{level.f_lineno}"


def raised_at(error: BaseException) -> str:
    """Return the innermost line of this project's code, except comm.py, that raised an error."""
    steps = traceback.walk_tb(error.__traceback__)
    lines = [(frame.f_code.co_filename, line) for frame, line in steps]
    ours = [(name, line) for name, line in lines if name.startswith(OURS) and name != comm.__file__]
    return f"{ours[-1][0].removeprefix(ROOT)}:{ours[-1][1]}" if ours else ""
