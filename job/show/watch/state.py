"""How far a run is, from its records as they grow: its state, its place, the time left."""

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
START_PATIENCE = (
    900.0  # s without news before the first step; by then a run that stands still has ended itself
)
MOST_WARNINGS, MOST_DISTILLERS = 8, 8
SECONDS = ("measuring", "gathering", "solving")  # of a refresh


class Records:
    """The records of metrics.jsonl. Of a large part that is new at once, a sample of the steps is read, and all else."""

    def __init__(self) -> None:
        self.recent: collections.deque[dict[str, float]] = collections.deque(maxlen=RECENT)
        self.count, self.seconds, self.damaged, self.refreshes = (
            0,
            0.0,
            0,
            0,
        )  # seconds: sum of 1 / images_per_s
        self.loss, self.accuracy, self.scores = (
            Curve(),
            Curve(),
            Curve(),
        )  # scores: of k-NN or validation
        self.refresh: dict[
            str, dict[int, dict[str, Any]]
        ] = {}  # {distiller: {stage: record}} of its last
        self.refreshed = -1  # epoch of the last refresh
        self.signs: dict[str, float] = {}
        self.score: dict[str, float] = {}
        self.changes: list[dict[str, float]] = []  # of the batch size or the steps of an epoch
        self.best = 0.0
        self.start: dict[str, Any] = {}  # of the last process
        self.options: dict[str, Any] = {}
        self.teacher, self.end, self.resumed = (
            "",
            "",
            0,
        )  # end: how the last process has ended, if it has
        self.warnings: dict[str, tuple[float, str]] = {}  # {kind and id: (time, text)}, newest last
        self.between = 0.0  # s of all saves at an epoch's end, k-NN accuracies and validations

    def add(self, lines: bytes) -> None:
        """Take in whole lines."""
        split = lines.splitlines()
        stride = max(1, len(split) // SAMPLE)
        for at, line in enumerate(split):
            if at % stride and at < len(split) - 1 and b'"loss"' in line:
                continue
            self.add_record(history.read_record(line), stride)

    def add_record(self, found: tuple[str, dict[str, Any]] | None, weight: int) -> None:
        """Take in a record, and its kind; a step stands for `weight` of them. None: a damaged line."""
        match found:
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
        if found and (text := history.warning_of(*found)):
            kind, id = text.partition(": ")[0], found[1].get("id")
            key = f"{kind}: {id}"[: history.LONGEST_LINE] if id else re.sub(r"\d+", "", text)
            self.warnings.pop(key, None)
            self.warnings[key] = (found[1]["time"], text)
            self.warnings = dict(list(self.warnings.items())[-MOST_WARNINGS:])

    def add_step(self, record: dict[str, float], weight: int) -> None:
        """Take in a step that stands for `weight` of them."""
        self.recent.append(record)
        self.loss.add(int(record["steps"]), record["loss"])
        self.accuracy.add(
            int(record["steps"]), record.get("accuracy", record.get("top1", float("nan")))
        )
        self.count += weight
        self.seconds += weight / max(record.get("images_per_s", 0.0), 1e-9)

    def add_refresh(self, record: dict[str, Any]) -> None:
        """Take in one stage of a distiller's refresh; those of one epoch are one."""
        epoch, distiller = record["epoch"], record["distiller"]
        if epoch != self.refreshed:
            self.refreshed = epoch
            self.refreshes += 1
        stages = self.refresh.get(distiller, {})
        if stages or len(self.refresh) < MOST_DISTILLERS:
            same = {stage: other for stage, other in stages.items() if other["epoch"] == epoch}
            self.refresh[distiller] = same | {record["stage"]: record}

    def add_score(self, record: dict[str, float]) -> None:
        """Take in an accuracy of k-NN or of a validation."""
        score = record.get("knn", record.get("val_top1", 0.0))
        self.score = record
        self.scores.add(int(record["epoch"]), score)
        self.best = max(self.best, score)
        self.between += record.get("knn_seconds", record.get("val_seconds", 0.0))

    @property
    def refresh_seconds(self) -> float:
        """Seconds of the last refresh, of all distillers; each stage has the seconds of all stages."""
        first = [next(iter(stages.values())) for stages in self.refresh.values()]
        last = [record for record in first if record["epoch"] == self.refreshed]
        return sum(record.get(name, 0.0) for record in last for name in SECONDS)

    def now(self, name: str) -> float:
        """The mean of a number over the recent steps: the last RECENT, but no more than a quarter of all. NaN: none has it."""
        recent = list(self.recent)[-max(1, min(RECENT, self.count // 4)) :]
        values = [record[name] for record in recent if name in record]
        return sum(values) / len(values) if values else float("nan")


class LastLine:
    """The last line of log.txt, without its time."""

    def __init__(self) -> None:
        self.text = ""

    def add(self, lines: bytes) -> None:
        """Take in whole lines."""
        for _, text in history.read_lines(
            lines[-history.LONGEST_RECORD :].decode(errors="backslashreplace")
        )[-1:]:
            self.text = text


@dataclasses.dataclass
class Progress:
    """A run whose folder is looked at again and again."""

    folder: Path

    def __post_init__(self) -> None:
        self.metrics = Follower(self.folder / "metrics.jsonl", Records)
        self.log = Follower(self.folder / "log.txt", LastLine)
        self.options: dict[str, Any] = {}
        self.written = -1.0  # when config.yaml was, as it was read
        self.complete: str | None = None
        self.records, self.known = self.metrics.told, False  # known: whether it was read

    def update(self) -> None:
        """Read what is new. RunError: there is no run, or a file that cannot be read."""
        self.complete = history.read(
            self.folder / "complete", lambda text: text.strip() or "done", None
        )
        self.metrics.update()
        self.records = self.metrics.told
        if self.records.start:
            self.options = self.records.options
        elif (written := self.changed("config.yaml")) != self.written:
            self.options, self.written = (
                history.read(self.folder / "config.yaml", history.read_options, {}),
                written,
            )
        if not (self.options or self.records.count):
            raise RunError(
                f"{self.folder} holds no run: config.yaml and metrics.jsonl are missing, empty or damaged; "
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
        start = self.records.start
        began, steps = (start.get("epoch", 0), start.get("step", 0)), start.get("steps_an_epoch", 0)
        if not self.records.recent:
            return (*began, steps)
        last = self.records.recent[-1]
        epoch, step = int(last["epoch"]), int(last["step"]) + 1
        for change in self.records.changes[-1:]:
            steps = int(change["steps_an_epoch"])
            if epoch < change["epoch"]:  # no step since the run was resumed
                return int(change["epoch"]), 0, steps
        # Earlier versions do not record the steps of an epoch: take the epochs before, or the end.
        found = (int(last["steps"]) - step) // epoch if epoch else step if self.complete else 0
        return epoch, step, steps or found

    @property
    def filled(self) -> int:
        """Return the steps in which keys fill the queue: the loss is near 0 then.

        0: the run has not twice as many steps, or no queue.
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
    def share(self) -> float:
        """The share of all steps that are done, 0 to 1."""
        epoch, step, steps = self.place
        share = (
            (epoch + (step / steps if steps else 0)) / (self.option("epochs") or 1)
            if self.option("epochs")
            else 0.0
        )
        return min(1.0, max(0.0, share))  # damaged records may have any epoch

    @property
    def step_seconds(self) -> float:
        """Seconds of a recent step."""
        recent = [1 / max(record.get("images_per_s", 0.0), 1e-9) for record in self.records.recent]
        return self.option("batch_size") * sum(recent) / max(1, len(recent))

    def quiet(self) -> float:
        """The seconds since the run last wrote something."""
        return max(
            0.0,
            time.time()
            - max(self.metrics.changed, self.changed("log.txt"), self.changed("config.yaml")),
        )

    def changed(self, name: str) -> float:
        """When a file of the folder was written last, in seconds since 1970; 0 without such a file."""
        with contextlib.suppress(OSError):
            return (self.folder / name).stat().st_mtime
        return 0.0

    def last_line(self) -> str:
        """Return the last line of log.txt; nothing if there is none."""
        with contextlib.suppress(RunError):
            self.log.update()
        return self.log.told.text

    @property
    def between(self) -> float:
        """Seconds that an epoch takes in addition to its steps and refresh."""
        return self.records.between / max(1, self.place[0])

    def patience(self) -> float:
        """The seconds without news after which something may be wrong, by the run's own pace."""
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
        """The seconds to the run's end: its steps, refreshes and what else comes between epochs; None: not known."""
        epoch, step, steps = self.place
        epochs = self.option("epochs")
        if not (epochs and steps and self.records.recent):
            return None
        refreshes = 0
        if self.options.get("teacher"):
            with contextlib.suppress(RunError, TypeError):
                at = parse_refresh(self.options.get("refresh_epochs", "never"))
                refreshes = sum(map(at, range(epoch + 1, min(epochs, epoch + MOST_EPOCHS))))
        seconds = max(0, (epochs - epoch) * steps - step) * self.step_seconds
        return max(
            0.0,
            seconds
            + refreshes * self.records.refresh_seconds
            + (epochs - epoch) * self.between
            - self.quiet(),
        )

    def checkpoint(self) -> tuple[str, float, int] | None:
        """The newest checkpoint's name, age in seconds, and bytes."""
        for path in (
            *reversed(history.find_checkpoints(self.folder)),
            self.folder / "last.pth.tar",
        ):
            with contextlib.suppress(OSError):
                status = path.stat()
                return path.name, max(0.0, time.time() - status.st_mtime), status.st_size
        return None
