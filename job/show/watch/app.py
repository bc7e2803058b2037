"""Show runs in a terminal: progress, loss, speed, time left, checkpoints, refreshes, warnings.

mgd-watch RUN...        RUN: a run's folder, a folder that holds runs, or a SLURM job's log
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from job.cli import Parser
from job.declare import expand
from job.errors import RunError
from job.show.read import discover
from job.show.read.discover import Place
from job.show.read.ends import reported
from job.show.watch import panel
from job.show.watch.panel import Marks
from job.show.watch.screen import Screen
from job.show.watch.state import Progress

EVERY = 3.0  # s


class Shown:
    """A run that is shown, or a job whose run is to come."""

    def __init__(self, place: Place):
        self.place, self.run, self.problem = place, Progress(place.path), ""

    def look(self, place: Place) -> None:
        """Read new records, or set `problem`."""
        self.place, self.problem = place, place.problem
        if not (place.problem or place.waits()):
            try:
                self.run.update()
            except RunError as error:
                self.problem = str(error)

    def lines(self, runs: list[Progress], width: int, marks: Marks) -> list[str]:
        """All of it, or a few lines where it is one of several runs."""
        job = self.place.log.told if self.place.log else None
        if not self.run.known:
            return panel.waiting(self.place.path, job, width) if job else [self.problem]
        if len(runs) == 1:
            return panel.block(self.run, job, self.problem, width, marks)
        return panel.short(
            self.run, job, self.problem, panel.differing(self.run, runs), width, marks
        )

    def done(self) -> bool:
        """Return whether the run is done or cannot be read."""
        return self.run.state() == "done" if self.run.known else bool(self.problem)


class Watch:
    """The runs at some paths, read repeatedly."""

    def __init__(self, paths: list[Path]):
        self.paths, self.logs = paths, discover.Logs()
        self.shown: dict[str, Shown] = {}

    def look(self) -> None:
        """Find runs, also new ones, and read their new records."""
        found = {
            os.path.realpath(place.path): place for path in self.paths for place in self.find(path)
        }
        kept = {key: shown for key, shown in self.shown.items() if shown.run.known}
        places = found | {key: shown.place for key, shown in kept.items() if key not in found}
        self.shown = {key: kept.get(key) or Shown(place) for key, place in places.items()}
        for key, shown in self.shown.items():
            shown.look(places[key])

    def find(self, path: Path) -> list[Place]:
        """The runs at a path, or why there are none."""
        try:
            return discover.find(path, self.logs)
        except RunError as error:
            return [Place(path, problem=str(error))]

    def begin(self) -> None:
        """Look for the first time. RunError: there is nothing to show."""
        self.look()
        if all(shown.problem and not shown.run.known for shown in self.shown.values()):
            raise RunError(next(shown.problem for shown in self.shown.values()))

    def lines(self, width: int, marks: Marks, bold: bool) -> list[str]:
        """What is shown: a run in full, several in a few lines each."""
        runs = [shown.run for shown in self.shown.values()]
        lines: list[str] = []
        for shown in self.shown.values():
            heading, *rest = (
                panel.cut(line, width, marks) for line in shown.lines(runs, width, marks)
            )
            lines += [""] * bool(lines) + [f"\033[1m{heading}\033[m" if bold else heading, *rest]
        return lines

    def done(self) -> bool:
        """Return whether all runs are done."""
        return all(shown.done() for shown in self.shown.values())


def follow(watch: Watch, every: float, marks: Marks, bold: bool) -> None:
    """Redraw on the terminal until all runs are done; the last picture stays."""
    try:
        with Screen() as screen:
            while not watch.done():
                width, height = shutil.get_terminal_size()
                screen.draw(watch.lines(width, marks, bold), height)
                screen.wait(every)
                watch.look()
    except KeyboardInterrupt:
        pass
    print("\n".join(watch.lines(shutil.get_terminal_size().columns, marks, bold)))


def marks_for(encoding: str | None) -> Marks:
    """The marks that an encoding has."""
    try:
        "".join(panel.UNICODE).encode(encoding or "ascii")
        return panel.UNICODE
    except (UnicodeError, LookupError):
        return panel.ASCII


def seconds(text: str) -> float:
    """The value of --every."""
    value = float(text)
    if not 0.1 <= value <= 86400:
        raise ValueError
    return value


def watch_runs(argv: list[str] | None) -> None:
    """Read the command line, and show. RunError: there is nothing to show."""
    parser = Parser(
        prog="mgd-watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        type=expand,
        help="a run's folder, a folder that holds runs, or a job's log",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--once", action="store_true", help="show once; the default if the output is not a terminal"
    )
    how.add_argument(
        "--every",
        type=seconds,
        metavar="SECONDS",
        help=f"update interval (default: {EVERY:.0f})",
    )
    given = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    watch = Watch(list(map(Path, given.runs)))
    watch.begin()
    terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    marks, bold = marks_for(sys.stdout.encoding), terminal and not os.environ.get("NO_COLOR")
    if terminal and not given.once:
        follow(watch, given.every or EVERY, marks, bold)
        return
    print("\n".join(watch.lines(shutil.get_terminal_size().columns, marks, bold)), flush=True)
    try:
        while given.every and not watch.done():
            time.sleep(given.every)
            watch.look()
            print(
                "\n" + "\n".join(watch.lines(shutil.get_terminal_size().columns, marks, bold)),
                flush=True,
            )
    except KeyboardInterrupt:
        pass


def main(argv: list[str] | None = None) -> None:
    """Run `mgd-watch` on the command line's options."""
    with reported():
        watch_runs(argv)
