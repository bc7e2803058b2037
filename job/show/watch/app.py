"""Show runs in a terminal: progress, loss, speed, time left, checkpoint, refresh, warnings.

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
from job.show.read.discover import Source
from job.show.read.ends import reported
from job.show.watch import panel
from job.show.watch.panel import Marks
from job.show.watch.screen import Screen
from job.show.watch.state import Progress

EVERY = 3.0  # s


class WatchedRun:
    """A run, or a job whose run has not started. problem: why it cannot be read, or ""."""

    def __init__(self, source: Source):
        self.source, self.run, self.problem = source, Progress(source.path), ""

    def update(self, source: Source) -> None:
        """Read new records, or set `problem`."""
        self.source, self.problem = source, source.problem
        if not (source.problem or source.waits()):
            try:
                self.run.update()
            except RunError as error:
                self.problem = str(error)

    def lines(self, runs: list[Progress], width: int, marks: Marks) -> list[str]:
        """Return all its lines, or a few if it is one of several runs."""
        job = self.source.log.content if self.source.log else None
        if not self.run.known:
            return panel.waiting(self.source.path, job, width) if job else [self.problem]
        if len(runs) == 1:
            return panel.block(self.run, job, self.problem, width, marks)
        return panel.short(
            self.run, job, self.problem, panel.differing(self.run, runs), width, marks
        )

    def done(self) -> bool:
        """Return whether the run is done or cannot be read."""
        return self.run.state() == "done" if self.run.known else bool(self.problem)


class Watch:
    """The runs at some paths. `update` reads them again. runs: {resolved path: run}."""

    def __init__(self, paths: list[Path]):
        self.paths, self.logs = paths, discover.Logs()
        self.runs: dict[str, WatchedRun] = {}

    def update(self) -> None:
        """Find runs, also new ones, and read their new records."""
        found = {
            os.path.realpath(source.path): source
            for path in self.paths
            for source in self.find(path)
        }
        kept = {key: watched for key, watched in self.runs.items() if watched.run.known}
        missing = {key: watched.source for key, watched in kept.items() if key not in found}
        sources = found | missing
        self.runs = {key: kept.get(key) or WatchedRun(source) for key, source in sources.items()}
        for key, watched in self.runs.items():
            watched.update(sources[key])

    def find(self, path: Path) -> list[Source]:
        """Return the runs at a path, or a source with the problem."""
        try:
            return discover.find(path, self.logs)
        except RunError as error:
            return [Source(path, problem=str(error))]

    def start(self) -> None:
        """Read the runs for the first time. RunError: no run is readable."""
        self.update()
        if all(watched.problem and not watched.run.known for watched in self.runs.values()):
            raise RunError(next(watched.problem for watched in self.runs.values()))

    def lines(self, width: int, marks: Marks, bold: bool) -> list[str]:
        """Return all lines of one run, or a few lines for each of several."""
        runs = [watched.run for watched in self.runs.values()]
        lines: list[str] = []
        for watched in self.runs.values():
            heading, *rest = (
                panel.cut(line, width, marks) for line in watched.lines(runs, width, marks)
            )
            lines += [""] * bool(lines) + [f"\033[1m{heading}\033[m" if bold else heading, *rest]
        return lines

    def done(self) -> bool:
        """Return whether all runs are done."""
        return all(watched.done() for watched in self.runs.values())


def follow(watch: Watch, every: float, marks: Marks, bold: bool) -> None:
    """Redraw on the terminal until all runs are done, and leave the last lines on it."""
    try:
        with Screen() as screen:
            while not watch.done():
                width, height = shutil.get_terminal_size()
                screen.draw(watch.lines(width, marks, bold), height)
                screen.wait(every)
                watch.update()
    except KeyboardInterrupt:
        pass
    print("\n".join(watch.lines(shutil.get_terminal_size().columns, marks, bold)))


def marks_for(encoding: str | None) -> Marks:
    """Return the marks that an encoding can represent."""
    try:
        "".join(panel.UNICODE).encode(encoding or "ascii")
        return panel.UNICODE
    except (UnicodeError, LookupError):
        return panel.ASCII


def seconds(text: str) -> float:
    """Parse the value of --every. ValueError: not a number from 0.1 to 86400."""
    value = float(text)
    if not 0.1 <= value <= 86400:
        raise ValueError
    return value


def watch_runs(argv: list[str] | None) -> None:
    """Parse the command line and show the runs. RunError: no run is readable."""
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
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--once", action="store_true", help="show once; the default if the output is not a terminal"
    )
    mode.add_argument(
        "--every",
        type=seconds,
        metavar="SECONDS",
        help=f"update interval (default: {EVERY:.0f})",
    )
    arguments = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    watch = Watch(list(map(Path, arguments.runs)))
    watch.start()
    terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    marks, bold = marks_for(sys.stdout.encoding), terminal and not os.environ.get("NO_COLOR")
    if terminal and not arguments.once:
        follow(watch, arguments.every or EVERY, marks, bold)
        return
    print("\n".join(watch.lines(shutil.get_terminal_size().columns, marks, bold)), flush=True)
    try:
        while arguments.every and not watch.done():
            time.sleep(arguments.every)
            watch.update()
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
