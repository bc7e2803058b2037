"""Horovod's collectives on GPUs, by NCCL, and on the CPUs of the same machine, by Gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import collectives

GPUS = torch.cuda.device_count()
# NCCL refuses two workers on a GPU unless this is 1. Older releases lack the variable.
SHARE = "NCCL_MULTI_RANK_GPU_ENABLE"
pytestmark = pytest.mark.usefixtures("unset")  # NCCL chooses its algorithms


def can_share() -> bool:
    """Return whether torch's NCCL supports two workers on one GPU."""
    for folder in sys.path:
        library = Path(folder, "nvidia/nccl/lib/libnccl.so.2")
        if library.is_file():
            return SHARE.encode() in library.read_bytes()
    return False


def check(workers, *arguments, **environment):
    """Check the results of all collectives on some workers."""
    launcher = os.path.join(os.path.dirname(sys.executable), "horovodrun")
    script = [sys.executable, collectives.__file__, *arguments]
    done = subprocess.run(
        [launcher, "-np", str(workers), *script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )
    lines = [line.partition("{")[2] for line in done.stdout.splitlines() if '"collective"' in line]
    results = [json.loads("{" + line) for line in lines]
    assert done.returncode == 0, done.stdout
    assert len(results) == sum(map(len, collectives.USED.values())), done.stdout
    assert all(line["right"] == [True] * workers for line in results), done.stdout


@pytest.mark.parametrize("workers", [1, *([GPUS] if GPUS > 1 else [])])
def test_collectives_with_a_gpu_per_worker(workers, device):
    check(workers, device.type)


def test_collectives_of_two_workers_on_one_gpu(device):
    if device.type == "cuda" and not can_share():
        pytest.skip(f"torch's NCCL has no {SHARE}: two workers cannot use one GPU")
    check(2, device.type, "--share", **{SHARE: "1"})


def test_collectives_on_the_cpu():
    check(2, "cpu")
