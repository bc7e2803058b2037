"""Cases of input: a command line and its expected end."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# The smallest run: one epoch of two steps. The worker itself reads the images.
SMALL = "-a resnet18 --image-size 32 --batch-size 4 --epochs 1 --moco-k 8 --moco-dim 8".split()
SMALL += "--warmup-epochs 0 -j 0".split()
LINEAR = "--image-size 32 --batch-size 4 --epochs 1 -j 0".split()


@dataclass
class Case:
    """A command line, and texts that its error line must contain. Without texts it must work.

    `{name}` in both is replaced by the value of that name in the module's fixture `values`.
    """

    name: str
    argv: list[str]
    parts: tuple[str, ...] = ()
    program: str = "job.train"
    unprivileged: bool = False  # root can read and write every file


class Outcome(dict):
    """The end of a command, as starter.py reports it."""

    def refused(self, *parts: str) -> None:
        """Assert that it ended with exit code 2 and only a short error line that has `parts`."""
        assert self["code"] == 2, self
        assert self["stderr"].count("\n") == 1 and self["stderr"].startswith("error: "), self
        assert len(self["stderr"]) < 1100 and "Traceback" not in self["stdout"], self
        assert all(part in self["stderr"] for part in parts), (parts, self["stderr"])

    def worked(self) -> None:
        """Assert that it ended with exit code 0 and without warnings."""
        assert self["code"] == 0 and not self["stderr"], self


def check(case: Case, outcomes: dict, values: dict) -> None:
    """Assert that a case ended as expected, within a minute, and an error left no file."""
    outcome, folder = outcomes[case.name]
    assert outcome["seconds"] < 60
    if case.parts:
        outcome.refused(*(part.format(**values) for part in case.parts))
        assert os.listdir(folder) == []
    else:
        outcome.worked()


def fill(folder: Path, number: int) -> Path:
    """Write `number` images of noise into a folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        pixels = np.random.default_rng(index).integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"good{index}.png")
    return folder
