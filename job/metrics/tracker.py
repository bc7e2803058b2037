"""The base of the trackers, Weights & Biases and MLflow: a thread sends curves to a server."""

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

MOST = 10_000  # messages that can wait for a slow server
PATIENCE = 60.0  # s for the last messages at the end


class Tracker(Callback):
    """A callback that sends TensorBoard's scalars to a server, at the same steps.

    A thread sends them, so a slow or unreachable server delays no step. The run's folder has the
    run's id on the server, so a resumed run continues there. It computes some steps again, but
    sends none twice.
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
        """Queue a record's scalars for the thread. Raise its error if a message failed earlier."""
        if self.failure:
            raise self.failure
        if record["kind"] == "start":
            self.an_epoch, self.losses = record["steps_an_epoch"], record["losses"]
            self.steps = record["epoch"] * self.an_epoch + record["step"]
        self.steps = record.get("steps", self.steps)
        if numbers := scalars(record, self.options["print_freq"], self.an_epoch, self.losses):
            try:
                self.queue.put_nowait((self.steps, numbers))
            except queue.Full:
                raise TimeoutError(f"{MOST} messages wait for the server") from None

    def end(self, how: str) -> None:
        """Wait until all messages are sent. TimeoutError: they are not within PATIENCE."""
        self.queue.put(how, timeout=PATIENCE)
        self.thread.join(PATIENCE)
        if self.failure:
            raise self.failure
        if self.thread.is_alive():
            raise TimeoutError(f"the last numbers were not sent within {PATIENCE:.0f} s")

    def work(self) -> None:
        """Send all messages. The last one is the cause of the run's end."""
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
        """Connect to the run `id` on the server, or to a new run with `use`."""
        raise NotImplementedError

    def send(self, steps: int, numbers: dict[str, float]) -> None:
        """Send numbers by tag. steps: the optimizer steps done."""
        raise NotImplementedError

    def finish(self, how: str) -> None:
        """Disconnect from the server. how: as in `end`."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """The run's name on the server."""
        return os.path.basename(os.path.realpath(self.folder))

    @property
    def file(self) -> str:
        """The path of the file with the run's id and the last step sent of each tag."""
        return tracker_file(self.folder, self.name)

    def use(self, id: str) -> None:
        """Save the id of a run. If it has changed, all numbers count as not sent."""
        if id != self.id:
            self.id, self.last = id, {}
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_whole(self.file, json.dumps({"id": self.id, "last": self.last}).encode())

    def read(self) -> tuple[str, dict[str, int]]:
        """Return the id and the steps in the file, or an empty id and no steps in a new run."""
        if not os.path.exists(self.file):
            return "", {}
        with open(self.file) as file:
            saved = json.load(file)
        return saved["id"], saved["last"]


def package(name: str) -> ModuleType:
    """Return a tracker's package. RunError: it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        fix = f"Run pip install '.[{name}]', or leave the option out"
        raise RunError(f"--log-to {name}: the package {name} is missing. {fix}") from None
