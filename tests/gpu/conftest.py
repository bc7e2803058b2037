"""Fixtures of the tests on a GPU. TEST_DEVICE=cpu is a dry run with tiny networks.

`make test-gpu` runs these tests. If GPU_RESULTS names a file, each test appends a JSON line to it.
"""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from job.cluster import deterministic
from runs import write_images, write_teacher

DEVICE = os.environ.get("TEST_DEVICE", "")
WIDTH = "64" if DEVICE == "cuda" else "16"  # of the students' first stage
TEXT = 2000  # characters of a failure

# For tests with --deterministic in this process: earlier tests have started CUDA.
if DEVICE == "cuda":
    for variable, (value, *_) in deterministic.VARIABLES.items():
        os.environ.setdefault(variable, value)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.run)
            if not DEVICE:
                item.add_marker(pytest.mark.skip(reason="runs on a GPU: make test-gpu"))


def pytest_runtest_logreport(report):
    path = os.environ.get("GPU_RESULTS")
    if not path or not (report.when == "call" or report.failed or report.skipped):
        return
    line = {"kind": "test", "time": time.time(), "test": report.nodeid, "outcome": report.outcome}
    line |= {"seconds": round(report.duration, 3), **dict(report.user_properties)}
    if report.failed or report.skipped:
        line["text"] = report.longreprtext[-TEXT:]
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.fixture
def unset(monkeypatch):
    """Start programs without the variables of --deterministic."""
    for name in deterministic.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def device():
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def size():
    """The side of the views in pixels, the least with several positions in `layer4` for gram."""
    return 64


@pytest.fixture(scope="session")
def network(size):
    """The options of the student and its images."""
    arguments = ["-a", "resnet18", "--width", WIDTH, "--image-size", str(size), "--mlp"]
    return [*arguments, "--moco-t", "0.2", "--aug-plus", "--cos", "--warmup-epochs", "0"]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A teacher's checkpoint with a head: a ResNet-50 on a GPU, a narrow ResNet-18 on the CPU."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth.tar"
    if DEVICE == "cuda":
        return write_teacher(path)
    return write_teacher(path, "resnet18", width=32)


@pytest.fixture
def command(tmp_path):
    """A function that runs a program of this project without a launcher and returns its output."""
    import subprocess
    import sys

    def run(program, *arguments, **environment):
        arguments = [sys.executable, "-m", f"job.{program}", *map(str, arguments)]
        done = subprocess.run(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | environment,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run
