"""Event files of TensorBoard, from rank 0: a run's numbers, histograms and pictures."""

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
# Group 1: seconds since 1970, by the clock of the node that wrote the file.
STAMP = re.compile(r"events\.out\.tfevents\.(\d+(?:\.\d{6})?)\.")


def require() -> None:
    """RunError: the package tensorboard is missing. Only --tensorboard imports it."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise RunError(
            "--tensorboard: the package tensorboard is missing. Run pip install '.[tensorboard]', "
            "or leave the option out"
        ) from None


class Events:
    """An event file in a run's folder. If the disk is full, the run continues without it.

    An event's step is the number of optimizer steps done before it.

    start: the position at which the run starts. TensorBoard hides later events of earlier
    processes.
    every: show every so many steps' numbers, and those of an epoch's last step.
    losses: names of the framework's losses. warn: logs a warning.
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
        stamps = [float(match[1]) for name in os.listdir(folder) if (match := STAMP.match(name))]
        # TensorBoard reads files in the order of their names. So this name must follow those of a
        # node whose clock is ahead.
        stamp = max([time.time(), *(stamp + 1e-3 for stamp in stamps)])
        name = f"events.out.tfevents.{stamp:.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = open(os.path.join(folder, name), "wb")
        self.writer = RecordWriter(self.file)
        self.write(Position(0, 0), file_version="brain.Event:2")
        # A run that resumes after an epoch's last step does not repeat that step.
        first = start if start[1] < count.an_epoch else Position(start[0] + 1, 0)
        self.write(first, session_log=SessionLog(status=SessionLog.START))

    def record(self, numbers: Mapping[str, Any]) -> None:
        """Write a record's numbers under the tags of `scalars`."""
        if shown := scalars(numbers, self.every, self.count.an_epoch, self.losses):
            position = Position(int(numbers["epoch"]), int(numbers["step"]))
            values = [{"tag": tag, "simple_value": number} for tag, number in shown.items()]
            self.show(position, *values)

    def histogram(self, tag: str, position: Position, values: np.ndarray) -> None:
        """Write the distribution of values of any shape, without those that are not finite."""
        from torch.utils.tensorboard.summary import histogram

        finite = values[np.isfinite(values)]
        if finite.size:
            self.write(position, summary=histogram(tag, finite, bins=BINS))

    def picture(self, tag: str, position: Position, pixels: np.ndarray) -> None:
        """Write a picture, (H, W, 3) uint8."""
        from torch.utils.tensorboard.summary import image

        self.write(position, summary=image(tag, pixels, dataformats="HWC"))

    def show(self, position: Position, *values: dict[str, Any]) -> None:
        """Write values as one event."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.write(position, summary=Summary(value=[Summary.Value(**value) for value in values]))

    def write(self, position: Position, **fields: Any) -> None:
        """Write an event. A position after an epoch's last step counts as that step."""
        from tensorboard.compat.proto.event_pb2 import Event

        if self.file.closed:
            return
        epoch, step = position
        step = min(step, self.count.an_epoch - 1)
        event = Event(wall_time=time.time(), step=self.count.at(epoch, step), **fields)
        try:
            self.writer.write(event.SerializeToString())
            self.file.flush()
        except OSError as error:
            self.close()
            self.warn(
                f"cannot write to {self.file.name}: {error.strerror or error}. The run continues "
                "without event files until it is resumed"
            )

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # its buffer does not fit on the full disk either
            self.file.close()
