"""What the numbers of steps become: a record each in metrics.jsonl, progress on the screen, a line an epoch."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from job.errors import RunError
from job.metrics.log import Log
from job.position import Count


class Recorded(Protocol):
    """A run, as far as its steps are recorded."""

    log: Log
    count: Count
    size: int  # workers


class Journal:
    """The steps of an epoch, timed and told: what a kind of training makes of its sums is in the classes below.

    Beside that, images a second over all workers, and rank 0's share of the time in which it waited for images.
    """

    parts: tuple[str, ...]  # names of what the loss is the sum of
    advice: str  # what may help against a loss that is not finite

    def __init__(self, run: Recorded, total: int, print_freq: int):
        self.run, self.total, self.print_freq = run, total, print_freq
        self.steps = run.count.an_epoch

    def numbers(self, sums: dict[str, float]) -> dict[str, float]:
        """Return what a step's record has of its sums over the workers."""
        raise NotImplementedError

    def losses(self, numbers: dict[str, float]) -> str:
        """Return such numbers in words."""
        raise NotImplementedError

    def start_epoch(self, epoch: int, rate: float) -> None:
        """Begin an epoch at a learning rate."""
        self.epoch, self.rate = epoch, rate
        self.records: list[dict[str, float]] = []
        self.clock = time.perf_counter()
        self.waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time in which a step's images are waited for."""
        begun = time.perf_counter()
        yield
        self.waited = time.perf_counter() - begun

    def check_finite(
        self, step: int, sums: dict[str, float], beyond: Callable[[], list[str]]
    ) -> None:
        """RunError, on all workers, before the update: a loss or gradient is not finite, on one of them or on all.

        beyond: returns the names of the parameters whose gradients are not finite.
        """
        if not math.isfinite(sums["loss"] + sums["gradient"]):
            means = self.numbers(sums) | {"gradient": sums["gradient"] / self.run.size}
            parts = ", ".join(f"{part} {means[part]}" for part in (*self.parts, "gradient"))
            what, where = "loss", ""
            if math.isfinite(sums["loss"]):
                what, names = "gradient", beyond()
                where = (
                    f"; of {len(names)} parameters, {names[0]} first in the backward pass"
                    if names
                    else ""
                )
            raise RunError(
                f"the {what} is not finite at epoch {self.epoch}, step {step} ({parts}{where}); the checkpoints are "
                f"untouched. {self.advice} may help",
                code=1,
            )

    def step(self, step: int, sums: dict[str, float]) -> None:
        """Record a step from its sums over the workers."""
        now = time.perf_counter()
        took, self.clock = now - self.clock, now
        record = {
            "steps": self.run.count.at(self.epoch, step + 1),
            "epoch": self.epoch,
            "step": step,
            **self.numbers(sums),
            "lr": self.rate,
            "images_per_s": self.total / took,
            "data_wait": self.waited / took,
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
        """Say an epoch's averages."""
        if self.records:
            mean = {
                key: sum(record[key] for record in self.records) / len(self.records)
                for key in self.records[0]
            }
            mean["images_per_s"] = len(self.records) / sum(
                1 / record["images_per_s"] for record in self.records
            )
            self.run.log.line(self.describe(f"epoch {self.epoch} mean", mean))

    def describe(self, what: str, numbers: dict[str, float]) -> str:
        """One line for a step or an epoch."""
        return (
            f"{what}: {self.losses(numbers)}, lr {numbers['lr']:.5f}, {numbers['images_per_s']:.1f} images/s, "
            f"data wait {100 * numbers['data_wait']:.0f} %"
        )


class ClassifierJournal(Journal):
    """Of `job.linear`: the loss averaged over the images, and the accuracy on the training views."""

    parts, advice = ("loss",), "A lower --lr"

    def numbers(self, sums: dict[str, float]) -> dict[str, float]:
        """The loss averaged over the images, and the accuracies in percent of all views."""
        return {
            "loss": sums["loss"],
            **{top: 100 * sums[top] / self.total for top in ("top1", "top5")},
        }

    def losses(self, numbers: dict[str, float]) -> str:
        """The loss and the accuracies."""
        return f"loss {numbers['loss']:.4f}, training top-1 {numbers['top1']:.1f} %, top-5 {numbers['top5']:.1f} %"
