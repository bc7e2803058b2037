"""What whole-run tests share: a small image folder, a teacher's file, and runs of the real command under horovodrun."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from runs import Job

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as each of two workers has on two cores


def pytest_addoption(parser):
    parser.addoption("--no-jobs", action="store_true", help="leave out the tests that start whole runs")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--no-jobs"):
        items[:] = [item for item in items if "start_job" not in item.fixturenames]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 50 training and 9 validation images in two classes, of noise at several sizes."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(59):
        path = folder / ("train" if number < 50 else "val") / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (4 + number % 3, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36)).save(path)
    return folder


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A ResNet-50 with random weights, laid out as MoCo's released files."""
    from moco.model import MoCo

    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth.tar"
    state = {f"module.{key}": value for key, value in MoCo("resnet50", K=64, mlp=True).state_dict().items()}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {}}, path)
    return path


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
