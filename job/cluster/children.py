"""The processes that this one has started through multiprocessing."""

import atexit
import multiprocessing
import time

REAPED = 2.0  # s in which the end of a process shows


@atexit.register
def end_children() -> bool:
    """Kill this process's children; return whether all have ended. One whose read blocks in the kernel does not end."""
    processes = multiprocessing.active_children()
    for process in processes:
        process.kill()
    deadline = time.monotonic() + REAPED
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return not multiprocessing.active_children()
