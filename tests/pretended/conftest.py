"""Fixtures of the tests on a pretended GPU."""

import contextlib

import pytest

from job import train
from job.cluster import comm
from job.config import Config
from job.metrics.meter import Journal
from pretended_gpu import pretended
from pretended_horovod import Horovod
from runs import write_teacher

SMALL = dict(arch="resnet18", stem="small", width=16, image_size=16, workers=0)


@pytest.fixture(scope="session")
def narrow_teacher(tmp_path_factory):
    """A teacher's checkpoint: a narrow ResNet-18 with the small stem and random weights."""
    path = tmp_path_factory.mktemp("narrow") / "teacher.pth.tar"
    return str(write_teacher(path, "resnet18", stem="small", width=32))


@pytest.fixture
def horovod(monkeypatch):
    """The pretended Horovod of this worker."""
    monkeypatch.delenv("HOROVOD_ENABLE_ASYNC_COMPLETION", raising=False)
    monkeypatch.setattr(comm, "horovod", Horovod())
    return comm.horovod


@pytest.fixture
def gpu(horovod):
    """The problems and stalls of this worker's pretended GPU."""
    with pretended() as report:
        yield report


@pytest.fixture
def steps(gpu, monkeypatch):
    """The stalls of a run's steps, each (blocking copies, blocking collectives).

    The first entry covers everything before the first step. The last step, at the end of the epoch,
    has no entry.
    """
    stalls, waiting = [], Journal.waiting

    @contextlib.contextmanager
    def counted(journal):
        stalls.append((gpu.copies, gpu.waits))
        gpu.clear()
        with waiting(journal):
            yield

    monkeypatch.setattr(Journal, "waiting", counted)
    return stalls


@pytest.fixture
def training(monkeypatch):
    """A list to which each run adds its training."""
    made, build = [], train.build
    monkeypatch.setattr(train, "build", lambda *given: made.append(build(*given)) or made[-1])
    return made


@pytest.fixture
def run(images, tmp_path):
    """A function that trains for an epoch of three steps, and returns the run's folder."""

    def trained(name="run", **options):
        defaults = dict(data=str(images), batch_size=16, epochs=1, check_every=100, **SMALL)
        defaults |= dict(moco_k=16, moco_dim=8, mlp=True, dim=16, pred_dim=8, warmup_epochs=0)
        train.train(Config(out=str(tmp_path / name), **defaults | options))
        return tmp_path / name

    return trained
