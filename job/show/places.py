"""Where runs are: a run's folder, a folder that holds some, or the log of a SLURM job, which says where its run is."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from job.errors import RunError
from job.show import curves
from job.show.follow import Follower

FILES = ("config.yaml", "metrics.jsonl", "log.txt")
TRY = re.compile(r"\S+: try (\d+) on (\S+), runtime \w+: (.*)")
OUT = re.compile(r" --out (.+?)(?= --|$)")


class JobLog:
    """What the log of a SLURM job tells: its tries, the folders of its runs, and its own last line."""

    def __init__(self) -> None:
        self.tries, self.nodes, self.said, self.error = 0, "", "", ""
        self.folders: dict[Path, None] = {}

    def add(self, lines: bytes) -> None:
        """Take in whole lines."""
        text = lines.decode(errors="backslashreplace")
        for _, said in curves.read_lines(text):
            if match := TRY.fullmatch(said):
                self.tries, self.nodes = int(match[1]), match[2]
                if found := OUT.findall(match[3]):
                    self.folders[Path(found[-1])] = None
            else:
                self.said = said
        for line in text.split("\n"):
            if line.startswith("error: "):
                self.error = line

    def describe(self) -> str:
        """The job in a line."""
        if not self.tries:
            return self.said or "has not begun its first try"
        said = f"; it last said: {self.said}" if self.said and len(self.folders) < 2 else ""
        return f"try {self.tries} on {self.nodes}{said}"


Place = tuple[Path, Follower[JobLog] | None]  # a run's folder, and the log of its job if that is known


def find(path: Path) -> list[Place]:
    """The runs at `path`. RunError: there are none."""
    if path.is_file():
        return of_log(path)
    if not path.is_dir():
        raise RunError(f"{path}: no such file or folder; give a run's folder, one that holds runs, or a SLURM job's log")
    if is_run(path):
        return [(path, None)]
    found = {folder.resolve(): (folder, None) for folder in inside(path)} | {
        folder.resolve(): (folder, log) for file in sorted(path.glob("*.log"), key=natural) for folder, log in runs_of(file)
    }
    if not found:
        raise RunError(f"{path} holds no run, and no log of a SLURM job: no config.yaml, metrics.jsonl or log.txt there or below")
    return list(found.values())


def is_run(folder: Path) -> bool:
    """Whether a folder has a run's files."""
    return any((folder / name).is_file() for name in FILES)


def natural(path: Path) -> list:
    """Sorts 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name) if part]


def inside(path: Path, depth: int = 2) -> Iterator[Path]:
    """The runs in a folder's folders."""
    with contextlib.suppress(OSError):
        for folder in sorted((entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] != "."), key=natural):
            if is_run(folder):
                yield folder
            elif depth > 1:
                yield from inside(folder, depth - 1)


def of_log(path: Path) -> list[Place]:
    """The runs that a job's log names. RunError: it is none, or its run is not here."""
    if found := runs_of(path):
        return found
    if is_run(path.parent):
        return [(path.parent, None)]
    raise RunError(f"{path} names no run's folder that is here: expected the log of a SLURM job that has begun; give the folder")


def runs_of(path: Path) -> list[Place]:
    """The runs, of those that a job's log names, whose folders are here."""
    log = Follower(path, JobLog)
    log.update()
    return [(folder, log) for folder in log.told.folders if folder.is_dir()]
