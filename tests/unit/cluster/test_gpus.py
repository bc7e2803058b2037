"""Unusable GPUs. All GPUs, drivers and device files are simulated."""

import os
import subprocess
import sys

import pytest
import torch

from job.cluster import gpus
from job.errors import LONGEST, RunError

PROPRIETARY = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
CODES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # of torch for CUDA 13
ON_CPU = "To use the CPU, set CUDA_VISIBLE_DEVICES= (empty)"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in (*gpus.VARIABLES, "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that simulates a machine and torch, and returns their `problem`."""

    def problem(
        files=(),
        driver="",
        cuda="13.0",
        capability=None,
        reason="",
        workers=1,
        has_nccl=True,
        local_rank=0,
        listed=(),
    ):
        dev, proc = tmp_path / "dev", tmp_path / "proc"
        dev.mkdir()
        for name in files:
            (dev / name).touch()
        if driver:
            (proc / "driver/nvidia").mkdir(parents=True)
            (proc / "driver/nvidia/version").write_text(driver)

        for name in listed:
            (proc / "driver/nvidia/gpus" / name).mkdir(parents=True)

        def init():
            raise RuntimeError(reason)

        cuda_module = {
            "is_available": lambda: capability is not None,
            "init": init,
            "device_count": lambda: 2,
            "get_device_capability": lambda index: capability,
            "get_device_name": lambda index: f"GPU {index}",
            "get_arch_list": lambda: CODES,
        }
        for name, value in cuda_module.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        text = gpus.problem(local_rank, workers, has_nccl, str(dev), str(proc))
        assert str(RunError(text)) == text and len(text) < LONGEST  # one line, not cut
        assert not text or ON_CPU in text
        return text.replace(str(tmp_path), "")

    return problem


def test_machine_without_a_gpu_has_no_problem(machine):
    assert machine(files=["nvidiactl", "nvidia-uvm", "null"]) == ""


def test_cpu_build_without_a_gpu_has_no_problem(machine):
    """A driver without a GPU is not an error either."""
    assert machine(driver=PROPRIETARY, cuda=None) == ""


@pytest.mark.parametrize("cuda", ["13.0", None])
def test_container_without_the_node_s_gpus_is_an_error(machine, cuda):
    text = machine(driver=OPEN, listed=["0000:65:00.0", "0000:17:00.0"], cuda=cuda)
    assert text == (
        "this node has GPUs (/proc/driver/nvidia/gpus/0000:17:00.0), but no /dev/nvidia0 is here: "
        "in a container, which must start with --gpus all (podman: --device nvidia.com/gpu=all, "
        f"apptainer: --nv). {ON_CPU}"
    )


def test_slurm_job_without_gpus_uses_the_cpu(machine, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert machine(driver=OPEN, listed=["0000:17:00.0"]) == ""


def test_usable_gpu_needs_no_device_file(machine):
    assert machine(driver=OPEN, listed=["0000:17:00.0"], capability=(9, 0)) == ""


@pytest.mark.parametrize("value", ["", " ", "-1", "NoDevFiles"])
def test_hidden_gpus_are_not_a_problem(machine, monkeypatch, value):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    assert machine(files=["nvidia0"], listed=["0000:17:00.0"], cuda=None) == ""


@pytest.mark.parametrize("name", gpus.VARIABLES)
def test_variable_announces_a_gpu(machine, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert machine().startswith(f"{name}=1: no NVIDIA driver is loaded")


@pytest.mark.parametrize(("name", "value"), [("SLURM_GPUS_ON_NODE", "0"), ("SLURM_JOB_GPUS", "")])
def test_variable_of_a_job_without_gpus(machine, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert machine() == ""


def test_device_files_announce_gpus(machine):
    files = ["nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(8))]
    four = "/dev/nvidia0, /dev/nvidia1, /dev/nvidia2, /dev/nvidia3"
    assert machine(files).startswith(f"{four}, ...: no NVIDIA driver is loaded ")


def test_device_files_of_other_jobs_do_not_count(machine, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert machine(["nvidia0"]) == ""


def test_device_files_count_outside_slurm(machine, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert machine(["nvidia0"]).startswith("/dev/nvidia0: ")


def test_slurm_job_has_its_own_fix(machine, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert machine(["nvidia0"]).endswith(f"{ON_CPU} and submit with --gpus-per-node=0")


def test_torch_without_cuda_is_named(machine):
    text = machine(["nvidia0"], driver=OPEN, cuda=None)
    built = f"torch {torch.__version__} was built without CUDA"
    assert text.startswith(f"/dev/nvidia0: {built}. Install ")


def test_missing_driver_is_named(machine):
    assert machine(["nvidia0"]) == (
        "/dev/nvidia0: no NVIDIA driver is loaded (no version in /proc/driver/nvidia/version); "
        f"expected 580 or newer, for CUDA 13.0. Install or load it. {ON_CPU}"
    )


@pytest.mark.parametrize(
    ("driver", "cuda", "version", "needed"),
    [
        (PROPRIETARY, "13.0", "535.104.05", "580"),
        (OPEN.replace("580.65.06", "570.9"), "13.2", "570.9", "580"),
        (PROPRIETARY.replace("535.104.05", "470.82.01"), "12.6", "470.82.01", "525"),
    ],
)
def test_old_driver_is_named(machine, driver, cuda, version, needed):
    text = machine(["nvidia0"], driver=driver, cuda=cuda, reason="driver too old")
    expected = f"expected {needed} or newer, for CUDA {cuda}"
    assert text.startswith(f"/dev/nvidia0: the NVIDIA driver is {version}; {expected}. Update ")


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        (
            "Unexpected error from cudaGetDeviceCount(). Error 802: not yet initialized",
            "Error 802: not yet initialized",
        ),
        (
            "Found no NVIDIA driver on your system. Please check.",
            "Found no NVIDIA driver on your system",
        ),
        ("No CUDA GPUs are available", "No CUDA GPUs are available"),
    ],
)
@pytest.mark.parametrize(
    ("driver", "cuda", "version"),
    [
        (OPEN, "13.0", "580.65.06"),
        (PROPRIETARY, "12.6", "535.104.05"),
        (OPEN, "14.0", "580.65.06"),
    ],
)
def test_new_driver_has_torch_s_reason(machine, driver, cuda, version, reason, shown):
    text = machine(["nvidia0"], driver=driver, cuda=cuda, reason=reason)
    cannot = f"torch cannot use a GPU through the NVIDIA driver {version} ({shown})"
    assert text.startswith(f"/dev/nvidia0: {cannot}. Run nvidia-smi; ")


@pytest.mark.parametrize(
    ("code", "capability", "expected"),
    [
        ("sm_75", (7, 5), True),
        ("sm_75", (7, 0), False),
        ("sm_80", (8, 9), True),  # torch's builds lack kernels for Ada
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_100", (10, 3), True),
        ("sm_100", (12, 0), False),
        ("sm_120", (12, 1), True),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("compute_90", (12, 0), True),
        ("compute_120", (9, 0), False),
    ],
)
def test_runs_checks_capabilities(code, capability, expected):
    assert gpus.runs(code, capability) == expected


@pytest.mark.parametrize("number", "7.5 8.0 8.6 8.9 9.0 10.0 10.3 12.0 12.1".split())
def test_gpu_with_kernels_has_no_problem(machine, number):
    assert machine(capability=tuple(map(int, number.split(".")))) == ""


@pytest.mark.parametrize(
    ("capability", "age"),
    [((7, 0), "an older"), ((6, 1), "an older"), ((13, 0), "a newer")],
)
def test_gpu_without_kernels_is_named(machine, capability, age):
    """With 2 visible GPUs, local rank 3 has GPU 1."""
    text = machine(capability=capability, local_rank=3)
    number = ".".join(map(str, capability))
    assert text.startswith(
        f"GPU 1: torch {torch.__version__} has no kernels for its compute capability {number}; "
        f"expected one of {', '.join(CODES)}. Use another GPU, or install a torch for {age} CUDA "
    )


def test_rocm_build_has_no_problem(machine):
    assert machine(capability=(7, 0), cuda=None) == ""


def test_several_workers_need_nccl(machine):
    text = machine(capability=(9, 0), workers=8, has_nccl=False)
    build = f"Run HOROVOD_BACKEND=nccl build_horovod.sh {sys.executable}: "
    build += "it builds NCCL in, or ends with what it needs"
    assert text == f"Horovod has no NCCL, which 8 workers on GPUs need. {build}. {ON_CPU}"


@pytest.mark.parametrize(("workers", "has_nccl"), [(1, False), (8, True)])
def test_one_worker_needs_no_nccl(machine, workers, has_nccl):
    assert machine(capability=(9, 0), workers=workers, has_nccl=has_nccl) == ""


def test_warnings_of_torch_are_not_printed(monkeypatch, recwarn):
    warn = gpus.warnings.warn
    monkeypatch.setattr(torch.cuda, "is_available", lambda: warn("driver too old", stacklevel=1))
    gpus.available()
    assert not recwarn.list


ALLOCATED = {"SLURM_JOB_GPUS": "0", "SLURM_JOB_ID": "7"}


def run(workers, variables, tmp_path):
    """Start job.train on a missing folder. Return exit code, errors and warnings."""
    environment = os.environ | variables  # `no_variables` has removed CUDA_VISIBLE_DEVICES
    program = [sys.executable, "-m", "job.train", f"{tmp_path}/none", "--out", f"{tmp_path}/run"]
    launcher = [os.path.join(os.path.dirname(sys.executable), "horovodrun"), "-np", str(workers)]
    command = (launcher if workers > 1 else []) + program
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if "error: " in line or "arning" in line]
    return done.returncode, lines


@pytest.mark.slow
@pytest.mark.skipif(bool(gpus.driver("/proc")), reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize("workers", [1, 2])
def test_run_without_its_allocated_gpu_is_one_line(tmp_path, workers):
    code, [line] = run(workers, ALLOCATED, tmp_path)
    prefix = "" if workers == 1 else "[0]<stderr>:"
    assert line.startswith(f"{prefix}error: SLURM_JOB_GPUS=0: no NVIDIA driver is loaded (")
    assert line.endswith(f"{ON_CPU} and submit with --gpus-per-node=0")
    assert code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_run_starts_on_the_cpu_if_gpus_are_hidden(tmp_path):
    code, [line] = run(1, ALLOCATED | {"CUDA_VISIBLE_DEVICES": ""}, tmp_path)
    assert code == 2 and line.startswith(f"error: {tmp_path}/none: no such folder or file; ")
