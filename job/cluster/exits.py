"""The end of a worker: its error line, exit code, and wait for another worker's line."""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from job import output
from job.cluster import comm, device_errors, task
from job.cluster.children import end_children
from job.cluster.stop import in_main_thread
from job.cluster.watchdog import raised_at
from job.errors import RunError, StartError, WorkerError

# s until a rank prints an error that rank 0 may print too. By then the launcher has ended all
# workers, even on busy nodes.
PATIENCE = 15

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@contextlib.contextmanager
def left_at_signals() -> Iterator[None]:
    """End this process PATIENCE s after a signal if not all workers have started by then.

    SIGUSR2 does not end the process: that signal requests that a run saves and stops.
    Horovod's start is one call that waits for all workers, and Python's own signal handlers run
    only after it. Outside the main thread, where Python receives no signals, this has no effect.
    """
    if not in_main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    started = threading.Event()

    def watch() -> None:
        with open(reader, "rb", buffering=0) as signals:
            numbers = (number[0] for number in iter(lambda: signals.read(1), b""))
            ending = next((number for number in numbers if number != signal.SIGUSR2), 0)
            if ending and not started.wait(PATIENCE):
                own = f"rank {task.launched()[1]} on {task.node()}"
                name = signal.Signals(ending).name
                print(f"{own}: ended by {name} before all workers had started", flush=True)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        started.set()


def follow_stdin() -> None:
    """End this process when its standard input closes.

    Otherwise a container would outlive its killed client.
    """
    while os.read(0, 4096):
        pass
    os._exit(1)


def leave(code: int, at_once: bool = False) -> NoReturn:
    """End the program. Skip Python's cleanup if a loader process does not end or NCCL is in use.

    The cleanup would wait for that process. It would also destroy NCCL's communicators, which
    waits for workers that are gone.

    at_once: always skip the cleanup.
    """
    ended = end_children()
    if ended and not at_once and not comm.uses_nccl():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def device_error(
    error: BaseException | None,
    options: Mapping[str, Any] = NO_OPTIONS,
) -> device_errors.DeviceError | None:
    """Return the error that ends this worker if its GPU or NCCL failed, or None.

    options: of the program, by name. The error suggests changes of them.
    """
    if error is None or not device_errors.kind(error):
        return None
    return device_errors.describe(error, raised_at(error), options)


def end_worker(error: WorkerError, rank: int, own: str) -> NoReturn:
    """End the program with an error that only this worker has.

    If all workers run out of memory at once, rank 0 prints its line, and the launcher ends the
    others.

    own: rank and node, for the line.
    """
    if isinstance(error, device_errors.DeviceError):
        if rank:
            time.sleep(2)
        if error.kind == device_errors.GPU:
            traceback.print_exception(error.__cause__)
    print(f"error: {own}{error}", file=sys.stderr, flush=True)
    leave(error.code, at_once=True)


def wait_for_rank_0(code: int) -> None:
    """Wait until rank 0 has printed an error of its own, which may be the same one.

    srun's exit code is the highest of all ranks. It ends the others by SIGTERM, which would count
    as 143. End with the error's code instead.
    """
    signal.signal(signal.SIGTERM, lambda *_: leave(code, at_once=True))
    time.sleep(PATIENCE)
    ignore_sigterm()  # another rank may end now, before rank 0


def wait_for_slower_ranks() -> None:
    """Wait under srun until slower ranks can end with an exit code of their own.

    srun ends them by SIGTERM when this rank ends, which would count as 143. If another rank ends
    first, this rank ends with the error's code too.
    """
    if under_srun():
        ignore_sigterm()
        time.sleep(2)


def under_srun() -> bool:
    """Return whether this process is one of several tasks of srun."""
    launcher, _, size = task.launched()
    return launcher == "srun" and size > 1


def ignore_sigterm() -> None:
    """Ignore SIGTERM until this process has ended.

    A handler in Python would not last so long: Python restores the default before its cleanup,
    and SIGTERM would replace the exit code by 143.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_in_order(error: RunError, rank: int, own: str) -> NoReturn:
    """End the program with an error that other ranks may have too: rank 0 is the first.

    own: rank and node, for the line.
    """
    if rank:
        wait_for_rank_0(error.code)
    print(f"error: {own}{error}", file=sys.stderr, flush=True)
    if not rank:
        wait_for_slower_ranks()
    leave(error.code)


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """End the program on an error, with one line and the error's exit code.

    Only rank 0 prints an error that all workers have. An error of this worker only is printed by
    this worker, with rank and node. If another worker has caused the end, its line should be the
    first: this worker waits before it prints, and in most cases the launcher ends it meanwhile.
    """
    _, rank, size = task.launched()
    own = f"rank {rank} on {task.node()}: " if size > 1 else ""
    with output.guarded():
        if rank:
            output.may_fail(output.ignore)  # rank 0 prints the results
        try:
            yield
        except StartError as error:
            end_in_order(error, rank, own)
        except WorkerError as error:
            end_worker(error, rank, own)
        except RunError as error:
            if rank and comm.size() > 1:  # all workers have the error, and rank 0 prints it
                # The launcher ends all workers when the first one ends. Let rank 0 print before
                # that, and ignore the launcher's signal to end with the error's exit code.
                ignore_sigterm()
                time.sleep(2)
                leave(error.code)
            end_in_order(error, rank, own if rank else "")
        except comm.WorkerGone as error:
            if under_srun():
                ignore_sigterm()  # the other worker's exit code counts
            time.sleep(2)
            print(f"error: {own}{error}", file=sys.stderr, flush=True)
            leave(1)
        except Exception as error:
            if failure := device_error(error):
                end_worker(failure, rank, own)
            if under_srun():
                ignore_sigterm()
            traceback.print_exc()
            print(f"error: {own}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            leave(1)
