"""The workers that a program runs on: device, log, the wish to stop, and collective work."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

import torch

from job.cluster import comm, exits, launch, nccl_network, preflight, same_start, task
from job.cluster.objects import allgather, broadcast
from job.cluster.stop import Stop, Stopped
from job.cluster.watchdog import Watchdog
from job.data.loader import Batches, Views
from job.engine.totals import totals
from job.errors import RunError, WorkerError
from job.metrics.log import Log
from job.networks import used_packages
from job.text import printable

Result = TypeVar("Result")
LOG_FAILED = "log failed"  # a number of `total`
LOG_SECONDS = 5.0  # to write the last line of a worker that ends at once


class Workers:
    """This worker among all that run the program. Entering connects them.

    rank, size: this worker's number, and how many there are; device: where it computes; log: of
    rank 0; stop: the wish to stop. options: of the program, by name; all workers must have the
    same.
    """

    def __init__(self, options: Mapping[str, Any] = MappingProxyType({})):
        self.options = options
        self.called = False  # by Python code, whose process continues (job/engine/call.py)

    def __enter__(self) -> Self:
        self.watchdog: Watchdog | None = None
        self.stop = Stop()  # a signal during Horovod's start takes effect at the first step
        try:
            self.device = launch.start(self.options)
            self.rank, self.size = comm.rank(), comm.size()
            self.log = Log(self.rank == 0, partial(self.stop.note, signal.SIGINT, None))
            self.setting = preflight.setting(self.device)
            if self.size > 1:
                self.watchdog = launch.watchdog(self.remark)
            self.setting["nccl"], slow = nccl_network.connect_gpus(self.device)
        except BaseException as error:
            if self.watchdog:
                self.watchdog.close()
            self.stop.restore()
            if of_device := exits.device_error(error, self.options):
                raise of_device from error
            raise
        self.log.line(preflight.line(self.setting))
        if slow:
            self.log.remark("warning", "nccl_network", slow)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        of_device = exits.device_error(error, self.options)
        error = of_device or error
        if self.watchdog:
            self.watchdog.close()
        if isinstance(error, RunError | None) and not isinstance(error, WorkerError):
            self.close_log(error)
        else:
            # The log may lie on the file system whose silence is the error, of this worker or of
            # another that is gone.
            closing = threading.Thread(target=self.close_log, args=(error,), daemon=True)
            closing.start()
            closing.join(LOG_SECONDS)
        self.stop.restore()
        if of_device:
            raise of_device
        if kind is None and not self.called:  # its next run needs the others
            comm.stop()

    def close_log(self, error: BaseException | None) -> None:
        """Write the error that ends the run to the log, and close the log."""
        if isinstance(error, Exception):
            text = (
                str(error)
                if isinstance(error, RunError | comm.WorkerGone)
                else f"{type(error).__name__}: {error}"
            )
            self.log.note(f"error: {text}")
            self.log.record(
                "end", how="error", text=printable(text), code=getattr(error, "code", 1)
            )
        self.log.close()

    def remark(self, kind: str, id: str, text: str) -> None:
        """Print a warning, or the error that ends the run, of this worker only; on rank 0 with its record."""
        if self.rank == 0:
            self.log.remark(kind, id, text)
        else:
            print(f"{kind}: {text}", flush=True)

    def warn(self, id: str, text: str) -> None:
        """Print a warning of this worker only, with its rank and node; on rank 0 with its record."""
        own = f"rank {self.rank} on {task.node()}: " if self.rank else ""
        self.remark("warning", id, f"{own}{text}")

    def batches(self, views: Views, draws: Iterable[list], processes: int) -> Batches:
        """Return an iterator over the batches of `draws`, lists of indices of `views`, on the CPU."""
        warn = partial(self.warn, "slow_images")
        return Batches(
            views, draws, processes, self.device.type == "cuda", self.stop, launch.patience(), warn
        )

    def rounds(self, count: int) -> Iterator[int]:
        """Yield 1 to `count`; a signal to any worker ends the loop of all. A collective.

        After each round the workers exchange the wish to stop. It travels during the next round.
        Stopped, on all workers after the same round: a signal came.
        """
        wish = None
        for done in range(1, count + 1):
            yield done
            self.obey(wish)
            mine = torch.tensor([self.stop.signal is not None]).int()
            wish = comm.begin_sum_(mine, "stop")
        self.obey(wish)

    def obey(self, wish: comm.Pending | None) -> None:
        """Wait for the wish to stop, if it travels. Stopped: a worker has it."""
        if wish and comm.wait(wish).item():
            raise Stopped

    def share(self, total: int) -> int:
        """Return how many images of a total batch are this worker's. RunError: the workers cannot share it equally."""
        if total % self.size:
            below, above = total - total % self.size, total + self.size - total % self.size
            raise RunError(
                f"--batch-size {total} cannot be shared equally by {self.size} workers: choose {below or above} or {above}"
            )
        return total // self.size

    def autocast(self, precision: str) -> torch.autocast:
        """A context in which networks pass in this precision, an option's: float32 or bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Return what `work()` returns on rank 0, on all ranks; what fails there for the user or the system is raised on all."""
        outcome: tuple[Any, tuple[str, int] | None] | None = None
        if self.rank == 0:
            try:
                outcome = (work(), None)
            except RunError as error:
                outcome = (None, (str(error), error.code))
            except OSError as error:
                outcome = (None, (f"{error.filename or 'a file'}: {error.strerror or error}", 2))
        result, failed = broadcast(outcome)
        if failed:
            raise RunError(*failed)
        return result

    def on_all(self, work: Callable[[], Result]) -> Result:
        """Return what `work()` returns on this worker. A collective.

        RunError, on all workers: it fails on one, with the line of the first such worker.
        """
        problem, code = "", 0
        try:
            result = work()
        except RunError as error:
            problem, code = str(error), error.code
        found = allgather((task.node(), problem, code), "problems")
        failed = [(rank, *each) for rank, each in enumerate(found) if each[1]]
        if failed:
            rank, node, problem, code = failed[0]
            where = f"rank {rank} on {node}: " if len(failed) < self.size else ""
            raise RunError(f"{where}{problem}", code)
        return result

    def build(self, arch: str, work: Callable[[], Result]) -> Result:
        """Return what `work()` builds of a network on this worker. A collective.

        RunError, on all workers: it fails on one, or another version of the network's package does
        not build the same network there.
        """
        same_start.check_versions(used_packages(arch), task.node())
        return self.on_all(work)

    def total(self, **values: torch.Tensor | float) -> dict[str, float]:
        """Return the sums of `values` over all workers. A collective: all workers call it with the same names.

        RunError, on all: rank 0's log could not be written meanwhile.
        """
        found = totals(values | {LOG_FAILED: self.log.failure is not None}, self.device)
        if found.pop(LOG_FAILED):
            self.on_first(self.log.check)
        return found
