"""The folder of multiprocessing's sockets: its path must be short, and TMPDIR may be long."""

import os
import tempfile
from multiprocessing import util

from job.errors import RunError

LONGEST = 107  # bytes of a socket's path on Linux, without the zero byte
NAMES = (
    "/pymp-12345678/listener-12345678"  # multiprocessing's names in the folder of temporary files
)
SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def shorten_paths() -> None:
    """Let multiprocessing keep its sockets, and those of its processes, under a short path if TMPDIR is long.

    All other temporary files stay in TMPDIR. RunError: no folder takes the sockets.
    """
    try:
        given = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise RunError(
            f"TMPDIR: {error.strerror}; expected a writable folder. Set TMPDIR to one"
        ) from None
    if fits(given):
        return
    for folder in filter(fits, SHORT):
        tempfile.tempdir = folder
        try:
            util.get_temp_dir()  # makes a private folder, which this process and its children keep until its end
            return
        except OSError:
            continue
        finally:
            tempfile.tempdir = given
    raise RunError(
        f"TMPDIR {given}: too long for sockets, and {', '.join(SHORT)} are not writable; expected at most "
        f"{LONGEST - len(NAMES)} bytes. Set TMPDIR to a shorter path"
    )


def fits(folder: str) -> bool:
    """Whether a folder's path is short enough for the path of a socket in it."""
    return len(os.fsencode(folder) + NAMES.encode()) <= LONGEST
