"""Follow files that grow: read only new lines, and keep a bounded summary of them."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from job.show.read.files import opened

BLOCK = 2**24  # bytes read at a time; longer than any line


class Summary(Protocol):
    """A summary of a file's lines."""

    def add(self, lines: bytes) -> None:
        """Add complete lines."""


Content = TypeVar("Content", bound=Summary)


class Follower(Generic[Content]):
    """A file that grows or is replaced. `update` reads only new lines.

    content: the summary of its lines, created by `empty()`.
    changed: time of the last write, seconds since 1970; 0: never.
    """

    def __init__(self, path: Path, empty: Callable[[], Content]):
        self.path, self.empty = path, empty
        self.reset()

    def reset(self) -> None:
        """Start again at the beginning of the file."""
        self.content, self.inode, self.offset, self.changed = self.empty(), -1, 0, 0.0

    def update(self) -> None:
        """Read the new complete lines. RunError: the file cannot be read."""
        try:
            with opened(self.path) as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self.inode or status.st_size < self.offset:
                    self.reset()
                self.inode, self.changed = status.st_ino, status.st_mtime
                while self.offset < status.st_size:
                    file.seek(self.offset)
                    block = file.read(BLOCK)
                    # Without a line end, skip a full block, and wait for the rest of a short one.
                    end = block.rfind(b"\n") + 1 or len(block) // BLOCK * BLOCK
                    if not end:
                        return
                    self.content.add(block[:end])
                    self.offset += end
        except FileNotFoundError:
            self.reset()


class Curve:
    """A number over a run's steps, as means over at most `most` intervals of equal width.

    The intervals widen as the run grows.
    """

    def __init__(self, most: int = 1024):
        self.most, self.width = most, 1
        self.sums: dict[int, tuple[float, int]] = {}  # {interval: (sum, number of values)}

    def add(self, step: int, value: float) -> None:
        """Add a step's value, unless it is not finite."""
        if not math.isfinite(value):
            return
        total, count = self.sums.get(step // self.width, (0.0, 0))
        self.sums[step // self.width] = total + value, count + 1
        while len(self.sums) > self.most:
            self.width *= 2
            narrow, self.sums = self.sums, {}
            for interval, (total, count) in narrow.items():
                before = self.sums.get(interval // 2, (0.0, 0))
                self.sums[interval // 2] = before[0] + total, before[1] + count

    def columns(self, most: int, since: int = 0) -> list[float]:
        """Return the means in at most `most` columns of equal width, from step `since` to the last.

        NaN where steps are missing.
        """
        recent = {
            interval: sums for interval, sums in self.sums.items() if interval * self.width >= since
        } or self.sums
        if not recent:
            return []
        first, last = min(recent), max(recent)
        shown = min(most, last - first + 1)
        sums = [(0.0, 0)] * shown
        for interval, (total, count) in recent.items():
            column = (interval - first) * shown // (last - first + 1)
            sums[column] = sums[column][0] + total, sums[column][1] + count
        return [total / count if count else math.nan for total, count in sums]
