"""Damage a run's newest checkpoint. The previous one must be loaded, and both be logged."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from job.errors import RunError
from job.checkpoints.folder import Checkpoints


def damages(
    reference: Path, folder: Path, cuts: int, flips: int, generator: random.Random
) -> Iterator[tuple[str, str]]:
    """Copy the newest checkpoints of the run in `reference` to `folder`, and damage the last.

    There is one damage at a time: first `flips` flipped bits, then `cuts` cuts. Yield for each
    ("bit flipped" or "cut short", error). The error is "" if the previous checkpoint was loaded.
    """
    before, newest = (Path(path) for path in Checkpoints(str(reference), 1).paths()[-2:])
    folder.mkdir()
    shutil.copyfile(before, folder / before.name)
    copy = folder / newest.name
    shutil.copyfile(newest, copy)
    size = copy.stat().st_size
    for _ in range(flips):
        offset, bit = generator.randrange(size), generator.randrange(8)
        flip(copy, offset, bit)
        error = load_error(folder, copy, before.name)
        yield "bit flipped", error and f"bit {bit} of byte {offset}: {error}"
        flip(copy, offset, bit)
    lengths = [0, size - 1, *(generator.randrange(size) for _ in range(cuts - 2))]
    for length in sorted(lengths, reverse=True):
        os.truncate(copy, length)
        error = load_error(folder, copy, before.name)
        yield "cut short", error and f"cut to {length} of {size} bytes: {error}"


def flip(path: Path, offset: int, bit: int) -> None:
    """Flip a bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1 << bit]))


def load_error(folder: Path, newest: Path, before: str) -> str:
    """Return "" if `before` is loaded and the log names both checkpoints, else the error."""
    lines = []
    try:
        content = Checkpoints(str(folder), 1).newest(lines.append)
    except RunError as error:
        return str(error)
    if f"checkpoint_{content['epoch']:04d}_{content['step']:06d}.pth.tar" != before:
        return "loaded silently"
    right = lines[0].startswith(f"skipped: {newest}") and lines[1:] == [
        f"resuming from {folder / before}"
    ]
    return "" if right else f"not logged: {lines}"
