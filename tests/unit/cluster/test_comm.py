"""The connection of the workers. Horovod is a stand-in: its real failures abort the process."""

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
def test_a_collective_fails_by_another_worker_or_by_this_gpu(monkeypatch, name, text, raised):
    """When it begins, and when it completes. What is this worker's own is not called another's."""

    def fail(*_, **named):
        raise Internal(text)

    ops = SimpleNamespace(HorovodInternalError=Internal)
    calls = {"Sum": None, "Max": None, name: fail}
    monkeypatch.setattr(comm, "horovod", SimpleNamespace(mpi_ops=ops, **calls))
    with pytest.raises(raised, match=text.partition(".")[0]):
        COLLECTIVES[name](torch.ones(1))
    assert comm.waits is None


@pytest.mark.parametrize("failing", ["init", "barrier"])
def test_after_a_failed_start_no_worker_is_connected(monkeypatch, failing):
    """Later calls answer for a single worker; Horovod's own would fail."""
    calls = {"init": lambda: None, "barrier": lambda: None, failing: fail}
    calls |= {"rank": fail, "size": fail}
    horovod = SimpleNamespace(mpi_ops=SimpleNamespace(HorovodInternalError=Internal), **calls)
    monkeypatch.setattr(comm, "load", lambda: horovod)
    monkeypatch.setattr(comm, "horovod", None)
    with pytest.raises(comm.WorkerGone, match=r"\(no route\)"):
        comm.start()
    assert (comm.rank(), comm.size(), comm.version()) == (0, 1, "")


def test_a_read_is_seen_as_a_wait():
    """By the watchdog, while a GPU computes a collective's result."""
    seen = []

    class Result:
        def cpu(self):
            seen.append(comm.waits.name)
            return torch.ones(1)

    assert comm.to_host(Result(), "it") == 1
    assert (seen, comm.waits) == (["it"], None)
