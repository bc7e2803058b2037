"""How files are read when a file system fails, and how the small files of a run are written."""

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

# Errors of files and file systems without synchronisation: folders on CIFS and some of FUSE, devices.
NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP)
PAUSES = (1, 2, 4, 8)  # s, before the next try of a failed read
Result = TypeVar("Result")


class ReadError(RunError):
    """A file system, or a memory, that still fails after all tries."""


class IrregularFile(OSError, ValueError):
    """A pipe, device or other special file, or a file that is too large."""


def open_regular(path: str | os.PathLike[str], at_most: int) -> BinaryIO:
    """Open a file to read. OSError: it cannot be opened. IrregularFile: it is special, or has more than `at_most` bytes."""

    def checked(path: str, flags: int) -> int:
        try:
            descriptor = os.open(
                path, flags | os.O_NONBLOCK
            )  # does not wait for the writer of a pipe
        except OSError as error:
            if error.errno == errno.ENXIO:  # a socket
                raise IrregularFile(errno.EINVAL, "no regular file", path) from None
            raise
        status = os.fstat(descriptor)
        if not (
            stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
        ):  # `open` refuses a folder itself
            problem = "no regular file"
        elif status.st_size > at_most:
            problem = f"{status.st_size} bytes; expected at most {at_most}"
        else:
            return descriptor
        os.close(descriptor)
        raise IrregularFile(errno.EINVAL, problem, path)

    return open(path, "rb", opener=checked)


def patient(read: Callable[[], Result], path: str) -> Result:
    """Return `read()`, which reads the file `path`; try again after PAUSES if the file system or the memory fails.

    ReadError: it still fails. ValueError, RunError: the file is at fault. A signal to stop is obeyed afterwards.
    """
    path = printable(path)
    for pause in (*PAUSES, None):
        try:
            return read()
        except ValueError:
            raise
        except OSError as error:
            what, advice = (
                f"cannot read {path}: {error.strerror or error}",
                "Check its file system and permissions",
            )
        except MemoryError:
            what, advice = (
                f"no memory to read {path}",
                "Use fewer --workers, or give the job more memory",
            )
        if pause is None:
            break
        with contextlib.suppress(OSError):  # standard error may fail too
            print(f"warning: {what}; next try in {pause} s", file=sys.stderr, flush=True)
        time.sleep(pause)
    raise ReadError(f"{what}, tried {len(PAUSES) + 1} times in {sum(PAUSES)} s. {advice}", code=1)


def append(file: io.FileIO, line: str) -> None:
    """Add a line to a file that was opened in binary without a buffer. RunError: the disk does not take it."""
    data = (line + "\n").encode()
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise not_taken(file, error) from None


def not_taken(file: io.FileIO, error: OSError) -> RunError:
    """The error of a log or metrics file that the disk does not take."""
    return RunError(
        f"cannot write to {file.name}: {error.strerror or error}; the checkpoints are untouched. When the disk takes more, "
        "go on with --resume auto"
    )


def write_whole(path: str, data: bytes) -> None:
    """Let a file have this content, or stay what it was. OSError: the disk does not take it."""
    with whole_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """A file to write to, which appears at `path` by one rename when it is whole and on disk, or not at all."""
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
    """Write a folder's names to disk, if its file system can. OSError: the disk does not take them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Write what a file or folder has to disk, if its file system can. OSError: the disk does not take it."""
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
