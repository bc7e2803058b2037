"""What Weights & Biases and MLflow have in common: curves that a thread sends to a server."""

import importlib
import json
import os
import queue
import threading
from types import ModuleType
from typing import Any

from job.errors import RunError
from job.files import write_whole
from job.metrics.callbacks import Callback, tracker_file
from job.metrics.scalars import scalars

MOST = 10_000  # messages that wait for a slow server
PATIENCE = 60.0  # s to send the last ones at the end


class Tracker(Callback):
    """A callback that sends TensorBoard's scalars elsewhere, at the same steps.

    A thread sends them: a server that is slow, or out of reach, delays no step. The run's folder
    keeps the id that the server knows the run by, and a resumed run continues there. It computes
    some steps again, but sends none twice.
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
            self.id, self.last = self.read()
            self.start()
            while not isinstance(message := self.queue.get(), str):
                self.send_new(*message)
            self.finish(message)
        except Exception as error:
            self.failure = error

    def send_new(self, steps: int, numbers: dict[str, float]) -> None:
        """Send the numbers that no earlier process of the run has sent."""
        new = {tag: number for tag, number in numbers.items() if steps > self.last.get(tag, -1)}
        if new:
            self.send(steps, new)
            self.last |= dict.fromkeys(new, steps)
            self.save()

    def start(self) -> None:
        """Connect with the server: to a new run, with `use`, or to that of `id`."""
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
    def file(self) -> str:
        """The path of the file that keeps the run's id, and the last step sent of each tag."""
        return tracker_file(self.folder, self.name)

    def use(self, id: str) -> None:
        """Keep the id of a run, of which nothing is sent if it is another than before."""
        if id != self.id:
            self.id, self.last = id, {}
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_whole(self.file, json.dumps({"id": self.id, "last": self.last}).encode())

    def read(self) -> tuple[str, dict[str, int]]:
        """Return what the file has, or no id and no tags in a new run."""
        if not os.path.exists(self.file):
            return "", {}
        with open(self.file) as file:
            found = json.load(file)
        return found["id"], found["last"]


def package(name: str) -> ModuleType:
    """Return a tracker's package. RunError: it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        fix = f"pip install '.[{name}]', or leave it out"
        raise RunError(f"--log-to {name}: the package {name} is missing: {fix}") from None
