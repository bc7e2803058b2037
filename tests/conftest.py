"""Fixtures of all tests: a small image folder, a teacher's file, and runs under horovodrun."""

import os
import signal

import pytest

from disks import LINKLESS, mount_linkless, unmount
from runs import Job, write_images, write_teacher

# Under nohup, the runs to which tests send SIGHUP would ignore it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if os.environ.get("TEST_DEVICE") != "cuda":  # only tests/gpu uses GPUs: make test-gpu
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as for each of two workers on two cores


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 50 training and 9 validation images of noise in two classes."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A ResNet-50 with random weights in the layout of MoCo's released files."""
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth.tar")


@pytest.fixture(params=LINKLESS)
def linkless(request, tmp_path):
    """An empty disk without hard links or symbolic links."""
    path = mount_linkless(request.param, tmp_path)
    yield path
    unmount(path)


@pytest.fixture(scope="session")
def start_job():
    """A function that starts a Job. Jobs that still run at the session's end are killed."""
    jobs = []

    def start(workers, folder, arguments, program="job.train"):
        jobs.append(Job(workers, folder, arguments, program))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.kill()
