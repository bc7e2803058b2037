"""Run the parts of a session in order, each with a time limit, and write results at once.

The session's folder has results.jsonl, a JSON line for each result and verdict, and log.txt, the
output of all parts.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PASSED, FAILED, TIMED_OUT, LEFT_OUT = "passed", "FAILED", "TIMED OUT", "LEFT OUT"
LEAST = 5.0  # seconds, the least for which a part starts
GRACE = 10.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Part:
    """A part of a session.

    about: one line for people. limit: seconds. environment: additional variables.
    endless: the part uses all its time, and passes if SIGTERM ends it.
    """

    name: str
    about: str
    command: list[str]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    endless: bool = False


class Record:
    """The session's results.jsonl and log.txt."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.results, self.log = folder / "results.jsonl", folder / "log.txt"

    def line(self, text: str) -> None:
        """Print a line, and append it to the log."""
        print(text, flush=True)
        with open(self.log, "a") as file:
            file.write(text + "\n")

    def result(self, **fields: object) -> None:
        """Append a result, and wait until it is on the disk."""
        with open(self.results, "a") as file:
            file.write(json.dumps({"time": time.time(), **fields}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def execute(part: Part, limit: float, record: Record) -> tuple[str, int | None]:
    """Run a part in a process group of its own and return its verdict and exit code.

    The part's variable GPU_RESULTS names the session's results.jsonl. After `limit` seconds the
    group gets SIGTERM, and GRACE seconds later SIGKILL. No process of the group survives.
    """
    variables = os.environ | {"GPU_RESULTS": str(record.results)} | dict(part.environment)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    pipes |= {"errors": "replace", "env": variables, "start_new_session": True}
    process = subprocess.Popen(part.command, **pipes)
    reader = threading.Thread(target=copy_lines, args=(process, record), daemon=True)
    reader.start()
    timed_out = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        timed_out = True
        signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        signal_group(process.pid, signal.SIGKILL)
        code = process.wait()
    reader.join(GRACE)
    if timed_out:
        return (PASSED if part.endless else TIMED_OUT), code
    return (FAILED if code else PASSED), code


def copy_lines(process: subprocess.Popen, record: Record) -> None:
    """Print and log the output of a part."""
    assert process.stdout
    for line in process.stdout:
        record.line(f"  {line.rstrip()}")


def signal_group(group: int, number: int) -> None:
    """Send a signal to the remaining processes of a group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def run_parts(
    parts: list[Part],
    record: Record,
    total: float,
    run: Callable[[Part, float, Record], tuple[str, int | None]] = execute,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, str]:
    """Run the parts in order within `total` seconds and return their verdicts by name.

    A part that fails or times out does not end the session. If less than LEAST seconds remain, a
    part is left out.
    """
    start, verdicts = clock(), {}
    for part in parts:
        left = total - (clock() - start)
        limit = min(part.limit, left)
        if limit < LEAST:
            verdict, code, seconds = LEFT_OUT, None, 0.0
        else:
            record.line(f"{part.name}: {part.about} (at most {limit:.0f} s)")
            part_start = clock()
            try:
                verdict, code = run(part, limit, record)
            except OSError as error:  # the program of the part is missing
                record.line(f"  {error}")
                verdict, code = FAILED, None
            seconds = clock() - part_start
        verdicts[part.name] = verdict
        record.line(f"{part.name}: {verdict} after {seconds:.0f} s")
        facts = {"part": part.name, "verdict": verdict, "code": code}
        record.result(kind="verdict", **facts, seconds=round(seconds, 1), limit=round(limit, 1))
    return verdicts


def report(parts: list[Part], verdicts: dict[str, str], record: Record) -> int:
    """Print each part's verdict and return the session's exit code.

    It is 0 if all parts have passed, and 1 otherwise. An endless part may be left out.
    """
    record.line("")
    for part in parts:
        record.line(f"{verdicts[part.name]:10} {part.name:12} {part.about}")
    accepted = {part.name: {PASSED, LEFT_OUT} if part.endless else {PASSED} for part in parts}
    return 0 if all(verdicts[name] in good for name, good in accepted.items()) else 1
