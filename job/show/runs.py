"""The runs that a report shows: where they lie, how they are told apart, how far they are."""

import dataclasses
import functools
import itertools
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from job.errors import RunError
from job.show.curves import History, read_run

FILES = ("config.yaml", "metrics.jsonl", "log.txt")  # a folder with one of them is a run's
SILENT = 900  # seconds; workers that wait for each other for so long are ended, so a run that is alive has spoken since
STEPS_LINE = re.compile(r"(\d+) images, (\d+) steps an epoch")


@dataclasses.dataclass(frozen=True)
class Shown:
    """A run of a report. label: unlike any other's. place: its number among the runs of its kind, from which follow its colour,
    line and marker.
    """

    label: str
    place: int
    history: History

    @functools.cached_property
    def steps_an_epoch(self) -> int | None:
        """How many steps an epoch has, as the log or the numbers of later epochs tell; None if neither does yet."""
        for _, text in reversed(self.history.lines):
            if match := STEPS_LINE.match(text):
                return int(match[2])
        steps = self.history.steps
        later = np.flatnonzero(steps.get("epoch", np.zeros(0)) > 0)
        if len(later):
            total, epoch, step = (steps[name][later[0]] for name in ("steps", "epoch", "step"))
            return round((total - step - 1) / epoch)
        return None

    @functools.cached_property
    def epochs(self) -> np.ndarray:
        """How many epochs, with fractions, were done after each of the n steps, (n,)."""
        steps = self.history.steps.get("steps", np.zeros(0))
        return steps / (self.steps_an_epoch or max(1.0, steps.max(initial=1.0)))

    def option(self, name: str, otherwise: float) -> float:
        """A number among its options."""
        value = self.history.options.get(name, otherwise)
        return value if isinstance(value, int | float) and math.isfinite(value) else otherwise

    def column(self, name: str) -> np.ndarray:
        """A number of each step, (n,); empty where none has it."""
        values = self.history.steps.get(name, np.zeros(0))
        return values if np.isfinite(values).any() else np.zeros(0)

    def state(self, now: float) -> str:
        """In words: done, stopped, ended by an error, or in progress, as far as its files tell."""
        history = self.history
        if history.complete:
            return "done"
        last = next((text for _, text in reversed(history.lines)), "")
        if last.startswith("stopped by a signal"):
            return "stopped, to be resumed"
        if last.startswith("error: "):
            return "ended by an error"
        written = [path.stat().st_mtime for name in FILES if (path := history.folder / name).exists()]
        silence = now - max(written, default=0.0)
        return f"in progress ({ago(silence)})" if silence < SILENT else f"not done, silent for {duration(silence)}"


def find_runs(folders: Iterable[str]) -> list[Shown]:
    """Read the runs in `folders`, each a run's or one of several runs'. RunError: one of them holds none.

    Of a folder of runs, such as a job array's, those that cannot be read are named and passed over.
    """
    histories: dict[Path, History] = {}
    for given in folders:
        inside = [] if is_run(Path(given)) else runs_in(Path(given))
        readable = [history for path in inside if (history := read_or_name(path))]
        for history in readable or [read_run(given)]:
            histories.setdefault(history.folder.resolve(), history)
    places = {"train": itertools.count(), "linear": itertools.count()}
    labels = tell_apart(list(histories))
    return [Shown(label, next(places[h.kind]), h) for label, h in zip(labels, histories.values(), strict=True)]


def is_run(folder: Path) -> bool:
    """Whether a folder has a file that runs write first."""
    return any((folder / name).is_file() for name in FILES)


def runs_in(folder: Path) -> list[Path]:
    """The runs' folders in a folder, by name, numbers by value. RunError: it cannot be read."""
    try:
        found = [path for path in folder.iterdir() if is_run(path)] if folder.is_dir() else []
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror or error}; see to who may read it") from None
    return sorted(found, key=lambda path: [part.zfill(20) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)])


def read_or_name(folder: Path) -> History | None:
    """Read a run's folder, or say why not."""
    try:
        return read_run(folder)
    except RunError as error:
        print(f"passed over: {error}", file=sys.stderr)
        return None


def tell_apart(folders: list[Path]) -> list[str]:
    """The last parts of paths, as many as each needs to be unlike the others; a number alone, as in an array, is no name."""

    def name(folder: Path) -> str:
        first = 2 if folder.name.isdigit() else 1
        ends = (folder.parts[-depth:] for depth in itertools.count(first))
        return "/".join(next(end for end in ends if sum(other.parts[-len(end) :] == end for other in folders) == 1))

    return [name(folder) for folder in folders]


def duration(seconds: float) -> str:
    """In words: 40 s, 12 min, 3.5 h, 4 days."""
    for unit, size, shown in (("days", 86400, 3), ("h", 3600, 1), ("min", 60, 2)):
        if seconds >= shown * size:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def ago(seconds: float) -> str:
    """In words: 40 s ago."""
    return f"last heard of {duration(seconds)} ago"
