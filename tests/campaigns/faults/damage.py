"""A run's newest checkpoint, cut short or with a bit flipped: the one before is to be used, and that to be said."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from job.errors import RunError
from job.checkpoints.folder import Checkpoints


def damages(
    whole: Path, folder: Path, cuts: int, flips: int, generator: random.Random
) -> Iterator[tuple[str, str]]:
    """Damage the newest checkpoint of the run in `whole`, in a copy in `folder`, in `cuts` and `flips` ways, one at a time.

    Yields for each ("cut short" or "bit flipped", what went wrong), the second empty where nothing did.
    """
    before, newest = (Path(path) for path in Checkpoints(str(whole), 1).paths()[-2:])
    folder.mkdir()
    shutil.copyfile(before, folder / before.name)
    copy = folder / newest.name
    shutil.copyfile(newest, copy)
    size = copy.stat().st_size
    for _ in range(flips):
        place, bit = generator.randrange(size), generator.randrange(8)
        flip(copy, place, bit)
        yield (
            "bit flipped",
            (wrong := passed_over(folder, copy, before.name))
            and f"bit {bit} of byte {place}: {wrong}",
        )
        flip(copy, place, bit)
    for length in sorted(
        [0, size - 1, *(generator.randrange(size) for _ in range(cuts - 2))], reverse=True
    ):
        os.truncate(copy, length)
        yield (
            "cut short",
            (wrong := passed_over(folder, copy, before.name))
            and f"cut to {length} of {size} bytes: {wrong}",
        )


def flip(path: Path, place: int, bit: int) -> None:
    """Flip a bit of a file in place."""
    with open(path, "r+b") as file:
        file.seek(place)
        value = file.read(1)[0]
        file.seek(place)
        file.write(bytes([value ^ 1 << bit]))


def passed_over(folder: Path, newest: Path, before: str) -> str:
    """What is wrong, if not the one before is taken and both are said."""
    said = []
    try:
        content = Checkpoints(str(folder), 1).newest(said.append)
    except RunError as error:
        return str(error)
    if f"checkpoint_{content['epoch']:04d}_{content['step']:06d}.pth.tar" != before:
        return "loaded silently"
    right = said[0].startswith(f"skipped: {newest}") and said[1:] == [
        f"resuming from {folder / before}"
    ]
    return "" if right else f"not said: {said}"
