"""Collect the runs of a report: their folders, unique labels, and progress."""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from job.errors import RunError
from job.show.read.discover import Source, find
from job.show.read.history import History, read_run
from job.show.watch.panel import describe_state, span
from job.show.watch.state import Progress
from job.text import printable

MOST_RUNS = 500  # of a report, whose pictures have a line for each


@dataclasses.dataclass(frozen=True)
class ReportRun:
    """A run of a report, with a unique label.

    index: number among the runs of its kind. It sets the run's colour, line and marker.
    """

    label: str
    index: int
    history: History

    @functools.cached_property
    def progress(self) -> Progress:
        """Its position and state."""
        progress = Progress(self.history.folder)
        progress.update()
        return progress

    @property
    def steps_an_epoch(self) -> int:
        """The steps of an epoch; 0 if they are unknown."""
        return self.progress.position[2]

    @functools.cached_property
    def epochs(self) -> np.ndarray:
        """The epochs, with fractions, done after each of the n steps, (n,) float64."""
        return self.epochs_after(
            *(self.history.steps.get(name, np.zeros(0)) for name in ("epoch", "step"))
        )

    def epochs_after(self, epochs: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Return the epochs, with fractions, done after each of the `steps` (n,) of `epochs` (n,).

        The result is (n,) float64.
        """
        now = self.steps_an_epoch or max(1.0, steps.max(initial=0) + 1)
        return epochs + (steps + 1) / self.history.in_force("steps_an_epoch", now, epochs)

    @property
    def step_seconds(self) -> np.ndarray:
        """The seconds of each of the n steps, (n,); NaN if the batch size is unknown."""
        batch_size = self.option("batch_size", math.nan)
        speed = self.column("images_per_s")
        epochs = self.column("epoch") if len(speed) else speed
        return self.history.in_force("batch_size", batch_size, epochs) / speed

    def option(self, name: str, otherwise: float) -> float:
        """Return an option that is a finite number, or `otherwise`."""
        value = self.history.options.get(name, otherwise)
        return value if isinstance(value, int | float) and math.isfinite(value) else otherwise

    def column(self, name: str) -> np.ndarray:
        """Return a number of each of the n steps, (n,); (0,) if no step has it."""
        values = self.history.steps.get(name, np.zeros(0))
        return values if np.isfinite(values).any() else np.zeros(0)

    def state(self) -> str:
        """Return its state as text, as far as its files show it."""
        text = describe_state(self.progress)
        running = self.progress.state() == "running"
        return f"{text} (last write {span(self.progress.quiet())} ago)" if running else text


def find_runs(paths: Iterable[str]) -> list[ReportRun]:
    """Read the runs at paths: run folders, folders of runs such as a job array's, or job logs.

    Print and skip unreadable ones. RunError: there are no others, or too many.
    """
    histories: dict[Path, History] = {}
    sources: list[Source] = []
    problems = []
    for path in paths:
        try:
            sources += find(Path(path), {})
        except RunError as error:
            problems.append(error)
    if len(sources) > MOST_RUNS:
        raise RunError(
            f"{len(sources)} runs: expected at most {MOST_RUNS} in a report. Name fewer runs"
        )
    for source in sources:
        try:
            history = read_source(source)
            histories.setdefault(history.folder.resolve(), history)
        except RunError as error:
            problems.append(error)
    if not histories:
        raise problems[0]
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    indices = {"train": itertools.count(), "linear": itertools.count()}
    labels = unique_labels(list(histories))
    return [
        ReportRun(label, next(indices[history.kind]), history)
        for label, history in zip(labels, histories.values(), strict=True)
    ]


def read_source(source: Source) -> History:
    """Read a source's run. RunError: there is none, or it has not started."""
    if source.problem or source.waits():
        raise RunError(
            source.problem or f"{source.path} has no run yet: its job waits for its first step"
        )
    return read_run(source.path)


def unique_labels(folders: list[Path]) -> list[str]:
    """Return the shortest unique end of each path.

    A name that is only a number, as in a job array, is always preceded by its parent's.
    """

    def label(folder: Path) -> str:
        first = 2 if folder.name.isdigit() else 1
        ends = (folder.parts[-depth:] for depth in itertools.count(first))
        return printable(
            "/".join(
                next(
                    end
                    for end in ends
                    if sum(other.parts[-len(end) :] == end for other in folders) == 1
                )
            )
        )

    return [label(folder) for folder in folders]
