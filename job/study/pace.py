"""A study's progress and its remaining time, estimated from the first minute on."""

import time
from collections.abc import Collection, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from torchvision.models import get_model_weights

from job.distill import DISTILLERS
from job.errors import RunError
from job.frameworks import FRAMEWORKS
from job.networks import WIDTH
from job.show.watch.panel import span
from job.show.watch.state import Progress
from job.study.plan import Unit
from job.study.units import Bench


class Pace:
    """The work of a study's units, in operations, and its speed.

    The speed comes from the units' records. Before the first record, it comes from the progress
    of the runs since this object was made.
    """

    def __init__(self, bench: Bench):
        self.bench, self.start = bench, time.monotonic()
        self.images = {
            name: sum(1 for _ in (bench.out / bench.plan.images(name)).glob("train/*/*"))
            for name in bench.plan.questions
        }
        self.work = {unit: self.work_of(unit) for unit in bench.plan.units}
        self.all = sum(self.work.values())
        self.before = self.done([])

    def work_of(self, unit: Unit) -> float:
        """Return a unit's work: passes of its student and teacher, in training and measuring."""
        train, linear = unit.resolved().values()
        framework = FRAMEWORKS[train["framework"]]
        distilled = max(DISTILLERS[name].views for name in train["distill"]) if unit.guided else 0
        more = max(0, distilled - framework.student_views)  # views for distillers only
        passes = (framework.views + more + 2 * (framework.student_views + more)) * operations(train)
        if unit.guided:
            views = max(distilled, min(framework.student_views, train["mgd_views"]))
            passes += views * operations(self.bench.teachers[unit.set].resolved()["job.train"])
            options = SimpleNamespace(**train)
            if any(DISTILLERS[name].momentum(options) is not None for name in train["distill"]):
                passes += views * operations(train)  # of the momentum encoder
        passes *= train["epochs"]
        passes += operations(train) * (linear["epochs"] + 1)
        return passes * self.images[unit.set] * train["image_size"] ** 2

    def done(self, records: Collection[Unit]) -> float:
        """Return the work done: that of units with records, and that in the files of other runs."""
        unfinished = (unit for unit in self.bench.plan.units if unit not in records)
        return sum(self.work[unit] for unit in records) + sum(
            self.work[unit] * self.fraction(unit) for unit in unfinished
        )

    def fraction(self, unit: Unit) -> float:
        """Return the fraction of a unit's training that is done."""
        try:
            progress = Progress(self.bench.folder(unit) / "train")
            progress.update()
            return 0.99 * progress.fraction
        except RunError:
            return 0.0

    def line(self, running: Iterable[Unit], records: Mapping[Unit, dict[str, Any]]) -> str:
        """Return a line with the progress and the remaining time."""
        names = (
            ", ".join(f"{unit.name} {100 * self.fraction(unit):.0f} %" for unit in running)
            or "nothing"
        )
        done = self.done(records)
        each = self.seconds(done, records)
        left = (
            "time left unknown" if each is None else f"about {span((self.all - done) * each)} left"
        )
        return f"{100 * done / self.all:.0f} % done, running {names}; {left}"

    def seconds(self, done: float, records: Mapping[Unit, dict[str, Any]]) -> float | None:
        """Return the seconds per operation, or None if there is no progress yet."""
        if records:
            spent = sum(record["seconds"] for record in records.values()) / self.bench.plan.at_once
            return spent / sum(self.work[unit] for unit in records)
        return (
            (time.monotonic() - self.start) / (done - self.before) if done > self.before else None
        )


def operations(options: dict[str, Any]) -> float:
    """Return a network's multiplications, in 10^9, for a 224-pixel image and the usual stem."""
    return (
        next(iter(get_model_weights(options["arch"]))).meta["_ops"]
        * (options["width"] / WIDTH) ** 2
    )
