"""A run's state, position and time left, from its records as they grow."""

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

RECENT = 50  # steps of a recent mean
SAMPLE = 4000  # steps read in a block of lines
MOST_EPOCHS = 10**6  # as --epochs allows
# s without a write before the first step; a run that hangs ends itself sooner.
START_PATIENCE = 900.0
MOST_WARNINGS, MOST_DISTILLERS = 8, 8
SECONDS = ("measuring", "gathering", "solving")  # of a refresh


class Records:
    """A summary of metrics.jsonl. Of many new steps, it reads a sample.

    count: steps done, estimated from the sample. seconds: sum of 1 / images_per_s over them.
    scores: k-NN or validation accuracies. refresh: {distiller: {stage: record}} of its last one.
    start, options: of the last process. end: how it ended, or "".
    warnings: {kind and id: (time, text)}, newest last.
    between: s of all saves at an epoch's end, k-NN accuracies and validations.
    """

    def __init__(self) -> None:
        self.recent: collections.deque[dict[str, float]] = collections.deque(maxlen=RECENT)
        self.count, self.seconds, self.damaged, self.refreshes = 0, 0.0, 0, 0
        self.loss, self.accuracy, self.scores = Curve(), Curve(), Curve()
        self.refresh: dict[str, dict[int, dict[str, Any]]] = {}
        self.refreshed = -1  # epoch of the last refresh
        self.signs: dict[str, float] = {}
        self.score: dict[str, float] = {}
        self.changes: list[dict[str, float]] = []  # of the batch size or the steps of an epoch
        self.best = 0.0
        self.start: dict[str, Any] = {}
        self.options: dict[str, Any] = {}
        self.teacher, self.end, self.resumed = "", "", 0
        self.warnings: dict[str, tuple[float, str]] = {}
        self.between = 0.0

    def add(self, lines: bytes) -> None:
        """Add complete lines."""
        split = lines.splitlines()
        stride = max(1, len(split) // SAMPLE)
        for at, line in enumerate(split):
            if at % stride and at < len(split) - 1 and b'"loss"' in line:
                continue
            self.add_record(history.read_record(line), stride)

    def add_record(self, parsed: tuple[str, dict[str, Any]] | None, weight: int) -> None:
        """Add a (kind, record). None: a damaged line. A step counts as `weight` steps."""
        match parsed:
            case None:
                self.damaged += 1
            case "step", record:
                self.add_step(record, weight)
            case "refresh", record:
                self.add_refresh(record)
            case "knn" | "validation", record:
                self.add_score(record)
            case "collapse", record:
                self.signs = record
            case "change", record:
                self.changes.append(record)
            case "teacher", record:
                self.teacher = record["arch"]
            case "start", record:
                self.start, self.options, self.end = record, history.options_of(record), ""
                self.warnings = {
                    key: shown
                    for key, shown in self.warnings.items()
                    if not key.startswith("error: ")
                }
            case "resumed", _:
                self.resumed += 1
            case "saved", record if record["step"] == 0:
                self.between += record["seconds"]
            case "end", record:
                self.end = record["how"]
        if parsed and (text := history.warning_of(*parsed)):
            kind, id = text.partition(": ")[0], parsed[1].get("id")
            key = f"{kind}: {id}"[: history.LONGEST_LINE] if id else re.sub(r"\d+", "", text)
            self.warnings.pop(key, None)
            self.warnings[key] = (parsed[1]["time"], text)
            self.warnings = dict(list(self.warnings.items())[-MOST_WARNINGS:])

    def add_step(self, record: dict[str, float], weight: int) -> None:
        """Add a step that counts as `weight` steps."""
        self.recent.append(record)
        self.loss.add(int(record["steps"]), record["loss"])
        self.accuracy.add(
            int(record["steps"]), record.get("accuracy", record.get("top1", float("nan")))
        )
        self.count += weight
        self.seconds += weight / max(record.get("images_per_s", 0.0), 1e-9)

    def add_refresh(self, record: dict[str, Any]) -> None:
        """Add one stage of a distiller's refresh. All stages of an epoch are one refresh."""
        epoch, distiller = record["epoch"], record["distiller"]
        if epoch != self.refreshed:
            self.refreshed = epoch
            self.refreshes += 1
        stages = self.refresh.get(distiller, {})
        if stages or len(self.refresh) < MOST_DISTILLERS:
            same = {stage: other for stage, other in stages.items() if other["epoch"] == epoch}
            self.refresh[distiller] = same | {record["stage"]: record}

    def add_score(self, record: dict[str, float]) -> None:
        """Add an accuracy of k-NN or of a validation."""
        score = record.get("knn", record.get("val_top1", 0.0))
        self.score = record
        self.scores.add(int(record["epoch"]), score)
        self.best = max(self.best, score)
        self.between += record.get("knn_seconds", record.get("val_seconds", 0.0))

    @property
    def refresh_seconds(self) -> float:
        """Seconds of the last refresh of all distillers. Each record has those of all stages."""
        first = [next(iter(stages.values())) for stages in self.refresh.values()]
        last = [record for record in first if record["epoch"] == self.refreshed]
        return sum(record.get(name, 0.0) for record in last for name in SECONDS)

    def recent_mean(self, name: str) -> float:
        """Return the mean of a number over recent steps, NaN if they lack it.

        These are the last RECENT steps, or the last quarter of all steps if that is fewer.
        """
        recent = list(self.recent)[-max(1, min(RECENT, self.count // 4)) :]
        values = [record[name] for record in recent if name in record]
        return sum(values) / len(values) if values else float("nan")


class LastLine:
    """The last line of log.txt, without its time."""

    def __init__(self) -> None:
        self.text = ""

    def add(self, lines: bytes) -> None:
        """Add complete lines."""
        for _, text in history.read_lines(
            lines[-history.LONGEST_RECORD :].decode(errors="backslashreplace")
        )[-1:]:
            self.text = text


@dataclasses.dataclass
class Progress:
    """A run whose folder is read repeatedly.

    known: whether a read has succeeded. config_changed: time of the config.yaml that was read.
    """

    folder: Path

    def __post_init__(self) -> None:
        self.metrics = Follower(self.folder / "metrics.jsonl", Records)
        self.log = Follower(self.folder / "log.txt", LastLine)
        self.options: dict[str, Any] = {}
        self.config_changed = -1.0
        self.complete: str | None = None
        self.records, self.known = self.metrics.content, False

    def update(self) -> None:
        """Read new records. RunError: there is no run, or a file is unreadable."""
        self.complete = history.read(
            self.folder / "complete", lambda text: text.strip() or "done", None
        )
        self.metrics.update()
        self.records = self.metrics.content
        if self.records.start:
            self.options = self.records.options
        elif (changed := self.changed("config.yaml")) != self.config_changed:
            self.options = history.read(self.folder / "config.yaml", history.read_options, {})
            self.config_changed = changed
        if not (self.options or self.records.count):
            raise RunError(
                f"{self.folder} holds no run: config.yaml and metrics.jsonl are missing, empty or "
                "damaged. Give a run's --out, or the log of its SLURM job"
            )
        self.known = True

    def option(self, name: str) -> int:
        """Return an option that is a positive integer, or 0."""
        value = self.options.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

    @property
    def position(self) -> tuple[int, int, int]:
        """The epoch, its steps done, and all its steps (0: unknown)."""
        start = self.records.start
        steps = start.get("steps_an_epoch", 0)
        if not self.records.recent:
            return start.get("epoch", 0), start.get("step", 0), steps
        last = self.records.recent[-1]
        epoch, step = int(last["epoch"]), int(last["step"]) + 1
        for change in self.records.changes[-1:]:
            steps = int(change["steps_an_epoch"])
            if epoch < change["epoch"]:  # no step since the run was resumed
                return int(change["epoch"]), 0, steps
        # Earlier versions do not record the steps of an epoch: use the epochs before, or the end.
        derived = (int(last["steps"]) - step) // epoch if epoch else step if self.complete else 0
        return epoch, step, steps or derived

    @property
    def filled(self) -> int:
        """The steps in which keys fill the queue: the loss is near 0 then.

        0: the run has no queue, or fewer than twice as many steps.
        """
        if not self.records.recent or "contrastive" not in self.records.recent[-1]:
            return 0
        batch = (
            self.records.changes[0]["batch_size_before"]
            if self.records.changes
            else self.option("batch_size")
        )
        steps = self.option("moco_k") // max(1, int(batch))
        return steps if self.records.recent[-1]["steps"] > 2 * steps else 0

    @property
    def fraction(self) -> float:
        """The fraction of all steps that are done, 0 to 1."""
        epoch, step, steps = self.position
        epochs = self.option("epochs")
        fraction = (epoch + (step / steps if steps else 0)) / epochs if epochs else 0.0
        return min(1.0, max(0.0, fraction))  # damaged records may have any epoch

    @property
    def step_seconds(self) -> float:
        """The mean seconds of recent steps."""
        recent = [1 / max(record.get("images_per_s", 0.0), 1e-9) for record in self.records.recent]
        return self.option("batch_size") * sum(recent) / max(1, len(recent))

    def quiet(self) -> float:
        """Return the seconds since the run's last write."""
        return max(
            0.0,
            time.time()
            - max(self.metrics.changed, self.changed("log.txt"), self.changed("config.yaml")),
        )

    def changed(self, name: str) -> float:
        """Return the time of a file's last write, seconds since 1970; 0 if it is missing."""
        with contextlib.suppress(OSError):
            return (self.folder / name).stat().st_mtime
        return 0.0

    def last_line(self) -> str:
        """Return the last line of log.txt, or "" if there is none."""
        with contextlib.suppress(RunError):
            self.log.update()
        return self.log.content.text

    @property
    def between(self) -> float:
        """The seconds of an epoch in addition to its steps and refresh."""
        return self.records.between / max(1, self.position[0])

    def patience(self) -> float:
        """Return the seconds without a write after which the run is stale, from its own speed."""
        if not self.records.recent:
            return START_PATIENCE
        return 120 + 10 * self.step_seconds + 2 * (self.records.refresh_seconds + self.between)

    def state(self) -> str:
        """Return done, stopped, error, stale, starting or running."""
        if self.complete:
            return "done"
        if self.records.end:
            return self.records.end if self.records.end in ("error", "stopped") else "done"
        if self.quiet() > self.patience():
            return "stale"
        return "running" if self.records.recent else "starting"

    def left(self) -> float | None:
        """Return the seconds left for steps, refreshes and work between epochs, or None."""
        epoch, step, steps = self.position
        epochs = self.option("epochs")
        if not (epochs and steps and self.records.recent):
            return None
        refreshes = 0
        if self.options.get("teacher"):
            with contextlib.suppress(RunError, TypeError):
                due = parse_refresh(self.options.get("refresh_epochs", "never"))
                refreshes = sum(map(due, range(epoch + 1, min(epochs, epoch + MOST_EPOCHS))))
        seconds = max(0, (epochs - epoch) * steps - step) * self.step_seconds
        return max(
            0.0,
            seconds
            + refreshes * self.records.refresh_seconds
            + (epochs - epoch) * self.between
            - self.quiet(),
        )

    def checkpoint(self) -> tuple[str, float, int] | None:
        """Return the newest checkpoint's name, age in seconds, and bytes, or None."""
        for path in (
            *reversed(history.find_checkpoints(self.folder)),
            self.folder / "last.pth.tar",
        ):
            with contextlib.suppress(OSError):
                status = path.stat()
                return path.name, max(0.0, time.time() - status.st_mtime), status.st_size
        return None
