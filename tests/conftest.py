"""What whole-run tests share: a small image folder, a teacher's file, and runs of the real command under horovodrun."""

import os
import signal

import pytest

from disks import LINKLESS, mount_linkless, unmount
from runs import Job, write_images, write_teacher

signal.signal(
    signal.SIGHUP, signal.SIG_DFL
)  # nohup ignores it, also in the runs that tests send it to
if os.environ.get("TEST_DEVICE") != "cuda":  # tests/gpu alone uses GPUs: make test-gpu
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as each of two workers has on two cores


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 50 training and 9 validation images in two classes, of noise at several sizes."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A ResNet-50 with random weights, laid out as MoCo's released files."""
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth.tar")


@pytest.fixture(params=LINKLESS)
def linkless(request, tmp_path):
    """An empty disk on which no file can have two names, and none can be a link."""
    path = mount_linkless(request.param, tmp_path)
    yield path
    unmount(path)


@pytest.fixture(scope="session")
def start_job():
    """A function that starts a Job; what still runs at the end of the session is killed."""
    jobs = []

    def start(workers, folder, arguments, program="job.train"):
        jobs.append(Job(workers, folder, arguments, program))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.kill()
