"""A case of bad input: a command line, and how it must end."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# The smallest run that there is: two steps of one epoch, images read by the worker itself.
SMALL = "-a resnet18 --image-size 32 --batch-size 4 --epochs 1 --moco-k 8 --moco-dim 8 --warmup-epochs 0 -j 0".split()
LINEAR = "--image-size 32 --batch-size 4 --epochs 1 -j 0".split()


@dataclass
class Case:
    """A command line, and parts of the one line with which it is refused; without any it works.

    {names} in both stand for what the module's fixture `places` gives.
    """

    name: str
    argv: list[str]
    parts: tuple[str, ...] = ()
    program: str = "job.train"
    unprivileged: bool = False  # root would be let in everywhere


class Outcome(dict):
    """How a command ended, as starter.py tells it."""

    def refused(self, *parts: str) -> None:
        """It ended in one line with `parts` in it, alone on the standard error and not too long, and with exit code 2."""
        assert self["code"] == 2, self
        assert self["warned"].count("\n") == 1 and self["warned"].startswith("error: "), self
        assert len(self["warned"]) < 1100 and "Traceback" not in self["said"], self
        assert all(part in self["warned"] for part in parts), (parts, self["warned"])

    def worked(self) -> None:
        """It came to its end, and had nothing to warn of."""
        assert self["code"] == 0 and not self["warned"], self


def check(case: Case, outcomes: dict, places: dict) -> None:
    """A case ended as it should, at once, and a refusal left nothing behind."""
    outcome, folder = outcomes[case.name]
    assert outcome["seconds"] < 60
    if case.parts:
        outcome.refused(*(part.format(**places) for part in case.parts))
        assert os.listdir(folder) == []
    else:
        outcome.worked()


def fill(folder: Path, number: int) -> Path:
    """Write images of noise into a folder; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(number):
        pixels = np.random.default_rng(place).integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"good{place}.png")
    return folder
