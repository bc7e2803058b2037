"""Failures of collectives, with a fake Horovod, because its real ones abort the process."""

from types import SimpleNamespace

import pytest
import torch

from job.cluster import comm


class Internal(RuntimeError):
    """Horovod's internal error."""


def fail(*_):
    raise Internal("no route\nmore")


COLLECTIVES = {
    "allreduce_async_": lambda tensor: comm.begin_sum_(tensor, "it"),
    "allreduce_async": lambda tensor: comm.highest(tensor, "it"),
    "allgather_async": lambda tensor: comm.begin_gather(tensor, "it"),
    "alltoall_async": lambda tensor: comm.begin_exchange(tensor, [1], "it"),
    "broadcast_async": lambda tensor: comm.broadcast(tensor, "it"),
    "broadcast_async_": lambda tensor: comm.broadcast_({"it": tensor}),
    "synchronize": lambda tensor: comm.wait(comm.Pending("it", 1)),
}


@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize(
    ("text", "raised"),
    [
        ("Horovod has been shut down. This was caused by an exception", comm.WorkerGone),
        ("ncclAllReduce failed: remote process exited or", comm.WorkerGone),
        ("ncclAllReduce failed: unhandled system error", Internal),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", Internal),
    ],
)
def test_collectives_name_the_failed_worker(monkeypatch, name, text, raised):
    """Collectives can fail at their start and at their end, by another worker or by this GPU."""

    def fail(*_, **named):
        raise Internal(text)

    ops = SimpleNamespace(HorovodInternalError=Internal)
    calls = {"Sum": None, "Max": None, name: fail}
    monkeypatch.setattr(comm, "horovod", SimpleNamespace(mpi_ops=ops, **calls))
    with pytest.raises(raised, match=text.partition(".")[0]):
        COLLECTIVES[name](torch.ones(1))
    assert comm.waits is None


@pytest.mark.parametrize("failing", ["init", "barrier"])
def test_failed_start_leaves_one_worker(monkeypatch, failing):
    """Later calls answer for one worker. Horovod's own calls would fail."""
    calls = {"init": lambda: None, "barrier": lambda: None, failing: fail}
    calls |= {"rank": fail, "size": fail}
    horovod = SimpleNamespace(mpi_ops=SimpleNamespace(HorovodInternalError=Internal), **calls)
    monkeypatch.setattr(comm, "load", lambda: horovod)
    monkeypatch.setattr(comm, "horovod", None)
    with pytest.raises(comm.WorkerGone, match=r"\(no route\)"):
        comm.start()
    assert (comm.rank(), comm.size(), comm.version()) == (0, 1, "")


def test_reading_a_result_is_a_wait():
    """The watchdog sees the wait while a GPU computes the result of a collective."""
    waits = []

    class Result:
        def cpu(self):
            waits.append(comm.waits.name)
            return torch.ones(1)

    assert comm.to_host(Result(), "it") == 1
    assert (waits, comm.waits) == (["it"], None)
