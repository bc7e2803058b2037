"""Shows in a terminal how runs go: progress, loss, speed, time left, checkpoints, refreshes, warnings.

mgd-watch RUN...        RUN: a run's folder, a folder that holds runs, or a SLURM job's log
"""

import argparse
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

from job.errors import RunError
from job.options import Parser
from job.show import panel, places
from job.show.follow import Follower
from job.show.places import JobLog
from job.show.progress import Progress

EVERY = 3.0  # s


class Watch:
    """The runs at some paths, looked at again and again."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.runs: dict[Path, tuple[Progress, Follower[JobLog] | None]] = {}

    def look(self) -> None:
        """Find runs, as more may have begun, and read what is new. RunError: there is none, or one cannot be read."""
        for folder, log in (place for path in self.paths for place in places.find(path)):
            if folder.resolve() not in self.runs:
                self.runs[folder.resolve()] = (Progress(folder), log)
        for run, log in self.runs.values():
            run.update()
            if log:
                log.update()

    def lines(self, width: int, marks: tuple[str, str], bold: bool) -> list[str]:
        """What is shown: a run in full, several in a few lines each."""
        show = panel.block if len(self.runs) == 1 else panel.short
        lines: list[str] = []
        for run, log in self.runs.values():
            heading, *rest = show(run, log.told if log else None, width, marks)
            lines += [""] * bool(lines) + [f"\033[1m{heading}\033[m" if bold else heading, *rest]
        return lines

    def done(self) -> bool:
        """Whether none has anything to go on with."""
        return all(run.state() == "done" for run, _ in self.runs.values())


class Screen:
    """A terminal's second screen, which leaves the first as it was."""

    def __enter__(self) -> "Screen":
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer)
        signal.signal(signal.SIGWINCH, lambda *_: None)  # the pipe wakes `wait`
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        print("\033[?1049h\033[?7l\033[?25l", end="", flush=True)  # other screen, no wrapping, no cursor
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        print("\033[?25h\033[?7h\033[?1049l", end="", flush=True)

    def draw(self, lines: list[str], height: int) -> None:
        """Write over what is there."""
        if len(lines) > height - 1:
            lines = [*lines[: height - 2], f"({len(lines) - height + 2} more lines: a taller window, or --once, shows them)"]
        print("\033[H" + "".join(f"{line}\033[K\n" for line in lines) + "\033[J", end="", flush=True)

    def wait(self, seconds: float) -> None:
        """Wait, but not when the window has changed its size."""
        if select.select([self.reader], [], [], seconds)[0]:
            os.read(self.reader, 1024)


def follow(watch: Watch, every: float, marks: tuple[str, str], bold: bool) -> None:
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


def marks_for(encoding: str | None) -> tuple[str, str]:
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
    parser = Parser(prog="mgd-watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=Path, help="a run's folder, a folder that holds runs, or a job's log"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--once", action="store_true", help="show once; so it is where the output is no terminal")
    how.add_argument("--every", type=seconds, metavar="SECONDS", help=f"how often to look again (default: {EVERY:.0f})")
    given = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    watch = Watch(given.runs)
    watch.look()
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
            print("\n" + "\n".join(watch.lines(shutil.get_terminal_size().columns, marks, bold)), flush=True)
    except KeyboardInterrupt:
        pass


def main(argv: list[str] | None = None) -> None:
    """Run `mgd-watch` on the command line's options."""
    try:
        watch_runs(argv)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)


if __name__ == "__main__":
    main()
