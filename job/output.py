"""Handle failures of standard output: programs end with one line, runs with a log continue."""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from job.errors import RunError

PIPE = 141  # exit code if the reader has closed its pipe: 128 + SIGPIPE, as shells report it
DESCRIPTORS = {"stdin": 0, "stdout": 1, "stderr": 2}

Failed = Callable[[OSError], None]


class Output(io.FileIO):
    """A standard stream. A failed write discards its data and calls `failed`, which may raise."""

    def __init__(self, descriptor: int, failed: Failed):
        super().__init__(descriptor, "w", closefd=False)
        self.failed = failed

    def write(self, data: Any, /) -> int:
        """Write some of the data. Wait for room if another process made the pipe non-blocking."""
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])
            return written
        except OSError as error:
            self.failed(error)
            return len(data)


def ignore(error: OSError) -> None:
    """Continue without the data."""


def end(error: OSError) -> None:
    """End the program, without a line if the reader has gone, as in `| head`. Raises once only."""
    may_fail(ignore)
    if error.errno == errno.EPIPE:
        sys.exit(PIPE)
    raise RunError(
        f"{problem(error)}; expected a terminal, file or pipe with room. Redirect it elsewhere"
    )


def problem(error: OSError) -> str:
    """Return the problem of standard output as text."""
    return f"standard output: {'closed' if error.errno == errno.EBADF else error.strerror or error}"


def may_fail(failed: Failed) -> None:
    """From now on, let a failed write to standard output call `failed`, which may raise."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, Output):
        raw.failed = failed


@contextlib.contextmanager
def guarded(failed: Failed = end) -> Iterator[None]:
    """Let a failed write to standard output call `failed`, and ignore one to standard error.

    The default raises RunError. If the reader has gone, the program ends with exit code 141 and
    no line. Replaced streams stay replaced.
    """
    before = sys.stdout, sys.stderr
    for earlier in filter(None, before):
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            earlier.flush()
    descriptors = {name: reserved(name) for name in DESCRIPTORS}
    if sys.stdout is sys.__stdout__:
        sys.stdout = stream(descriptors["stdout"], failed, before[0])
    if sys.stderr is sys.__stderr__:
        sys.stderr = stream(descriptors["stderr"], ignore, before[1])
    try:
        yield
    finally:
        may_fail(ignore)
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


def reserved(name: str) -> int:
    """Return the descriptor of a standard stream. If it is closed, open it so that writes fail.

    Otherwise another file, such as a pipe, gets the descriptor, and libraries in child processes,
    which inherit it, print into that.
    """
    if getattr(sys, f"__{name}__") is None:
        descriptor = os.open(os.devnull, os.O_RDONLY)
        os.set_inheritable(descriptor, True)
        return descriptor
    return DESCRIPTORS[name]


def stream(descriptor: int, failed: Failed, like: TextIO | None) -> io.TextIOWrapper:
    """Return a text stream, flushed at each line end, with the encoding of another."""
    raw = io.BufferedWriter(Output(descriptor, failed))
    encoding, errors = (like.encoding, like.errors) if like else ("utf-8", "backslashreplace")
    return io.TextIOWrapper(raw, encoding, errors, line_buffering=True)
