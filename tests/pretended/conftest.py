"""Tests in this folder train on a GPU that is only pretended."""

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
    """A teacher's file: a narrow ResNet-18 with the small stem and random weights."""
    path = tmp_path_factory.mktemp("narrow") / "teacher.pth.tar"
    return str(write_teacher(path, "resnet18", stem="small", width=32))


@pytest.fixture
def horovod(monkeypatch):
    """A worker's Horovod, whose collectives are only pretended."""
    monkeypatch.delenv("HOROVOD_ENABLE_ASYNC_COMPLETION", raising=False)
    monkeypatch.setattr(comm, "horovod", Horovod())
    return comm.horovod


@pytest.fixture
def gpu(horovod):
    """What is found on the pretended GPU of this worker."""
    with pretended() as found:
        yield found


@pytest.fixture
def steps(gpu, monkeypatch):
    """The stalls of a run's steps, each (blocking copies, blocking collectives).

    The first is of all before the first step. The last step, with an epoch's end, is left out.
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
    found, build = [], train.build
    monkeypatch.setattr(train, "build", lambda *given: found.append(build(*given)) or found[-1])
    return found


@pytest.fixture
def run(images, tmp_path):
    """A function that trains for an epoch of three steps, and returns the run's folder."""

    def trained(name="run", **options):
        options = (
            dict(data=str(images), batch_size=16, epochs=1, check_every=100, **SMALL) | options
        )
        options = (
            dict(moco_k=16, moco_dim=8, mlp=True, dim=16, pred_dim=8, warmup_epochs=0) | options
        )
        train.train(Config(out=str(tmp_path / name), **options))
        return tmp_path / name

    return trained
