"""Read files on file systems that fail for a time, and write the small files of a run."""

import contextlib
import errno
import io
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

from job.errors import RunError
from job.text import printable

# Errors of fsync where it is not supported: folders on CIFS and some FUSE file systems, devices.
NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP)
PAUSES = (1, 2, 4, 8)  # s, before the next try of a failed read
Result = TypeVar("Result")


class ReadError(RunError):
    """A file system or memory that still fails after all tries."""


class IrregularFile(OSError, ValueError):
    """A pipe, device or other special file, or a file that is too large."""


def open_regular(path: str | os.PathLike[str], at_most: int) -> BinaryIO:
    """Open a file for reading.

    OSError: it cannot be opened. IrregularFile: it is special, or has more than `at_most` bytes.
    """

    def checked(path: str, flags: int) -> int:
        try:
            # O_NONBLOCK: do not wait for the writer of a pipe.
            descriptor = os.open(path, flags | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a socket
                raise IrregularFile(errno.EINVAL, "not a regular file", path) from None
            raise
        status = os.fstat(descriptor)
        # `open` refuses folders itself.
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            problem = "not a regular file"
        elif status.st_size > at_most:
            problem = f"{status.st_size} bytes; expected at most {at_most}"
        else:
            return descriptor
        os.close(descriptor)
        raise IrregularFile(errno.EINVAL, problem, path)

    return open(path, "rb", opener=checked)


def patient(read: Callable[[], Result], path: str) -> Result:
    """Return `read()`, which reads the file `path`. Retry after PAUSES if disk or memory fails.

    ReadError: it still fails. ValueError, RunError: the file is at fault.
    A signal to stop has its effect afterwards.
    """
    path = printable(path)
    for pause in (*PAUSES, None):
        try:
            return read()
        except ValueError:
            raise
        except OSError as error:
            problem = f"cannot read {path}: {error.strerror or error}"
            fix = "Check its file system and permissions"
        except MemoryError:
            problem = f"no memory to read {path}"
            fix = "Use fewer --workers, or give the job more memory"
        if pause is None:
            break
        with contextlib.suppress(OSError):  # standard error may fail too
            print(f"warning: {problem}; next try in {pause} s", file=sys.stderr, flush=True)
        time.sleep(pause)
    raise ReadError(f"{problem}, tried {len(PAUSES) + 1} times in {sum(PAUSES)} s. {fix}", code=1)


def append(file: io.FileIO, line: str) -> None:
    """Append a line to an unbuffered binary file. RunError: the disk is full or fails."""
    data = (line + "\n").encode()
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise not_taken(file, error) from None


def not_taken(file: io.FileIO, error: OSError) -> RunError:
    """Return the error of a log or metrics file on a disk that is full or fails."""
    return RunError(
        f"cannot write to {file.name}: {error.strerror or error}; the checkpoints are untouched. "
        "Make room on the disk, and resume with --resume auto"
    )


def write_whole(path: str, data: bytes) -> None:
    """Replace the content of a file, completely or not at all. OSError: the disk fails."""
    with whole_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """Open a file that a rename puts at `path` when it is complete and on disk."""
    new = f"{path}.new"
    try:
        with open(new, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(new)
        raise


def sync_folder(folder: str) -> None:
    """Flush a folder's names to disk, if its file system can. OSError: the disk fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Flush a file or folder to disk, if its file system can. OSError: the disk fails."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def find_own_modules() -> None:
    """Let imports find modules in the current folder, after all others."""
    folder = os.getcwd()
    if folder not in sys.path:  # the console scripts do not add it
        sys.path.append(folder)
