"""Rows of features as they are computed, in a folder from which a killed program resumes.

The rows of each group of images are appended in the order of the groups, then a line of the journal
with their checksum. A group counts as done only if both are complete.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from job.errors import RunError
from job.files import write_whole

ORIGIN, JOURNAL, ROWS = "origin.json", "groups.jsonl", "rows.f32"
MEANT = {
    "names": "set of images",
    "images": "number of images",
    "network": "checkpoint",
    "data": "DIR",
}


class Rows:
    """The rows of the groups done so far, in a folder that one process at a time writes to.

    origin: the inputs of the rows, in JSON's types; "images" is their number. width: values in a
    row. journal: of each done group the rows up to its end, their CRC-32 and undecodable images.
    """

    def __init__(self, folder: str, origin: dict[str, Any], width: int):
        self.folder, self.origin, self.width = folder, origin, width
        self.journal: list[dict[str, Any]] = []
        self.files: dict[str, io.FileIO] = {}

    def open(self) -> tuple[int, dict[int, str]]:
        """Open the folder. Return the number of done groups, and {number: problem}.

        These are the problems of their undecodable images.
        RunError: the folder is of another origin, in use, or not writable.
        """
        try:
            os.makedirs(self.folder, exist_ok=True)
            self.check_origin()
            for name in (JOURNAL, ROWS):
                self.files[name] = open(os.path.join(self.folder, name), "a+b", buffering=0)
            self.lock()
            self.drop_incomplete()
        except OSError as error:
            problem = f"cannot write to {self.folder}: {error.strerror or error}"
            raise RunError(f"{problem}. Choose another --out") from None
        bad = [pair for entry in self.journal for pair in entry["undecodable"]]
        return len(self.journal), dict(bad)

    def check_origin(self) -> None:
        """Write the origin into an empty folder. RunError: the folder has another one, or none."""
        path = os.path.join(self.folder, ORIGIN)
        if not set(os.listdir(self.folder)) - {f"{ORIGIN}.new"}:
            write_whole(path, json.dumps(self.origin).encode())
            return
        fix = "Remove it, or choose another --out"
        try:
            with open(path) as file:
                saved = json.load(file)
            before = {name: saved[name] for name in self.origin}
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            raise RunError(
                f"{self.folder}: not a folder of job.embed; expected a new one. {fix}"
            ) from None
        if differing := [name for name, value in self.origin.items() if before[name] != value]:
            name = differing[0]
            shown = MEANT.get(name, name)
            values = f"{before[name]}, now {self.origin[name]}"
            raise RunError(f"{self.folder}: features with another {shown} ({values}). {fix}")

    def lock(self) -> None:
        """RunError: another process writes to the folder. Some file systems have no locks."""
        try:
            fcntl.flock(self.files[JOURNAL], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                fix = "Wait for its end, or choose another --out"
                raise RunError(f"{self.folder}: another process writes to it. {fix}") from None

    def drop_incomplete(self) -> None:
        """Read the journal, and truncate both files after the last complete group."""
        journal, rows = self.files[JOURNAL], self.files[ROWS]
        journal.seek(0)
        end, images = 0, self.origin.get("images", sys.maxsize)
        with io.BytesIO(journal.readall()) as lines:
            for line in lines:
                entry = parse(line, images)
                if entry is None or self.read(len(self.journal), entry) is None:
                    break
                self.journal.append(entry)
                end += len(line)
        journal.truncate(end)
        rows.truncate(4 * self.width * self.count)

    @property
    def count(self) -> int:
        """Rows of all done groups."""
        return self.journal[-1]["end"] if self.journal else 0

    def read(self, group: int, entry: dict[str, Any]) -> np.ndarray | None:
        """Return the rows of a group, (n, C) float32, or None if they do not match its checksum."""
        first = self.journal[group - 1]["end"] if group else 0
        size = 4 * self.width * (entry["end"] - first)
        rows, start = self.files[ROWS].fileno(), 4 * self.width * first
        if not 0 <= size <= os.fstat(rows).st_size - start:
            return None
        content = os.pread(rows, size, start) if size else b""
        if len(content) != size or zlib.crc32(content) != entry["crc32"]:
            return None
        return np.frombuffer(content, dtype="<f4").reshape(-1, self.width)

    def append(self, rows: np.ndarray, undecodable: dict[int, str]) -> None:
        """Add the next group. rows: (n, C), without {number: problem} of undecodable images.

        RunError: the disk is full.
        """
        content = rows.astype("<f4").tobytes()
        entry = {
            "end": self.count + len(rows),
            "crc32": zlib.crc32(content),
            "undecodable": list(undecodable.items()),
        }
        try:
            write(self.files[ROWS], content)
            write(self.files[JOURNAL], (json.dumps(entry) + "\n").encode())
        except OSError as error:
            problem = f"cannot write to {self.folder}: {error.strerror or error}"
            raise RunError(
                f"{problem}. Make room, and resume with the same command", code=1
            ) from None
        self.journal.append(entry)

    def groups(self) -> Iterator[np.ndarray]:
        """Yield the rows of each group, (n, C) float32. RunError: they have changed on disk."""
        for group, entry in enumerate(self.journal):
            rows = self.read(group, entry)
            if rows is None:
                problem = f"{self.folder}/{ROWS}: the rows of group {group} have changed on disk"
                raise RunError(
                    f"{problem}. Check the disk, and resume with the same command", code=1
                )
            yield rows

    def remove(self) -> None:
        """Remove the folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Close the files, which unlocks the folder."""
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()


def parse(line: bytes, images: int) -> dict[str, Any] | None:
    """Return the entry of a journal's line, or None if it is incomplete or damaged.

    images: their number, above the number of each undecodable image.
    """
    try:
        entry = json.loads(line)
        complete = line.endswith(b"\n") and type(entry["end"]) is type(entry["crc32"]) is int
        bad = [(number, problem) for number, problem in entry["undecodable"]]
        numbered = all(type(number) is int and 0 <= number < images for number, _ in bad)
        valid = numbered and all(isinstance(problem, str) for _, problem in bad)
        return entry if complete and valid else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def write(file: io.FileIO, content: bytes) -> None:
    """Write all bytes. OSError: the disk is full."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
