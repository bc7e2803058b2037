"""Journals: a record for each step, progress on the screen, and a log line for each epoch."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from job.errors import RunError
from job.metrics.log import Log
from job.position import Count


class Recorded(Protocol):
    """The parts of a run that a journal needs."""

    log: Log
    count: Count
    size: int  # workers


class Journal:
    """Time, record and log the steps of an epoch. A subclass converts the sums of its training.

    It adds the images per second of all workers, and the fraction of the time in which rank 0
    waited for images.

    total: images of a batch. print_freq: steps between progress lines.
    """

    parts: tuple[str, ...]  # names of the losses that the loss is the sum of
    advice: str  # options that may help against a loss that is not finite

    def __init__(self, run: Recorded, total: int, print_freq: int):
        self.run, self.total, self.print_freq = run, total, print_freq
        self.steps = run.count.an_epoch

    def numbers(self, sums: dict[str, float]) -> dict[str, float]:
        """Return the numbers for a step's record from its sums over the workers."""
        raise NotImplementedError

    def losses(self, numbers: dict[str, float]) -> str:
        """Return the losses among such numbers for a log line."""
        raise NotImplementedError

    def start_epoch(self, epoch: int, rate: float) -> None:
        """Begin an epoch at a learning rate."""
        self.epoch, self.rate = epoch, rate
        self.records: list[dict[str, float]] = []
        self.clock = time.perf_counter()
        self.waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the wait for a step's images."""
        start = time.perf_counter()
        yield
        self.waited = time.perf_counter() - start

    def check_finite(
        self, step: int, sums: dict[str, float], broken: Callable[[], list[str]]
    ) -> None:
        """Check the losses and the gradient before an update.

        broken: returns the names of the parameters whose gradients are not finite.
        RunError, on all workers: a loss or gradient is not finite on any worker.
        """
        if not math.isfinite(sums["loss"] + sums["gradient"]):
            means = self.numbers(sums) | {"gradient": sums["gradient"] / self.run.size}
            parts = ", ".join(f"{part} {means[part]}" for part in (*self.parts, "gradient"))
            name, where = "loss", ""
            if math.isfinite(sums["loss"]):
                name = "gradient"
                if names := broken():
                    where = f"; in {len(names)} parameters, in the backward pass first {names[0]}"
            raise RunError(
                f"the {name} is not finite at epoch {self.epoch}, step {step} ({parts}{where}); "
                f"the checkpoints are untouched. {self.advice} may help",
                code=1,
            )

    def step(self, step: int, sums: dict[str, float]) -> None:
        """Record a step from its sums over the workers."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        record = {
            "steps": self.run.count.at(self.epoch, step + 1),
            "epoch": self.epoch,
            "step": step,
            **self.numbers(sums),
            "lr": self.rate,
            "images_per_s": self.total / seconds,
            "data_wait": self.waited / seconds,
        }
        self.records.append(record)
        self.run.log.record("step", **record)
        self.run.log.progress(
            self.describe(f"epoch {self.epoch} step {step + 1}/{self.steps}", record),
            step + 1,
            self.steps,
            self.print_freq,
        )

    def end_epoch(self) -> None:
        """Log an epoch's averages."""
        if self.records:
            mean = {
                key: sum(record[key] for record in self.records) / len(self.records)
                for key in self.records[0]
            }
            mean["images_per_s"] = len(self.records) / sum(
                1 / record["images_per_s"] for record in self.records
            )
            self.run.log.line(self.describe(f"epoch {self.epoch} mean", mean))

    def describe(self, name: str, numbers: dict[str, float]) -> str:
        """Return the log line of a step or an epoch. name: how the line begins."""
        return (
            f"{name}: {self.losses(numbers)}, lr {numbers['lr']:.5f}, "
            f"{numbers['images_per_s']:.1f} images/s, data wait {100 * numbers['data_wait']:.0f} %"
        )


class ClassifierJournal(Journal):
    """The journal of `job.linear`: mean loss, and accuracies on the training views."""

    parts, advice = ("loss",), "A lower --lr"

    def numbers(self, sums: dict[str, float]) -> dict[str, float]:
        """Return the mean loss of the images, and the accuracies in percent of all views."""
        return {
            "loss": sums["loss"],
            **{top: 100 * sums[top] / self.total for top in ("top1", "top5")},
        }

    def losses(self, numbers: dict[str, float]) -> str:
        """Return the loss and the accuracies."""
        return (
            f"loss {numbers['loss']:.4f}, training top-1 {numbers['top1']:.1f} %, "
            f"top-5 {numbers['top5']:.1f} %"
        )
