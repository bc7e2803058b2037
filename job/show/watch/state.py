"""How far a run is, from the files of its folder as they grow: its numbers, what its log says, its state, the time left."""

import collections
import contextlib
import dataclasses
import re
import time
from pathlib import Path
from typing import Any

from job.errors import RunError
from job.schedules import parse_refresh
from job.show.read import history
from job.show.read.tail import Curve, Follower

RECENT = 50  # steps that "now" is the mean of
SAMPLE = 4000  # steps read of a block of lines
MOST_EPOCHS = 10**6  # as --epochs allows
START_PATIENCE = 900.0  # s without news before the first step; by then a run that stands still has ended itself
WORKERS = re.compile(r"(\d{1,9}) workers on \d+ nodes?, .*")
SIZE = re.compile(r"\d+ images, (\d{1,9}) steps an epoch, (\d{1,9}) images a worker and step")
TEACHER = re.compile(r"teacher (\S+) from .* \(layout: .*")
NUMBER = r"(\d{1,15}(?:\.\d{1,15})?)"
MEAN = re.compile(rf"epoch \d+ mean: .* {NUMBER} images/s, data wait .*")
REFRESH = re.compile(rf"refresh before epoch \d+ on \d+ images: measuring {NUMBER} s, gathering {NUMBER} s, solving {NUMBER} s")
ENDS = ("stopped by a signal", "error: ", "done: ", "nothing to do: ")


class Steps:
    """What metrics.jsonl tells. Of a large part that is new at once, a sample of the steps is read, and all else."""

    def __init__(self) -> None:
        self.recent: collections.deque[dict[str, float]] = collections.deque(maxlen=RECENT)
        self.count, self.seconds, self.damaged, self.refreshes = 0, 0.0, 0, 0  # seconds: sum of 1 / images_per_s
        self.loss, self.accuracy, self.scores = Curve(), Curve(), Curve()  # scores: of k-NN or validation
        self.refresh: dict[int, dict[str, float]] = {}  # {stage: record} of the last one
        self.signs: dict[str, float] = {}
        self.score: dict[str, float] = {}
        self.changes: list[dict[str, float]] = []  # of the batch size or the steps of an epoch
        self.best = 0.0

    def add(self, lines: bytes) -> None:
        """Take in whole lines."""
        split = lines.splitlines()
        stride = max(1, len(split) // SAMPLE)
        for at, line in enumerate(split):
            if at % stride and at < len(split) - 1 and b'"loss"' in line:
                continue
            found = history.read_record(line)
            if not found:
                self.damaged += 1
                continue
            kind, record = found
            if kind == "steps":
                self.add_step(record, stride)
            elif kind == "refreshes":
                self.add_refresh(record)
            elif kind in ("knn", "validation"):
                self.score = record
                score = record.get("knn", record.get("val_top1", 0.0))
                self.scores.add(int(record["epoch"]), score)
                self.best = max(self.best, score)
            elif kind == "signs":
                self.signs = record
            elif kind == "changes":
                self.changes.append(record)

    def add_step(self, record: dict[str, float], weight: int) -> None:
        """Take in a step that stands for `weight` of them."""
        self.recent.append(record)
        self.loss.add(int(record["steps"]), record["loss"])
        self.accuracy.add(int(record["steps"]), record.get("accuracy", record.get("top1", float("nan"))))
        self.count += weight
        self.seconds += weight / max(record.get("images_per_s", 0.0), 1e-9)

    def add_refresh(self, record: dict[str, float]) -> None:
        """Take in one stage of a refresh."""
        if any(other.get("epoch") != record.get("epoch") for other in self.refresh.values()) or not self.refresh:
            self.refresh = {}
            self.refreshes += 1
        self.refresh[int(record["stage"])] = record

    def now(self, name: str) -> float:
        """The mean of a number over the recent steps: the last RECENT, but no more than a quarter of all. NaN: none has it."""
        recent = list(self.recent)[-max(1, min(RECENT, self.count // 4)) :]
        values = [record[name] for record in recent if name in record]
        return sum(values) / len(values) if values else float("nan")


class Log:
    """What log.txt tells."""

    def __init__(self) -> None:
        self.resumed = self.workers = self.steps = self.share = 0  # steps: of an epoch; share: images a worker and step
        self.teacher = ""
        self.last: tuple[float, str] = (0.0, "")
        self.end = ""  # the line that ended the last try
        self.warnings: dict[str, tuple[float, str]] = {}  # by their text without numbers; the newest last
        self.refresh = self.since_mean = self.between = 0.0  # s: of the last refresh, of those since an epoch's end, of all else
        self.epochs, self.mean_at = 0, 0.0  # whose `between` is the sum

    def add(self, lines: bytes) -> None:
        """Take in whole lines."""
        for when, text in history.read_lines(lines.decode(errors="backslashreplace")):
            self.last = (when, text)
            if text.startswith(("warning: ", "error: ", "hint: ")):
                key = re.sub(r"\d+", "", text)
                self.warnings.pop(key, None)
                self.warnings[key] = (when, text)
                self.warnings = dict(list(self.warnings.items())[-8:])
            if text.startswith(ENDS):
                self.end = text
            elif match := WORKERS.fullmatch(text):
                self.workers, self.end, self.mean_at = int(match[1]), "", 0.0
                self.warnings = {key: told for key, told in self.warnings.items() if not key.startswith("error: ")}
            elif text.startswith("resuming from "):
                self.resumed += 1
            elif match := SIZE.fullmatch(text):
                self.steps, self.share = int(match[1]), int(match[2])
            elif match := TEACHER.fullmatch(text):
                self.teacher = match[1]
            elif match := REFRESH.fullmatch(text):
                self.refresh = sum(map(float, match.groups()))
                self.since_mean += self.refresh
            elif match := MEAN.fullmatch(text):
                self.end_epoch(when, float(match[1]))

    def end_epoch(self, when: float, images_per_s: float) -> None:
        """Note what an epoch took beside its steps and its refresh: saving, k-NN, validation."""
        if self.mean_at and images_per_s:
            steps = self.steps * self.share * self.workers / images_per_s
            self.between += max(0.0, when - self.mean_at - steps - self.since_mean)
            self.epochs += 1
        self.mean_at, self.since_mean = when, 0.0


@dataclasses.dataclass
class Progress:
    """A run whose folder is looked at again and again."""

    folder: Path

    def __post_init__(self) -> None:
        self.metrics = Follower(self.folder / "metrics.jsonl", Steps)
        self.texts = Follower(self.folder / "log.txt", Log)
        self.options: dict[str, Any] = {}
        self.written = -1.0  # when config.yaml was, as it was read
        self.complete: str | None = None
        self.steps, self.log, self.known = self.metrics.told, self.texts.told, False  # known: whether it was read

    def update(self) -> None:
        """Read what is new. RunError: there is no run, or a file that cannot be read."""
        if (written := self.begun()) != self.written:
            self.options, self.written = history.read(self.folder / "config.yaml", history.read_options, {}), written
        self.complete = history.read(self.folder / "complete", lambda text: text.strip() or "done", None)
        self.metrics.update()
        self.texts.update()
        self.steps, self.log = self.metrics.told, self.texts.told
        if not (self.options or self.steps.count or self.log.last[1]):
            raise RunError(
                f"{self.folder} holds no run: config.yaml, metrics.jsonl and log.txt are missing, empty or damaged; "
                "give a run's --out, or the log of its SLURM job"
            )
        self.known = True

    def option(self, name: str) -> int:
        """A whole number among the options, or 0."""
        value = self.options.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

    @property
    def place(self) -> tuple[int, int, int]:
        """The epoch, how many of its steps are done, and how many it has (0: not known)."""
        if not self.steps.recent:
            return 0, 0, self.log.steps
        last, steps = self.steps.recent[-1], self.log.steps
        epoch, step = int(last["epoch"]), int(last["step"]) + 1
        for change in self.steps.changes[-1:]:
            steps = int(change["steps_an_epoch"])
            if epoch < change["epoch"]:  # no step since the run was resumed
                return int(change["epoch"]), 0, steps
        return epoch, step, steps or (int(last["steps"]) - step) // epoch if epoch else steps

    @property
    def filled(self) -> int:
        """After how many steps keys have filled the queue: before, the loss is near 0. 0: the run is not far beyond that."""
        batch = self.steps.changes[0]["batch_size_before"] if self.steps.changes else self.option("batch_size")
        steps = self.option("moco_k") // max(1, int(batch))
        return steps if self.steps.recent and self.steps.recent[-1]["steps"] > 2 * steps else 0

    @property
    def share(self) -> float:
        """The share of all steps that are done, 0 to 1."""
        epoch, step, steps = self.place
        share = (epoch + (step / steps if steps else 0)) / (self.option("epochs") or 1) if self.option("epochs") else 0.0
        return min(1.0, max(0.0, share))  # damaged records may have any epoch

    @property
    def step_seconds(self) -> float:
        """Seconds of a recent step."""
        recent = [1 / max(record.get("images_per_s", 0.0), 1e-9) for record in self.steps.recent]
        return (self.option("batch_size") or self.log.share * self.log.workers) * sum(recent) / max(1, len(recent))

    def quiet(self) -> float:
        """The seconds since the run last wrote something."""
        return max(0.0, time.time() - max(self.metrics.changed, self.texts.changed, self.begun()))

    def begun(self) -> float:
        """When config.yaml was written."""
        with contextlib.suppress(OSError):
            return (self.folder / "config.yaml").stat().st_mtime
        return 0.0

    def ago(self, when: float) -> float:
        """How many seconds ago a time of the log was; its clock may be another machine's."""
        return max(0.0, self.log.last[0] - when + time.time() - self.texts.changed)

    @property
    def between(self) -> float:
        """Seconds that an epoch takes beside its steps and refresh."""
        return self.log.between / max(1, self.log.epochs)

    def patience(self) -> float:
        """The seconds without news after which something may be wrong, by the run's own pace."""
        if not self.steps.recent:
            return START_PATIENCE
        return 120 + 10 * self.step_seconds + 2 * (self.log.refresh + self.between)

    def state(self) -> str:
        """Return done, stopped, error, stale, starting or running."""
        if self.complete:
            return "done"
        if self.log.end:
            return "error" if self.log.end.startswith("error") else "stopped" if self.log.end.startswith("stopped") else "done"
        if self.quiet() > self.patience():
            return "stale"
        return "running" if self.steps.recent else "starting"

    def left(self) -> float | None:
        """The seconds to the run's end: its steps, refreshes and what else comes between epochs; None: not known."""
        epoch, step, steps = self.place
        epochs = self.option("epochs")
        if not (epochs and steps and self.steps.recent):
            return None
        refreshes = 0
        if self.options.get("teacher"):
            with contextlib.suppress(RunError, TypeError):
                at = parse_refresh(self.options.get("refresh_epochs", "never"))
                refreshes = sum(map(at, range(epoch + 1, min(epochs, epoch + MOST_EPOCHS))))
        seconds = max(0, (epochs - epoch) * steps - step) * self.step_seconds
        return max(0.0, seconds + refreshes * self.log.refresh + (epochs - epoch) * self.between - self.quiet())

    def checkpoint(self) -> tuple[str, float, int] | None:
        """The newest checkpoint's name, age in seconds, and bytes."""
        for path in (*reversed(history.find_checkpoints(self.folder)), self.folder / "last.pth.tar"):
            with contextlib.suppress(OSError):
                status = path.stat()
                return path.name, max(0.0, time.time() - status.st_mtime), status.st_size
        return None
