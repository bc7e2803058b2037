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

MOST_FOLDERS = 10_000  # of one log: an array's jobs may write to the same one
FILES = ("config.yaml", "metrics.jsonl", "log.txt")
# In the logs of earlier versions, which have no records.
OLD_FOLDER = re.compile(r"\S+: run's folder: (.*)")


class JobLog:
    """The log of a SLURM job: its number of tries, the folders of its runs, and the last try.

    Of the last try: decision: whether the job was requeued, and why. last_line: the job script's
    last line. error: the last error.
    """

    def __init__(self) -> None:
        self.tries = 0
        self.nodes = self.decision = self.last_line = self.error = ""
        self.folders: dict[Path, None] = {}

    def add(self, lines: bytes) -> None:
        """Add complete lines."""
        for line in lines.decode(errors="surrogateescape").split("\n"):
            text = "".join(text for _, text in history.read_lines(line))
            kind, record = (line.startswith('{"kind": ') and history.read_record(line)) or ("", {})
            if kind == "try":
                self.start(*(record[name] for name in ("number", "nodes", "run")))
            elif kind == "decision":
                status = f", exit status {record['status']}" if "status" in record else ""
                self.decision = record["reason"][: history.LONGEST_LINE] + status
            elif match := OLD_FOLDER.fullmatch(text):
                self.start(self.tries + 1, "unknown nodes", match[1])
            elif text:
                self.last_line = text
            elif line.startswith("error: "):
                self.error = line[: history.LONGEST_LINE]

    def start(self, number: int, nodes: str, folder: str) -> None:
        """Add the start of a try."""
        self.tries, self.nodes = number, nodes
        self.decision = self.last_line = self.error = ""
        if len(self.folders) < MOST_FOLDERS:
            self.folders[Path(folder)] = None

    def describe(self) -> list[str]:
        """Return the job in up to three lines, or only its tries if the log is of several jobs."""
        lines = [f"try {self.tries} on {self.nodes}" if self.tries else "no try yet"]
        if len(self.folders) < 2:
            lines += [f"decision: {self.decision}"] if self.decision else []
            lines += [f"last line: {self.last_line}"] if self.last_line else []
        return lines


Logs = dict[Path, Follower[JobLog]]


@dataclasses.dataclass
class Source:
    """A run's folder, or the log of a job whose run has not started.

    log: the log of its job, if known. problem: why the run cannot be read.
    """

    path: Path
    log: Follower[JobLog] | None = None
    problem: str = ""

    def waits(self) -> bool:
        """Return whether the job's run has not started."""
        return self.log is not None and not is_run(self.path)


def find(path: Path, logs: Logs) -> list[Source]:
    """Return the runs at `path`. logs: cache of the job logs read. RunError: there are no runs."""
    if os.path.isfile(path):
        return find_in_log(path, logs)
    if not os.path.isdir(path):
        raise RunError(
            f"{path}: no such file or folder; expected a run's folder, a folder that holds runs, "
            "or a SLURM job's log"
        )
    if is_run(path):
        return [Source(path)]
    sources = {os.path.realpath(folder): Source(folder) for folder in inside(path, {})}
    for file in sorted(filter(os.path.isfile, path.glob("*.log")), key=natural):
        try:
            logged = named_runs(file, logs)
        except RunError as error:
            logged = [Source(file, problem=str(error))]
        sources |= {os.path.realpath(source.path): source for source in logged}
    if not sources:
        raise RunError(
            f"{path} holds no run and no log of a SLURM job; expected config.yaml, metrics.jsonl "
            "or log.txt there or below"
        )
    return list(sources.values())


def is_run(folder: Path) -> bool:
    """Return whether a folder has a run's files."""
    return any(os.path.exists(folder / name) for name in FILES)


def natural(path: Path) -> list:
    """Return a key that sorts names by their numbers: 2 before 10."""
    return [
        (int(text), "") if text.isdecimal() else (-1, text)
        for text in re.split(r"(\d+)", path.name)
        if text
    ]


def inside(path: Path, seen: dict[str, int], depth: int = 3) -> Iterator[Path]:
    """Yield the runs below a folder. seen: {resolved path: depth}, which ends loops of links."""
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


def find_in_log(path: Path, logs: Logs) -> list[Source]:
    """Return the runs that a job's log names, or the log itself if the run has not started.

    RunError: not a SLURM job log, or the run folder it names does not exist here.
    """
    if sources := named_runs(path, logs):
        return sources
    if is_run(path.parent):
        return [Source(path.parent)]
    if os.path.getsize(path) == 0:
        return [Source(path, logs[path])]
    raise RunError(
        f"{path} names no run folder that exists here; expected the log of a SLURM job. "
        "Give the run's folder"
    )


def named_runs(path: Path, logs: Logs) -> list[Source]:
    """Return the existing runs that a job's log names, or the log itself before its first try."""
    log = logs.setdefault(path, Follower(path, JobLog))
    log.update()
    job = log.content
    if not job.tries and (job.last_line or job.error):
        return [Source(path, log)]
    return [Source(folder, log) for folder in job.folders if os.path.isdir(folder)]
