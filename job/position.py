"""Positions in a run, and the count of its optimizer steps over changes of the batch."""

from dataclasses import dataclass
from typing import NamedTuple


class Position(NamedTuple):
    """Epochs done, and steps done in the next one. Or an epoch and its step, from 0."""

    epoch: int
    step: int


START = Position(0, 0)


@dataclass(frozen=True)
class Count:
    """The number of optimizer steps since a run's first one.

    It continues if a resume changes the number of steps in an epoch.

    an_epoch: steps of an epoch. offset: difference from a run with `an_epoch` steps in all epochs.
    """

    an_epoch: int
    offset: int = 0

    def at(self, epoch: int, step: int) -> int:
        """Return the number of steps before `step` of `epoch`, both counted from 0."""
        return self.offset + epoch * self.an_epoch + step


def resumed(saved: dict, an_epoch: int) -> Count:
    """Return the count of a run that resumes from a checkpoint with `an_epoch` steps an epoch."""
    epoch, step = saved["epoch"], saved["step"]
    # Older checkpoints do not have "steps".
    done = saved.get("steps", epoch * steps_of(saved) + step)
    return Count(an_epoch, done - epoch * an_epoch - step)


def steps_of(saved: dict) -> int:
    """Return the steps of an epoch in the run that saved a checkpoint."""
    return saved["images"] // saved["config"]["batch_size"]


def change(saved: dict, batch_size: int, an_epoch: int) -> dict[str, int]:
    """Return the record of a resume that changes the batch size or the steps of an epoch, or {}."""
    before = {"batch_size": saved["config"]["batch_size"], "steps_an_epoch": steps_of(saved)}
    now = {"batch_size": batch_size, "steps_an_epoch": an_epoch}
    if now == before:
        return {}
    position = {"epoch": saved["epoch"], "step": saved["step"]}
    return position | now | {f"{name}_before": value for name, value in before.items()}
