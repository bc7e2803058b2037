"""The processes that this program has started."""

import atexit
import multiprocessing
import time

REAPED = 2.0  # s to wait for killed processes


class Child(multiprocessing.context.ForkServerProcess):
    """A process of this program, not of a script that calls it."""


@atexit.register
def end_children() -> bool:
    """Kill the children, and return whether all have ended.

    A child whose read blocks in the kernel does not end.
    """
    processes = children()
    for process in processes:
        process.kill()
    deadline = time.monotonic() + REAPED
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return not children()


def children() -> list[Child]:
    """Return the children that have not ended."""
    return [process for process in multiprocessing.active_children() if isinstance(process, Child)]
