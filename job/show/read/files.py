"""Open the files of a run safely: other people write them, so they can be anything."""

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO

from job.errors import RunError
from job.files import open_regular

LARGEST = 2**32  # bytes of a file that is read in blocks
LARGEST_TEXT = 2**28  # bytes of a file that is read at once


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], at_most: int = LARGEST) -> Iterator[BinaryIO]:
    """Open a file of a run for reading, up to `at_most` bytes.

    FileNotFoundError: it is missing. RunError: it is unreadable, special or too large.
    """
    try:
        with open_regular(path, at_most) as file:
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunError(
            f"{path}: {error.strerror or error}; expected a file that you may read"
        ) from None
