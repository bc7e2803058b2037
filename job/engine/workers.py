"""The workers of a program: device, log, stop, and collective work."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
LOG_FAILED = "log failed"  # a value of `total`
LOG_SECONDS = 5.0  # to write the last line of a worker that ends at once


class Workers:
    """This worker among all workers of the program, which `with` connects.

    rank: this worker's number. size: the number of workers. device: of this worker. log: rank 0's.
    stop: the signal to stop, if one came. options: of the program, by name; the same on all
    workers.
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
            # The log may be on a file system that hangs, which may be the error of this worker or
            # of one that is gone.
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
        """Print this worker's warning, or the error that ends the run. Rank 0 also records it."""
        if self.rank == 0:
            self.log.remark(kind, id, text)
        else:
            print(f"{kind}: {text}", flush=True)

    def warn(self, id: str, text: str) -> None:
        """Print this worker's warning with its rank and node. Rank 0 also records it."""
        own = f"rank {self.rank} on {task.node()}: " if self.rank else ""
        self.remark("warning", id, f"{own}{text}")

    def batches(self, views: Views, draws: Iterable[Sequence], processes: int) -> Batches:
        """Return an iterator over batches on the CPU.

        draws: the indices of `views` in each batch. processes: that load images.
        """
        warn = partial(self.warn, "slow_images")
        return Batches(
            views, draws, processes, self.device.type == "cuda", self.stop, launch.patience(), warn
        )

    def rounds(self, count: int) -> Iterator[int]:
        """Yield 1 to `count`; a signal to any worker ends the loop on all. A collective.

        After each round the workers sum their signals to stop. The sum overlaps the next round.
        Stopped, on all workers after the same round: a signal came.
        """
        signals = None
        for done in range(1, count + 1):
            yield done
            self.check_stop(signals)
            mine = torch.tensor([self.stop.signal is not None]).int()
            signals = comm.begin_sum_(mine, "stop")
        self.check_stop(signals)

    def check_stop(self, signals: comm.Pending | None) -> None:
        """Wait for a sum of signals, if there is one. Stopped: it is not 0."""
        if signals and comm.wait(signals).item():
            raise Stopped

    def own_batch(self, total: int) -> int:
        """Return the number of images of a total batch that are this worker's.

        RunError: the workers cannot share the batch equally.
        """
        if total % self.size:
            below, above = total - total % self.size, total + self.size - total % self.size
            raise RunError(
                f"--batch-size {total} cannot be shared equally by {self.size} workers: choose "
                f"{below or above} or {above}"
            )
        return total // self.size

    def autocast(self, precision: str) -> torch.autocast:
        """Return a context that runs networks in a precision, float32 or bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Call `work()` on rank 0, and return its result on all workers. A collective.

        RunError, on all workers: `work()` raised a RunError or an OSError.
        """
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
        """Call `work()` on all workers, and return this worker's result. A collective.

        RunError, on all workers: `work()` failed on one. The line is of the first such worker.
        """
        problem, code = "", 0
        try:
            result = work()
        except RunError as error:
            problem, code = str(error), error.code
        problems = allgather((task.node(), problem, code), "problems")
        failed = [(rank, *each) for rank, each in enumerate(problems) if each[1]]
        if failed:
            rank, node, problem, code = failed[0]
            where = f"rank {rank} on {node}: " if len(failed) < self.size else ""
            raise RunError(f"{where}{problem}", code)
        return result

    def build(self, arch: str, work: Callable[[], Result]) -> Result:
        """Call `work()`, which builds the network `arch`, and return its result. A collective.

        RunError, on all workers: `work()` failed on one, or the version of the network's package
        differs there.
        """
        same_start.check_versions(used_packages(arch), task.node())
        return self.on_all(work)

    def total(self, **values: torch.Tensor | float) -> dict[str, float]:
        """Return the sums of `values` over all workers. A collective.

        values: the same names on all workers.
        RunError, on all workers: rank 0 could not write its log.
        """
        sums = totals(values | {LOG_FAILED: self.log.failure is not None}, self.device)
        if sums.pop(LOG_FAILED):
            self.on_first(self.log.check)
        return sums
