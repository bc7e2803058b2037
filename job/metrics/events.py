"""Event files, which TensorBoard shows: a run's numbers, histograms and pictures over its steps; from rank 0 alone."""

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from job.errors import RunError
from job.metrics.scalars import scalars
from job.position import Count, Position

BINS = 64  # of a histogram
# Group 1: s since 1970, by the clock of the node that wrote the file.
STAMP = re.compile(r"events\.out\.tfevents\.(\d+(?:\.\d{6})?)\.")


def require() -> None:
    """RunError: the package that writes event files is not installed. It comes late, as the others need it nowhere."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise RunError(
            "--tensorboard needs the package tensorboard, which is not installed: pip install '.[tensorboard]', or leave it out"
        ) from None


class Events:
    """An event file in a run's folder. They are for the eyes: on a disk that does not take more, the run goes on without.

    The place of all that is written is how many steps were done before it.

    start: the (epoch, step) that the run starts at; what an earlier process wrote from there on, TensorBoard no longer shows.
    every: of so many steps the numbers of one are shown, and those of an epoch's last.
    losses: names of the framework's losses. warn: prints a warning.
    """

    def __init__(
        self,
        folder: str,
        start: Position,
        count: Count,
        every: int,
        losses: Sequence[str],
        warn: Callable[[str], None],
    ):
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from torch.utils.tensorboard import RecordWriter

        self.count, self.every, self.losses, self.warn = count, every, losses, warn
        folder = os.path.join(folder, "tensorboard")
        os.makedirs(folder, exist_ok=True)
        stamps = [float(found[1]) for name in os.listdir(folder) if (found := STAMP.match(name))]
        # TensorBoard reads files in the order of their names: after those of a node whose clock is ahead, too.
        stamp = max([time.time(), *(stamp + 1e-3 for stamp in stamps)])
        name = f"events.out.tfevents.{stamp:.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = open(os.path.join(folder, name), "wb")
        self.writer = RecordWriter(self.file)
        self.write(Position(0, 0), file_version="brain.Event:2")
        # A run that resumes after an epoch's last step does not do that step again.
        again = start if start[1] < count.an_epoch else Position(start[0] + 1, 0)
        self.write(again, session_log=SessionLog(status=SessionLog.START))

    def record(self, numbers: Mapping[str, Any]) -> None:
        """Show the numbers of a record of metrics.jsonl under its kind's tag and their own names, and the ratio of the losses."""
        if shown := scalars(numbers, self.every, self.count.an_epoch, self.losses):
            position = Position(int(numbers["epoch"]), int(numbers["step"]))
            values = [{"tag": tag, "simple_value": number} for tag, number in shown.items()]
            self.show(position, *values)

    def histogram(self, tag: str, place: Position, values: np.ndarray) -> None:
        """Show how values of any shape are distributed; those that are not finite do not count."""
        from torch.utils.tensorboard.summary import histogram

        finite = values[np.isfinite(values)]
        if finite.size:
            self.write(place, summary=histogram(tag, finite, bins=BINS))

    def picture(self, tag: str, place: Position, pixels: np.ndarray) -> None:
        """Show a picture, (H, W, 3) uint8."""
        from torch.utils.tensorboard.summary import image

        self.write(place, summary=image(tag, pixels, dataformats="HWC"))

    def show(self, place: Position, *values: dict[str, Any]) -> None:
        """Write values that belong together as one event."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.write(place, summary=Summary(value=[Summary.Value(**value) for value in values]))

    def write(self, place: Position, **what: Any) -> None:
        """Write an event that belongs to (epoch, step) `place`; what follows an epoch's last step belongs to that."""
        from tensorboard.compat.proto.event_pb2 import Event

        if self.file.closed:
            return
        epoch, step = place
        step = min(step, self.count.an_epoch - 1)
        event = Event(wall_time=time.time(), step=self.count.at(epoch, step), **what)
        try:
            self.writer.write(event.SerializeToString())
            self.file.flush()
        except OSError as error:
            self.close()
            self.warn(
                f"cannot write to {self.file.name}: {error.strerror or error}; the run goes on, and TensorBoard shows "
                "no more of it until it is resumed"
            )

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # what it still holds finds no room either
            self.file.close()
