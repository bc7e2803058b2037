"""The folder of multiprocessing's sockets: its path must be short, but TMPDIR may be long."""

import os
import tempfile
from multiprocessing import util

from job.errors import RunError

LONGEST = 107  # bytes of a socket's path on Linux, without the terminating zero
# Names by multiprocessing, in the folder of temporary files.
NAMES = "/pymp-12345678/listener-12345678"
SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def shorten_paths() -> None:
    """Make multiprocessing put all its sockets under a short path if TMPDIR is long.

    All other temporary files stay in TMPDIR. RunError: no folder is short and writable.
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
            # This makes a private folder, which this process and its children keep until its end.
            util.get_temp_dir()
            return
        except OSError:
            continue
        finally:
            tempfile.tempdir = given
    raise RunError(
        f"TMPDIR {given}: too long for sockets, and {', '.join(SHORT)} are not writable; "
        f"expected at most {LONGEST - len(NAMES)} bytes. Set TMPDIR to a shorter path"
    )


def fits(folder: str) -> bool:
    """Return whether the path of a folder is short enough for a socket in it."""
    return len(os.fsencode(folder) + NAMES.encode()) <= LONGEST
