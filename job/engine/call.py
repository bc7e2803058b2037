"""Runs started by Python code, such as a notebook, whose process continues afterwards."""

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
    """The results of a run.

    folder: of the run. checkpoint: the path of the newest, or "" if there is none.
    numbers: the newest losses and accuracies, by their names in metrics.jsonl.
    """

    folder: str
    checkpoint: str
    numbers: dict[str, float]


def result(run: Run, numbers: Mapping[str, float] | None = None) -> Result:
    """Return a run's results, on all workers. A collective.

    numbers: of the result; by default the newest in the run's records.
    """

    def find() -> tuple[str, dict[str, float]]:
        last = os.path.join(run.folder, LAST)
        newest = run.log.newest() if numbers is None else dict(numbers)
        return last if os.path.exists(last) else "", newest

    return Result(run.folder, *run.on_first(find))


@contextlib.contextmanager
def called(run: Run, incomplete: str = "") -> Iterator[Run]:
    """Enter a run, and restore the process's settings afterwards.

    incomplete: the message of KeyboardInterrupt if a stopped run saves nothing.
    RunError: another run is in progress in this process, or the run raised one.
    KeyboardInterrupt, on all workers: one received a signal, for example by Ctrl-C. The run has
    saved its checkpoint.
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
