"""How far a study is, and how long it will take, from the first minute on."""

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
    """The work of a study's units, in passes of a network through it, and how fast it goes.

    The units' records tell the speed; before there is one, what was done since this was made.
    """

    def __init__(self, bench: Bench):
        self.bench, self.begun = bench, time.monotonic()
        self.images = {
            name: sum(1 for _ in (bench.out / bench.plan.images(name)).glob("train/*/*"))
            for name in bench.plan.questions
        }
        self.work = {unit: self.work_of(unit) for unit in bench.plan.units}
        self.all = sum(self.work.values())
        self.before = self.done([])

    def work_of(self, unit: Unit) -> float:
        """A unit's work, by its networks' operations: views, back through the student, the teacher, what measures it."""
        train, linear = unit.resolved().values()
        framework = FRAMEWORKS[train["framework"]]
        distilled = max(DISTILLERS[name].views for name in train["distill"]) if unit.guided else 0
        more = max(0, distilled - framework.student_views)  # views that only distillers need
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
        """The work that is done: of units with records, and of all others as far as their runs' files tell."""
        begun = (unit for unit in self.bench.plan.units if unit not in records)
        return sum(self.work[unit] for unit in records) + sum(
            self.work[unit] * self.share(unit) for unit in begun
        )

    def share(self, unit: Unit) -> float:
        """The share of a unit's training that is done."""
        try:
            progress = Progress(self.bench.folder(unit) / "train")
            progress.update()
            return 0.99 * progress.fraction
        except RunError:
            return 0.0

    def line(self, running: Iterable[Unit], records: Mapping[Unit, dict[str, Any]]) -> str:
        """How far it is, in a line."""
        names = (
            ", ".join(f"{unit.name} {100 * self.share(unit):.0f} %" for unit in running)
            or "nothing"
        )
        done = self.done(records)
        each = self.seconds(done, records)
        left = (
            "time left not known yet"
            if each is None
            else f"about {span((self.all - done) * each)} left"
        )
        return f"{100 * done / self.all:.0f} % done, running {names}; {left}"

    def seconds(self, done: float, records: Mapping[Unit, dict[str, Any]]) -> float | None:
        """What a piece of work takes, in seconds; None: not known yet."""
        if records:
            spent = sum(record["seconds"] for record in records.values()) / self.bench.plan.at_once
            return spent / sum(self.work[unit] for unit in records)
        return (
            (time.monotonic() - self.begun) / (done - self.before) if done > self.before else None
        )


def operations(options: dict[str, Any]) -> float:
    """A network's multiplications for an image, in units of 10^9 at 224 pixels, with the stem as published."""
    return (
        next(iter(get_model_weights(options["arch"]))).meta["_ops"]
        * (options["width"] / WIDTH) ** 2
    )
