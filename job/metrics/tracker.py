"""What Weights & Biases and MLflow have in common: curves that a thread sends to a server."""

import os
import queue
import threading
from typing import Any

from job.files import write_whole
from job.metrics.callbacks import Callback
from job.metrics.scalars import scalars

MOST = 10_000  # messages that wait for a slow server
PATIENCE = 60.0  # s to send the last ones at the end


class Tracker(Callback):
    """A callback that sends TensorBoard's scalars elsewhere, at the same steps.

    A thread sends them: a server that is slow, or out of reach, delays no step. The run's folder
    keeps the id that the server knows the run by, and a resumed run continues there.
    """

    name: str  # in --log-to

    def __init__(self) -> None:
        self.queue: queue.Queue[tuple[int, dict[str, float]] | str] = queue.Queue(MOST)
        self.failure: Exception | None = None
        self.steps, self.an_epoch, self.losses = 0, 1, list[str]()

    def begin(self, options: dict[str, Any], folder: str) -> None:
        """Start the thread."""
        self.options, self.folder = options, folder
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def record(self, record: dict[str, Any]) -> None:
        """Let the thread send a record's scalars. An error: an earlier message was not sent."""
        if self.failure:
            raise self.failure
        if record["kind"] == "start":
            self.an_epoch, self.losses = record["steps_an_epoch"], record["losses"]
            self.steps = record["epoch"] * self.an_epoch + record["step"]
        self.steps = record.get("steps", self.steps)
        if found := scalars(record, self.options["print_freq"], self.an_epoch, self.losses):
            try:
                self.queue.put_nowait((self.steps, found))
            except queue.Full:
                raise TimeoutError(f"{MOST} messages wait for the server") from None

    def end(self, how: str) -> None:
        """Wait until all is sent. TimeoutError: it takes too long."""
        self.queue.put(how, timeout=PATIENCE)
        self.thread.join(PATIENCE)
        if self.failure:
            raise self.failure
        if self.thread.is_alive():
            raise TimeoutError(f"the last numbers were not sent within {PATIENCE:.0f} s")

    def work(self) -> None:
        """Send all messages, the last of which says how the run ends."""
        try:
            self.start()
            while not isinstance(message := self.queue.get(), str):
                self.send(*message)
            self.finish(message)
        except Exception as error:
            self.failure = error

    def start(self) -> None:
        """Connect with the server, to a new run or to that of `saved_id`."""
        raise NotImplementedError

    def send(self, steps: int, numbers: dict[str, float]) -> None:
        """Send numbers by tag. steps: the optimizer steps done."""
        raise NotImplementedError

    def finish(self, how: str) -> None:
        """Disconnect. how: as in `end`."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """The run's name for people."""
        return os.path.basename(os.path.realpath(self.folder))

    @property
    def id_file(self) -> str:
        """The path of the file that keeps the run's id."""
        return os.path.join(self.folder, f"{self.name}.id")

    def saved_id(self) -> str:
        """Return the run's id from its folder, or "" in a new run."""
        if not os.path.exists(self.id_file):
            return ""
        with open(self.id_file) as file:
            return file.read().strip()

    def save_id(self, id: str) -> None:
        """Keep the run's id in its folder."""
        write_whole(self.id_file, f"{id}\n".encode())
