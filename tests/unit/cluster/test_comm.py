"""The connection of the workers. Horovod is a stand-in: its real failures abort the process."""

from types import SimpleNamespace

import pytest

from job.cluster import comm


class Internal(Exception):
    """Horovod's internal error."""


def fail(*_):
    raise Internal("no route\nmore")


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
