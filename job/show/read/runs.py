"""The runs that a report shows: where they lie, how they are told apart, how far they are."""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from job.errors import RunError
from job.show.read.discover import Place, find
from job.show.read.history import History, read_run
from job.show.watch.panel import span, state
from job.show.watch.state import Progress
from job.text import printable

MOST_RUNS = 500  # of a report, in whose pictures each has a line


@dataclasses.dataclass(frozen=True)
class Shown:
    """A run of a report. label: unlike any other's. place: its number among the runs of its kind, from which follow its colour,
    line and marker.
    """

    label: str
    place: int
    history: History

    @functools.cached_property
    def progress(self) -> Progress:
        """How far it is."""
        progress = Progress(self.history.folder)
        progress.update()
        return progress

    @property
    def steps_an_epoch(self) -> int:
        """How many steps an epoch has; 0: not known yet."""
        return self.progress.place[2]

    @functools.cached_property
    def epochs(self) -> np.ndarray:
        """Return the epochs, with fractions, that were done after each of the n steps, (n,)."""
        return self.epochs_after(
            *(self.history.steps.get(name, np.zeros(0)) for name in ("epoch", "step"))
        )

    def epochs_after(self, epochs: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Return the epochs, with fractions, that were done after each of the `steps` (n,) of `epochs` (n,)."""
        now = self.steps_an_epoch or max(1.0, steps.max(initial=0) + 1)
        return epochs + (steps + 1) / self.history.in_force("steps_an_epoch", now, epochs)

    @property
    def step_seconds(self) -> np.ndarray:
        """Return the seconds of each of the n steps, (n,); NaN if the batch size is unknown."""
        batch_size = self.option("batch_size", math.nan)
        speed = self.column("images_per_s")
        epochs = self.column("epoch") if len(speed) else speed
        return self.history.in_force("batch_size", batch_size, epochs) / speed

    def option(self, name: str, otherwise: float) -> float:
        """A number among its options."""
        value = self.history.options.get(name, otherwise)
        return value if isinstance(value, int | float) and math.isfinite(value) else otherwise

    def column(self, name: str) -> np.ndarray:
        """A number of each step, (n,); empty where none has it."""
        values = self.history.steps.get(name, np.zeros(0))
        return values if np.isfinite(values).any() else np.zeros(0)

    def state(self) -> str:
        """In words: done, stopped, ended by an error, running or silent, as far as its files tell."""
        said = state(self.progress)
        running = self.progress.state() == "running"
        return f"{said} (last heard of {span(self.progress.quiet())} ago)" if running else said


def find_runs(given: Iterable[str]) -> list[Shown]:
    """Read the runs at paths: of a run, of a folder of runs, such as a job array's, of a job's log.

    What cannot be read among others is named and passed over. RunError: there is nothing else, or too much.
    """
    histories: dict[Path, History] = {}
    found: list[Place] = []
    problems = []
    for path in given:
        try:
            found += find(Path(path), {})
        except RunError as error:
            problems.append(error)
    if len(found) > MOST_RUNS:
        raise RunError(
            f"{len(found)} runs: expected at most {MOST_RUNS} in a report. Name some of them"
        )
    for place in found:
        try:
            history = read_place(place)
            histories.setdefault(history.folder.resolve(), history)
        except RunError as error:
            problems.append(error)
    if not histories:
        raise problems[0]
    for problem in problems:
        print(f"passed over: {problem}", file=sys.stderr)
    places = {"train": itertools.count(), "linear": itertools.count()}
    labels = tell_apart(list(histories))
    return [
        Shown(label, next(places[h.kind]), h)
        for label, h in zip(labels, histories.values(), strict=True)
    ]


def read_place(place: Place) -> History:
    """Read the run at a place. RunError: there is none, or none yet."""
    if place.problem or place.waits():
        raise RunError(
            place.problem or f"{place.path} has no run yet: its job waits for its first step"
        )
    return read_run(place.path)


def tell_apart(folders: list[Path]) -> list[str]:
    """The last parts of paths, as many as each needs to be unlike the others; a number alone, as in an array, is no name."""

    def name(folder: Path) -> str:
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

    return [name(folder) for folder in folders]
