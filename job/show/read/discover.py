"""Find runs: in a run's folder, a folder of runs, or the run folders that a SLURM log names."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from job.errors import RunError
from job.show.read import history
from job.show.read.tail import Follower

MOST_FOLDERS = 10_000  # of one log: an array's jobs may share it
FILES = ("config.yaml", "metrics.jsonl", "log.txt")
OLD_FOLDER = re.compile(
    r"\S+: run's folder: (.*)"
)  # in the logs of earlier versions, which have no records


class JobLog:
    """The log of a SLURM job: its tries, the folders of its runs, and the end of the last try.

    decision: why the job was requeued, or was not. said: the job script's last line. error: the
    last error. All three are of the last try.
    """

    def __init__(self) -> None:
        self.tries, self.nodes, self.decision, self.said, self.error = 0, "", "", "", ""
        self.folders: dict[Path, None] = {}

    def add(self, lines: bytes) -> None:
        """Take in whole lines."""
        for line in lines.decode(errors="surrogateescape").split("\n"):
            said = "".join(text for _, text in history.read_lines(line))
            kind, record = (line.startswith('{"kind": ') and history.read_record(line)) or ("", {})
            if kind == "try":
                self.begin(*(record[name] for name in ("number", "nodes", "run")))
            elif kind == "decision":
                status = f", exit status {record['status']}" if "status" in record else ""
                self.decision = record["reason"][: history.LONGEST_LINE] + status
            elif match := OLD_FOLDER.fullmatch(said):
                self.begin(self.tries + 1, "nodes not known", match[1])
            elif said:
                self.said = said
            elif line.startswith("error: "):
                self.error = line[: history.LONGEST_LINE]

    def begin(self, number: int, nodes: str, folder: str) -> None:
        """Take in the start of a try."""
        self.tries, self.nodes, self.decision, self.said, self.error = number, nodes, "", "", ""
        if len(self.folders) < MOST_FOLDERS:
            self.folders[Path(folder)] = None

    def describe(self) -> list[str]:
        """Return the job in up to three lines; only the first if the log is one of several jobs."""
        lines = [f"try {self.tries} on {self.nodes}" if self.tries else "no try yet"]
        if len(self.folders) < 2:
            lines += [f"decision: {self.decision}"] if self.decision else []
            lines += [f"said: {self.said}"] if self.said else []
        return lines


Logs = dict[Path, Follower[JobLog]]


@dataclasses.dataclass
class Place:
    """A run's folder, or the log of a job without a run yet.

    log: the log of its job, if known. problem: why the run cannot be read.
    """

    path: Path
    log: Follower[JobLog] | None = None
    problem: str = ""

    def waits(self) -> bool:
        """Return whether the job has no run yet."""
        return self.log is not None and not is_run(self.path)


def find(path: Path, logs: Logs) -> list[Place]:
    """Return the runs at `path`. logs: cache of the job logs read. RunError: there are no runs."""
    if os.path.isfile(path):
        return of_log(path, logs)
    if not os.path.isdir(path):
        raise RunError(
            f"{path}: no such file or folder. Give a run's folder, a folder that holds runs, or a SLURM job's log"
        )
    if is_run(path):
        return [Place(path)]
    found = {os.path.realpath(folder): Place(folder) for folder in inside(path, {})}
    for file in sorted(filter(os.path.isfile, path.glob("*.log")), key=natural):
        try:
            places = runs_of(file, logs)
        except RunError as error:
            places = [Place(file, problem=str(error))]
        found |= {os.path.realpath(place.path): place for place in places}
    if not found:
        raise RunError(
            f"{path} holds no run, and no log of a SLURM job: no config.yaml, metrics.jsonl or log.txt there or below"
        )
    return list(found.values())


def is_run(folder: Path) -> bool:
    """Whether a folder has a run's files."""
    return any(os.path.exists(folder / name) for name in FILES)


def natural(path: Path) -> list:
    """Sorts 2 before 10."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d+)", path.name)
        if part
    ]


def inside(path: Path, seen: dict[str, int], depth: int = 3) -> Iterator[Path]:
    """Yield the runs in a folder's folders. seen: {resolved path: depth}, against loops of links."""
    if seen.get(os.path.realpath(path), 0) >= depth:
        return
    seen[os.path.realpath(path)] = depth
    with contextlib.suppress(OSError):
        for folder in sorted(
            (entry for entry in path.iterdir() if os.path.isdir(entry) and entry.name[0] != "."),
            key=natural,
        ):
            if is_run(folder):
                yield folder
            elif depth > 1:
                yield from inside(folder, seen, depth - 1)


def of_log(path: Path, logs: Logs) -> list[Place]:
    """Return the runs that a job's log names, or the log itself if the job has no run yet.

    RunError: not a SLURM job log, or the run folder it names does not exist here.
    """
    if found := runs_of(path, logs):
        return found
    if is_run(path.parent):
        return [Place(path.parent)]
    if os.path.getsize(path) == 0:
        return [Place(path, logs[path])]
    raise RunError(
        f"{path} names no run's folder that is here: expected the log of a SLURM job. Give the run's folder"
    )


def runs_of(path: Path, logs: Logs) -> list[Place]:
    """Return the existing runs that a job's log names, or the log itself if no try has started."""
    log = logs.setdefault(path, Follower(path, JobLog))
    log.update()
    told = log.told
    if not told.tries and (told.said or told.error):
        return [Place(path, log)]
    return [Place(folder, log) for folder in told.folders if os.path.isdir(folder)]
