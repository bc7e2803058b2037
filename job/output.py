"""Standard output and error that fail: a program ends with one line, but a run that writes a log continues."""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from job.errors import RunError

PIPE = 141  # the exit code of a program whose reader has gone: 128 + SIGPIPE, as shells report it of other programs
DESCRIPTORS = {"stdin": 0, "stdout": 1, "stderr": 2}

Failed = Callable[[OSError], None]


class Output(io.FileIO):
    """A standard stream: a write that fails calls `failed`, which may raise, and its data is discarded."""

    def __init__(self, descriptor: int, failed: Failed):
        super().__init__(descriptor, "w", closefd=False)
        self.failed = failed

    def write(self, data: Any, /) -> int:
        """Write some of the data, waiting for room in a pipe that another process has set not to block."""
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])
            return written
        except OSError as error:
            self.failed(error)
            return len(data)


def ignore(error: OSError) -> None:
    """Go on without the data."""


def end(error: OSError) -> None:
    """End the program, quietly if the reader has gone, as of `| head`; only the first failure raises."""
    may_fail(ignore)
    if error.errno == errno.EPIPE:
        sys.exit(PIPE)
    raise RunError(
        f"{problem(error)}; expected a terminal, file or pipe that takes the output. Redirect it elsewhere"
    )


def problem(error: OSError) -> str:
    """Return what is wrong with standard output, for people."""
    return f"standard output: {'closed' if error.errno == errno.EBADF else error.strerror or error}"


def may_fail(failed: Failed) -> None:
    """From now on, a failed write to standard output calls `failed`, and ends nothing unless that raises."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, Output):
        raw.failed = failed


@contextlib.contextmanager
def guarded(failed: Failed = end) -> Iterator[None]:
    """Let a failed write to standard output call `failed`, and ignore one to standard error.

    By default it is a RunError at once. If the reader has gone, the program ends with exit code
    141 and no line. Streams that others have replaced stay.
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
    """Return the descriptor of a standard stream. If it is closed, no other file may get it: open it to fail at writes.

    Child processes inherit it. Libraries that print to it there would write into a pipe otherwise.
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
