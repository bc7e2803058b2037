"""Simulated errors of GPUs: their lines, and the worker that prints one."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from job.cluster import device_errors, nccl_network
from job.cluster.device_errors import GPU, MEMORY, NCCL
from job.cluster.exits import reported_errors
from job.engine.run import Run

FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB "
    "of which 1.19 GiB is free. Process 7 has 3.00 GiB memory in use. Including non-PyTorch "
    "memory, this process has 74.96 GiB memory in use. Of the allocated memory 70.00 GiB is "
    "allocated by PyTorch, and 1.20 GiB is reserved by PyTorch but unallocated. If reserved but "
    "unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."
)
ILLEGAL = "CUDA error: an illegal memory access was encountered"
ASYNCHRONOUS = f"{ILLEGAL}\nCUDA kernel errors might be asynchronously reported"
REFUSED = "ncclCommInitRank failed: unhandled system error (run with NCCL_DEBUG=INFO for details)"
OPTIONS = {"batch_size": 256, "accumulate": 1, "precision": "float32"}


class Internal(RuntimeError):
    """Horovod's internal error."""


@pytest.fixture(autouse=True)
def waited(monkeypatch, unlaunched):
    """Replace waits and exits of one worker. Return the list of the seconds of its waits."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError(FULL), MEMORY),
        (Internal(FULL), MEMORY),  # an output of Horovod
        (torch.AcceleratorError("CUDA error: out of memory\nmore"), MEMORY),
        (Internal("cudaMalloc failed: out of memory"), MEMORY),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            MEMORY,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), MEMORY),
        (Internal(REFUSED), NCCL),
        (
            Internal("ncclAllReduce failed: unhandled cuda error (run with NCCL_DEBUG=INFO)"),
            NCCL,
        ),
        (
            Internal("NCCL async error: internal error - please report this issue"),
            NCCL,
        ),
        (torch.AcceleratorError(ASYNCHRONOUS), GPU),
        (torch.AcceleratorError("anything of the accelerator"), GPU),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
            GPU,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), GPU),
        (RuntimeError("CUDA driver error: unknown error"), GPU),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), GPU),
        (Internal("cudaStreamCreateWithPriority failed: unspecified launch failure"), GPU),
        (Internal("GetGpuEvent failed: initialization error"), GPU),
        (Internal("ncclAllReduce failed: remote process exited or there was a network error"), ""),
        (
            Internal("Horovod has been shut down. This was caused by an exception"),
            "",
        ),
        (
            Internal("[gloo/transport/tcp/pair.cc:598] Connection closed by peer [127.0.0.1]:4711"),
            "",
        ),
        (
            RuntimeError("Expected all tensors to be on the same device, but found cuda:0"),
            "",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "",
        ),
        (ValueError("CUDA error: no error of a device"), ""),
        (None, ""),
    ],
)
def test_kind_of_an_error(error, kind):
    assert device_errors.kind(error) == kind


def test_full_gpu_is_one_line_with_a_fix():
    error = device_errors.describe(torch.OutOfMemoryError(FULL), "job/train.py:131", OPTIONS)
    assert str(error) == (
        "this GPU's memory is full at job/train.py:131 (CUDA out of memory. Tried to allocate "
        "2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.19 GiB is free. Process 7 "
        "has 3.00 GiB memory in use. Including non-PyTorch memory, this process has 74.96 GiB "
        "memory in use). Use a --batch-size below 256 or --accumulate 2 or --precision bf16; "
        "nvidia-smi shows the other programs on this GPU"
    )
    assert error.code == 1


@pytest.mark.parametrize(
    ("options", "use"),
    [
        (
            {"batch_size": 64, "accumulate": 2, "precision": "bf16"},
            "Use a --batch-size below 64 or --accumulate 4; ",
        ),
        ({"precision": "float32"}, "Use --precision bf16; "),  # such as job.embed
        ({}, ""),
    ],
)
def test_full_gpu_suggests_options_of_the_program(options, use):
    line = str(device_errors.describe(torch.OutOfMemoryError("CUDA out of memory."), "", options))
    end = "nvidia-smi shows the other programs on this GPU"
    assert line == f"this GPU's memory is full (CUDA out of memory). {use}{end}"


@pytest.mark.parametrize(
    ("error", "start", "fixes"),
    [
        (
            Internal(REFUSED),
            f"NCCL failed at here:1 ({REFUSED}). ",
            ("NCCL_DEBUG=INFO", "--ipc host", "--accumulate 2"),
        ),
        (
            torch.AcceleratorError(ASYNCHRONOUS),
            "this GPU failed at here:1 (CUDA error: an illegal memory access was encountered). ",
            ("CUDA_LAUNCH_BLOCKING=1", "Xid"),
        ),
    ],
    ids=["NCCL", "CUDA"],
)
def test_failed_nccl_or_gpu_is_one_line_with_a_fix(error, start, fixes):
    line = str(device_errors.describe(error, "here:1", OPTIONS))
    assert line.startswith(start) and "\n" not in line and all(each in line for each in fixes)


def ended(capsys, error):
    """Return exit code and error lines of a program that ends with `error`."""
    with pytest.raises(SystemExit) as caught, reported_errors():
        raise error
    return caught.value.code, capsys.readouterr().err.splitlines()


@pytest.fixture(params=["0", "1"])
def rank(request, monkeypatch):
    variables = {"HOROVOD_RANK": request.param, "HOROVOD_SIZE": "2", "SLURMD_NODENAME": "node2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return int(request.param)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(FULL), Internal(REFUSED)])
def test_rank_0_prints_its_line_first(capsys, rank, waited, error):
    """All workers can run out of memory at once. Rank 1 waits for its launcher to end it."""
    code, [line] = ended(capsys, error)
    assert code == 1 and line.startswith(f"error: rank {rank} on node2: ")
    assert "another worker" not in line
    assert waited == [2] * rank


def test_cuda_error_keeps_its_traceback(capsys, rank):
    code, lines = ended(capsys, torch.AcceleratorError(ASYNCHRONOUS))
    assert code == 1 and lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith(f"error: rank {rank} on node2: this GPU failed ")


def test_full_gpu_of_a_run_is_recorded(capsys, tmp_path):
    def fill():
        with Run(str(tmp_path), keep=1, options=OPTIONS) as run:
            run.log.open(str(tmp_path), (0, 0))
            run.autocast(Precision())

    class Precision:
        """An option whose comparison fails."""

        def __eq__(self, other):
            raise torch.OutOfMemoryError(FULL)

    with pytest.raises(SystemExit) as caught, reported_errors():
        fill()
    end = json.loads((tmp_path / "metrics.jsonl").read_text())
    [line] = capsys.readouterr().err.splitlines()
    assert caught.value.code == end["code"] == 1
    assert end["how"] == "error" and line == f"error: {end['text']}"
    assert re.search(r"full at job/engine/workers.py:\d+ \(CUDA out .*--batch-size below 256", line)


def test_failed_connection_of_nccl_has_a_fix(tmp_path, monkeypatch):
    def fail(device):
        raise Internal(REFUSED)

    monkeypatch.setattr(nccl_network, "connect_gpus", fail)
    with pytest.raises(device_errors.DeviceError) as caught:
        Run(str(tmp_path), keep=1, options=OPTIONS).__enter__()
    assert caught.value.kind == device_errors.NCCL
    assert "--batch-size below 256" in str(caught.value)


PROGRAM = """
import atexit, os, sys, time
import torch
from job.cluster import comm, exits
from job.engine.run import Run

atexit.register(lambda: print("an orderly end, as Horovod's", flush=True))
with exits.reported_errors(), Run({folder!r}, keep=1) as run:
    comm.has_nccl = torch.cuda.is_initialized = lambda: True
    if run.rank:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    run.total(steps=1)
"""


@pytest.mark.slow
def test_first_line_is_of_the_worker_with_a_full_gpu(tmp_path):
    launcher = os.path.join(os.path.dirname(sys.executable), "horovodrun")
    program = PROGRAM.format(folder=str(tmp_path / "run"))
    command = [launcher, "-np", "2", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    first, *others = re.findall(r"error: (.*)", done.stderr)
    assert re.fullmatch(r"rank 1 on \S+: this GPU's memory is full \(CUDA out of memory. .*", first)
    assert all("another worker is gone" in other for other in others)
    assert done.returncode and "an orderly end" not in done.stdout
