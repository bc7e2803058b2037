"""How the small files of a run are written: line by line and at once, or whole and not at all."""

import contextlib
import io
import os

from job.errors import RunError


def append(file: io.FileIO, line: str) -> None:
    """Add a line to a file that was opened in binary without a buffer. RunError: the disk does not take it."""
    data = (line + "\n").encode()
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise RunError(
            f"cannot write to {file.name}: {error.strerror or error}; the checkpoints are untouched. When the disk takes more, "
            "go on with --resume auto"
        ) from None


def write_whole(path: str, data: bytes) -> None:
    """Let a file have this content, by one rename. OSError: the disk does not take it; what was there before stays."""
    try:
        with open(path + ".new", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(path + ".new")
        raise
