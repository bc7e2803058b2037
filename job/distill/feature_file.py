"""A file of features: an array (n, T) of floats, with the paths of its images in a .json file.

job.embed writes both.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from job.errors import RunError
from job.evaluate.tables import companion
from job.files import open_regular, patient

WRITE = "Write it by: python -m job.embed DIR --pretrained TEACHER --out FILE.npy"
EXPECTED = "expected an array (images, features) of floats"
SAMPLE = 64  # rows that all workers compare
BLOCK = 2**24  # bytes of rows that a worker checks at a time
LARGEST, LARGEST_PATHS = 2**60, 2**32  # bytes of the array, and of the .json file


class Rows:
    """The rows of an open file of features. The file is read, not mapped: an error has a line.

    RunError: it is no array (n, T) of floats, or incomplete.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            self.file: BinaryIO = open_regular(path, LARGEST)
            self.shape, columns_first, self.dtype = read_header(self.file)
        except OSError as error:
            raise RunError(f"--teacher {path}: {error.strerror or error}. {WRITE}") from None
        except Exception:  # NumPy raises several types on damaged bytes
            raise self.refused("no NumPy array") from None
        if self.dtype.kind != "f" or len(self.shape) != 2 or min(self.shape) < 1:
            raise self.refused(f"an array {self.shape} of {self.dtype}")
        if columns_first:
            c_order = "expected one in C's order, as numpy.ascontiguousarray returns"
            raise self.refused("an array in Fortran's order", c_order)
        self.start, self.bytes = self.file.tell(), self.shape[1] * self.dtype.itemsize
        size = os.fstat(self.file.fileno()).st_size
        if size != (expected := self.start + self.shape[0] * self.bytes):
            problem = f"{size} bytes; expected {expected}, as its header says"
            raise RunError(f"--teacher {path}: {problem}. {WRITE}")

    def refused(self, problem: str, expected: str = EXPECTED) -> RunError:
        """Return the error of a file with another content."""
        return RunError(f"--teacher {self.path}: {problem}; {expected}. {WRITE}")

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """Return rows, (b, T) float32. Zeros: the number is -1. RunError: the disk fails."""
        rows = np.zeros((len(numbers), self.bytes), dtype=np.uint8)

        def read() -> None:
            for row, number in zip(rows, numbers, strict=True):
                if number >= 0:
                    self.fill(row, number)

        patient(read, self.path)
        return self.values(rows)

    def fill(self, content: np.ndarray, first: int) -> None:
        """Read the bytes of rows from `first` on. OSError: the file has become shorter."""
        start = self.start + first * self.bytes
        if os.preadv(self.file.fileno(), [content.data], start) < content.nbytes:
            raise OSError("the file has become shorter")

    def values(self, content: np.ndarray) -> np.ndarray:
        """Return the values (n, T) float32 of rows' bytes. Too large ones are infinite."""
        with np.errstate(over="ignore"):
            return content.view(self.dtype).astype(np.float32, copy=False)

    def sample(self) -> str:
        """Return the SHA-256 of rows at equal distances. RunError: the disk fails."""
        numbers = np.linspace(0, self.shape[0] - 1, SAMPLE).astype(int).tolist()
        return hashlib.sha256(self.read(numbers).data).hexdigest()

    def check(self, rank: int, size: int) -> tuple[list[str], int]:
        """Return the SHA-256 of every `size`-th block from `rank` on, and a row, or -1.

        The values of that row are not all finite.
        """
        n, _ = self.shape
        rows = max(1, BLOCK // self.bytes)  # of a block
        digests, invalid = [], -1
        for first in range(rank * rows, n, size * rows):
            content = np.empty((min(rows, n - first), self.bytes), dtype=np.uint8)
            patient(partial(self.fill, content, first), self.path)
            digests.append(hashlib.sha256(content.data).hexdigest())
            finite = np.isfinite(self.values(content)).all(1)
            if invalid < 0 and not finite.all():
                invalid = first + int(finite.argmin())
        return digests, invalid


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return an array's shape, whether its columns come first, and its type.

    Exception: the file does not begin with the header of an array that can exist.
    """
    first = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read(file)
    if max(shape, default=0) > LARGEST:
        raise ValueError
    return shape, columns_first, dtype


def read_companion(path: str) -> dict[str, Any]:
    """Return the content of an array's .json file. RunError: it has no paths, or is missing."""
    json_path = companion(path)
    shown = f"--teacher {path}: {json_path}"
    try:
        with open_regular(json_path, LARGEST_PATHS) as file:
            content = json.load(file)
    except FileNotFoundError:
        problem = f"--teacher {path}: no {json_path} next to it"
        raise RunError(f"{problem}; expected the paths of its images. {WRITE}") from None
    except OSError as error:
        raise RunError(f"{shown}: {error.strerror or error}. {WRITE}") from None
    except (ValueError, RecursionError):
        content = None
    paths = content.get("paths") if isinstance(content, dict) else None
    if not isinstance(paths, list) or not all(isinstance(each, str) for each in paths):
        raise RunError(f"{shown} has no paths; expected a list of the images' paths. {WRITE}")
    return dict(content)


def undecodable(content: Mapping[str, Any]) -> set[str]:
    """Return the paths of the images that job.embed could not decode."""
    listed = content.get("undecodable")
    pairs = listed if isinstance(listed, list) else []
    return {str(pair[0]) for pair in pairs if isinstance(pair, list) and pair}
