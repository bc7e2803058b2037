"""A run's output, from rank 0: log lines, records, event files and callbacks."""

import copy
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from job import output
from job.errors import RunError
from job.files import append, not_taken, sync, sync_folder, write_whole
from job.metrics import schema
from job.metrics.callbacks import Callback
from job.metrics.events import Events
from job.position import Position
from job.text import printable


class Log:
    """Log lines and records of a run.

    Until `open` names a folder, lines appear on the screen, and both wait for their files.

    speaks: whether to print and write. It is False on all ranks except 0.
    interrupt: stops the run. It is called if a callback raises KeyboardInterrupt.
    events: the event file for TensorBoard, on rank 0, if the run writes one.
    """

    def __init__(self, speaks: bool, interrupt: Callable[[], object] = lambda: None):
        self.speaks, self.interrupt = speaks, interrupt
        self.callbacks: list[Callback] = []
        self.how = "error"  # the cause of the end, until a record has another
        self.waiting: list[str] = []
        self.waiting_records: list[str] = []
        self.file: io.FileIO | None = None
        self.metrics: io.FileIO | None = None
        self.events: Events | None = None
        self.bar: tqdm | None = None
        self.failure: RunError | None = None  # of the first failed write
        self.last: dict[str, dict[str, Any]] = {}  # the newest record of each kind

    def open(
        self,
        folder: str,
        start: Position,
        options: Mapping[str, Any] = MappingProxyType({}),
        callbacks: Sequence[Callback] = (),
    ) -> int:
        """Open folder/log.txt and folder/metrics.jsonl, and return the steps recorded before.

        start: the position at which the run starts. Later records of kinds in schema.COURSE are
        dropped. options: the run's options, for the callbacks, whose `begin` is called.
        """
        if not self.speaks:
            return 0
        path = os.path.join(folder, "metrics.jsonl")
        if os.path.exists(path):
            self.last = drop_from(path, start) | self.last
        recorded = self.last.get("step", {}).get("steps")
        self.file = open(os.path.join(folder, "log.txt"), "ab", buffering=0)
        self.metrics = open(path, "ab", buffering=0)
        sync_folder(folder)
        for line in self.waiting:
            self.write(self.file, line)
        self.callbacks = list(callbacks)
        self.call(callbacks, "begin", dict(options), folder)
        for record in self.waiting_records:
            self.write_record(record)
        self.check()
        output.may_fail(self.screen_failed)
        return recorded if isinstance(recorded, int) else 0

    def screen_failed(self, error: OSError) -> None:
        """Warn once that standard output has failed. The run continues, so that it can save.

        A terminal or launcher can disappear during a run.
        """
        assert self.file
        output.may_fail(output.ignore)
        text = f"{output.problem(error)}; the run continues, and {self.file.name} has all lines"
        print(f"warning: {text}", file=sys.stderr)
        self.note(f"warning: {text}")
        self.record("warning", id="standard_output", text=text)

    def write(self, file: io.FileIO, line: str) -> None:
        """Append a line to a file. If this fails, the next `check` raises the error.

        So the error is raised where all workers receive it.
        """
        if self.failure is None:
            try:
                append(file, line)
            except RunError as error:
                self.failure = error

    def check(self) -> None:
        """RunError: a write failed."""
        if self.failure:
            raise self.failure

    def sync(self) -> None:
        """Write all lines and records to disk. RunError: the disk is full or fails."""
        self.check()
        for file in filter(None, (self.file, self.metrics)):
            try:
                sync(file.fileno())
            except OSError as error:
                raise not_taken(file, error) from None

    def line(self, text: str) -> None:
        """Print a line on the screen and write it to the log file."""
        if not self.speaks:
            return
        tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()
        self.note(text)

    def note(self, text: str) -> None:
        """Write a line only to the log file."""
        if not self.speaks:
            return
        stamped = time.strftime("%Y-%m-%d %H:%M:%S ") + printable(text)
        if self.file:
            self.write(self.file, stamped)
        else:
            self.waiting.append(stamped)

    def record(self, kind: str, line: str = "", /, **fields: Any) -> None:
        """Log a line, if given, and add a record (kinds, fields: job/metrics/schema.py)."""
        if not self.speaks:
            return
        if line:
            self.line(line)
        stamp = {"time": round(time.time(), 3)} if kind in schema.PROCESS else {}
        record = self.last[kind] = {"kind": kind, **stamp, **fields}
        if kind == "end":
            self.how = fields.get("how", self.how)
        if self.metrics:
            self.write_record(json.dumps(record))
        else:
            self.waiting_records.append(json.dumps(record))
        if self.events:
            self.events.record(record)

    def write_record(self, record: str) -> None:
        """Append a record to metrics.jsonl, and pass it to the callbacks."""
        assert self.metrics
        self.write(self.metrics, record)
        if self.callbacks:
            self.call(self.callbacks, "record", json.loads(record))

    def call(self, callbacks: Sequence[Callback], method: str, *arguments: Any) -> None:
        """Call a method of callbacks. Warn of each callback that fails, and drop it."""
        failed = []
        for callback in callbacks:
            try:
                getattr(callback, method)(*copy.deepcopy(arguments))
            except KeyboardInterrupt:
                self.interrupt()
            except Exception as error:
                self.callbacks = [each for each in self.callbacks if each is not callback]
                problem = f"{type(error).__name__}: {error}"
                failed.append(f"{type(callback).__name__}.{method}: {problem}")
        for text in failed:
            self.remark("warning", "callback", f"{text}; the run continues without this callback")

    def newest(self) -> dict[str, float]:
        """Return the newest losses and accuracies by name, and `steps`, the steps done."""
        numbers: dict[str, float] = {}
        for kind in ("validation", "knn", "step"):
            fields = self.last.get(kind, {}).items()
            numbers |= {name: value for name, value in fields if isinstance(value, int | float)}
        return {name: value for name, value in numbers.items() if name not in ("epoch", "step")}

    def remark(self, kind: str, id: str, text: str) -> None:
        """Log and record a hint, a warning, or the error that ends the run.

        id: one of those in job/metrics/schema.py.
        """
        if kind == "error":
            self.record("end", f"error: {text}", how="error", id=id, text=text, code=1)
        else:
            self.record(kind, f"{kind}: {text}", id=id, text=text)

    def progress(self, text: str, done: int, total: int, every: int) -> None:
        """Show progress: a bar on a terminal, otherwise a log line every `every` steps."""
        if not self.speaks:
            return
        if not sys.stdout.isatty():
            if done % every == 0 or done == total:
                self.line(text)
            return
        if self.bar is None or done < self.bar.n or total != self.bar.total:
            self.end_progress()
            self.bar = tqdm(
                total=total, initial=done - 1, leave=False, dynamic_ncols=True, file=sys.stdout
            )
        self.bar.set_description(text, refresh=False)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.end_progress()

    def end_progress(self) -> None:
        """Remove the bar from the terminal, if there is one."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def close(self) -> None:
        """End the callbacks and close the files."""
        self.end_progress()
        callbacks, self.callbacks = self.callbacks, []
        self.call(callbacks, "end", self.how)
        for file in (self.file, self.metrics, self.events):
            if file:
                file.close()


def drop_from(path: str, start: Position) -> dict[str, dict[str, Any]]:
    """Drop records at `start` or later, damaged lines and an incomplete last line, by one rename.

    Return the last kept record of each kind.
    """
    kept, last = [], {}
    with open(path, "rb") as file:
        for line in file:
            record = parse(line) if line.endswith(b"\n") else None
            if record is not None and stays(record, start):
                kept.append(line)
                last[schema.kind_of(record)] = record
    write_whole(path, b"".join(kept))
    return last


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line, or None if the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def stays(record: dict[str, Any], start: Position) -> bool:
    """Return whether to keep a record in a run that resumes at `start`.

    Records of kinds in schema.PROCESS stay. Other records, also of unknown kinds, stay if their
    position is before `start`. Records of unknown kinds without a position stay too, because the
    resumed run may not write them again.
    """
    kind, position = schema.kind_of(record), (record.get("epoch"), record.get("step"))
    if kind in schema.PROCESS:
        return True
    if all(isinstance(number, int) for number in position):
        return position < start
    return kind not in schema.COURSE
