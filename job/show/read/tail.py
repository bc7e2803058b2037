"""Files that grow while they are looked at: read by offset, and what they tell kept in bounded room."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from job.show.read.files import opened

BLOCK = 2**24  # bytes read at a time


class Reader(Protocol):
    """What gathers the meaning of a file's lines."""

    def add(self, lines: bytes) -> None:
        """Take in whole lines."""


Told = TypeVar("Told", bound=Reader)


class Follower(Generic[Told]):
    """A file that is added to, or replaced by another: only what is new of it is read.

    told: what a reader, made by `reader()`, has gathered of it. changed: when it was written last, in s since 1970; 0: never.
    """

    def __init__(self, path: Path, reader: Callable[[], Told]):
        self.path, self.reader = path, reader
        self.forget()

    def forget(self) -> None:
        """Begin at the file's beginning."""
        self.told, self.inode, self.offset, self.changed = self.reader(), -1, 0, 0.0

    def update(self) -> None:
        """Read what is new, but for a last line that is being written. RunError: the file cannot be read."""
        try:
            with opened(self.path) as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self.inode or status.st_size < self.offset:
                    self.forget()
                self.inode, self.changed = status.st_ino, status.st_mtime
                while self.offset < status.st_size:
                    file.seek(self.offset)
                    block = file.read(BLOCK)
                    whole = (
                        block.rfind(b"\n") + 1 or len(block) // BLOCK * BLOCK
                    )  # no line is as long as that
                    if not whole:
                        return
                    self.told.add(block[:whole])
                    self.offset += whole
        except FileNotFoundError:
            self.forget()


class Curve:
    """A number over the steps of a run: its means over equal stretches, at most `most`, which widen as the run grows."""

    def __init__(self, most: int = 1024):
        self.most, self.width = most, 1
        self.sums: dict[int, tuple[float, int]] = {}  # of a stretch: sum, and how many were summed

    def add(self, step: int, value: float) -> None:
        """Take in a step's value; one that is not finite does not count."""
        if not math.isfinite(value):
            return
        total, count = self.sums.get(step // self.width, (0.0, 0))
        self.sums[step // self.width] = total + value, count + 1
        while len(self.sums) > self.most:
            self.width *= 2
            narrow, self.sums = self.sums, {}
            for place, (total, count) in narrow.items():
                before = self.sums.get(place // 2, (0.0, 0))
                self.sums[place // 2] = before[0] + total, before[1] + count

    def columns(self, most: int, since: int = 0) -> list[float]:
        """The means in at most `most` columns of equal width, from a step to the last; NaN where steps are missing."""
        found = {
            place: sums for place, sums in self.sums.items() if place * self.width >= since
        } or self.sums
        if not found:
            return []
        first, last = min(found), max(found)
        shown = min(most, last - first + 1)
        sums = [(0.0, 0)] * shown
        for place, (total, count) in found.items():
            column = (place - first) * shown // (last - first + 1)
            sums[column] = sums[column][0] + total, sums[column][1] + count
        return [total / count if count else math.nan for total, count in sums]
