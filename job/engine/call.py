"""Runs that Python code calls: a script or a notebook, whose process continues afterwards."""

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from job import output
from job.checkpoints.folder import LAST
from job.cluster.stop import Stopped
from job.engine.process_state import kept_state
from job.engine.run import Run
from job.errors import RunError

RESUME = 'stopped by a signal; resume="auto" continues from here'

in_progress = threading.Lock()


@dataclass(frozen=True)
class Result:
    """What a run has left.

    folder: of the run. checkpoint: the newest, or "" if there is none.
    numbers: the newest losses and accuracies, by their names in metrics.jsonl.
    """

    folder: str
    checkpoint: str
    numbers: dict[str, float]


def result(run: Run, numbers: Mapping[str, float] | None = None) -> Result:
    """Return what a run has left, on all workers. A collective.

    numbers: by default those of its records.
    """

    def find() -> tuple[str, dict[str, float]]:
        last = os.path.join(run.folder, LAST)
        found = run.log.newest() if numbers is None else dict(numbers)
        return last if os.path.exists(last) else "", found

    return Result(run.folder, *run.on_first(find))


@contextlib.contextmanager
def called(run: Run, incomplete: str = "") -> Iterator[Run]:
    """Enter a run, and leave the process as it was before.

    incomplete: the message of KeyboardInterrupt if a stopped run saves nothing.
    RunError: another run is in progress in this process, or what the run raises.
    KeyboardInterrupt, on all workers: a signal, such as Ctrl-C's, came to one. The run has saved
    what it can.
    """
    if not in_progress.acquire(blocking=False):
        problem = "another run is in progress in this process; expected one at a time"
        raise RunError(f"{problem}. Wait for its end")
    try:
        with kept_state(), output.guarded(output.ignore):
            run.called = True
            with run:
                try:
                    yield run
                    return
                except Stopped:
                    if not incomplete:
                        run.stopped()
    finally:
        in_progress.release()
    raise KeyboardInterrupt(incomplete or RESUME)
