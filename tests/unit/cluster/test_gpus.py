"""GPUs that are there and cannot be used. All GPUs, drivers and device files are pretended."""

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
def no_signs(monkeypatch):
    for name in (*gpus.VARIABLES, "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes a machine's /dev and /proc and torch, and returns `problem` there."""

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

        found = {
            "is_available": lambda: capability is not None,
            "init": init,
            "device_count": lambda: 2,
            "get_device_capability": lambda index: capability,
            "get_device_name": lambda index: f"GPU {index}",
            "get_arch_list": lambda: CODES,
        }
        for name, value in found.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        text = gpus.problem(local_rank, workers, has_nccl, str(dev), str(proc))
        assert str(RunError(text)) == text and len(text) < LONGEST  # one line, not cut
        assert not text or ON_CPU in text
        return text.replace(str(tmp_path), "")

    return problem


def test_without_a_sign_of_a_gpu_nothing_is_wrong(machine):
    assert machine(files=["nvidiactl", "nvidia-uvm", "null"]) == ""


def test_without_a_sign_torch_s_reason_does_not_matter(machine):
    """A CPU build, or a driver without a GPU, is not an error."""
    assert machine(driver=PROPRIETARY, cuda=None) == ""


@pytest.mark.parametrize("cuda", ["13.0", None])
def test_a_container_without_gpus_on_a_node_that_has_some_ends(machine, cuda):
    text = machine(driver=OPEN, listed=["0000:65:00.0", "0000:17:00.0"], cuda=cuda)
    assert text == (
        "this node has GPUs (/proc/driver/nvidia/gpus/0000:17:00.0), but no /dev/nvidia0 is here: "
        "in a container, which must start with --gpus all (podman: --device nvidia.com/gpu=all, "
        f"apptainer: --nv). {ON_CPU}"
    )


def test_a_slurm_job_without_gpus_on_a_node_that_has_some_uses_the_cpu(machine, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert machine(driver=OPEN, listed=["0000:17:00.0"]) == ""


def test_a_worker_that_can_use_a_gpu_needs_no_device_file(machine):
    assert machine(driver=OPEN, listed=["0000:17:00.0"], capability=(9, 0)) == ""


@pytest.mark.parametrize("value", ["", " ", "-1", "NoDevFiles"])
def test_hidden_gpus_are_no_problem(machine, monkeypatch, value):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    assert machine(files=["nvidia0"], listed=["0000:17:00.0"], cuda=None) == ""


@pytest.mark.parametrize("name", gpus.VARIABLES)
def test_a_variable_shows_a_gpu(machine, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert machine().startswith(f"{name}=1: no NVIDIA driver is loaded")


@pytest.mark.parametrize(("name", "value"), [("SLURM_GPUS_ON_NODE", "0"), ("SLURM_JOB_GPUS", "")])
def test_a_job_without_gpus_has_none(machine, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert machine() == ""


def test_device_files_show_gpus_and_few_are_named(machine):
    files = ["nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(8))]
    four = "/dev/nvidia0, /dev/nvidia1, /dev/nvidia2, /dev/nvidia3"
    assert machine(files).startswith(f"{four}, ...: no NVIDIA driver is loaded ")


def test_gpus_of_other_slurm_jobs_do_not_count(machine, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert machine(["nvidia0"]) == ""


def test_files_that_cannot_be_opened_outside_slurm_count(machine, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert machine(["nvidia0"]).startswith("/dev/nvidia0: ")


def test_a_slurm_job_gets_the_option_without_gpus(machine, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert machine(["nvidia0"]).endswith(f"{ON_CPU} and submit with --gpus-per-node=0")


def test_a_torch_without_cuda_is_named(machine):
    text = machine(["nvidia0"], driver=OPEN, cuda=None)
    built = f"torch {torch.__version__} was built without CUDA"
    assert text.startswith(f"/dev/nvidia0: {built}. Install ")


def test_a_missing_driver_is_named_with_the_needed_one(machine):
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
def test_an_old_driver_is_named_with_the_needed_one(machine, driver, cuda, version, needed):
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
def test_with_a_new_driver_torch_s_reason_is_given(machine, driver, cuda, version, reason, shown):
    text = machine(["nvidia0"], driver=driver, cuda=cuda, reason=reason)
    cannot = f"torch cannot use a GPU through the NVIDIA driver {version} ({shown})"
    assert text.startswith(f"/dev/nvidia0: {cannot}. Run nvidia-smi; ")


@pytest.mark.parametrize(
    ("code", "capability", "expected"),
    [
        ("sm_75", (7, 5), True),
        ("sm_75", (7, 0), False),
        ("sm_80", (8, 9), True),  # Ada has no code of its own in torch's builds
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
def test_kernels_run_on_their_major_version_and_ptx_on_all_later_ones(code, capability, expected):
    assert gpus.runs(code, capability) == expected


@pytest.mark.parametrize("number", "7.5 8.0 8.6 8.9 9.0 10.0 10.3 12.0 12.1".split())
def test_a_gpu_with_kernels_is_fine(machine, number):
    assert machine(capability=tuple(map(int, number.split(".")))) == ""


@pytest.mark.parametrize(
    ("capability", "age"),
    [((7, 0), "an older"), ((6, 1), "an older"), ((13, 0), "a newer")],
)
def test_a_gpu_without_kernels_is_named(machine, capability, age):
    """The GPU of the local rank: rank 3 of a node with 2 visible GPUs has GPU 1."""
    text = machine(capability=capability, local_rank=3)
    number = ".".join(map(str, capability))
    assert text.startswith(
        f"GPU 1: torch {torch.__version__} has no kernels for its compute capability {number}; "
        f"expected one of {', '.join(CODES)}. Use another GPU, or install a torch for {age} CUDA "
    )


def test_a_rocm_build_has_other_names_of_kernels(machine):
    assert machine(capability=(7, 0), cuda=None) == ""


def test_several_workers_on_gpus_need_nccl(machine):
    text = machine(capability=(9, 0), workers=8, has_nccl=False)
    build = f"Run HOROVOD_BACKEND=nccl build_horovod.sh {sys.executable}: "
    build += "it builds NCCL in, or ends with what it needs"
    assert text == f"Horovod has no NCCL, which 8 workers on GPUs need. {build}. {ON_CPU}"


@pytest.mark.parametrize(("workers", "has_nccl"), [(1, False), (8, True)])
def test_one_worker_needs_no_nccl(machine, workers, has_nccl):
    assert machine(capability=(9, 0), workers=workers, has_nccl=has_nccl) == ""


def test_torch_s_own_warnings_are_not_printed(monkeypatch, recwarn):
    warn = gpus.warnings.warn
    monkeypatch.setattr(torch.cuda, "is_available", lambda: warn("driver too old", stacklevel=1))
    gpus.available()
    assert not recwarn.list


ALLOCATED = {"SLURM_JOB_GPUS": "0", "SLURM_JOB_ID": "7"}


def run(workers, variables, tmp_path):
    """Start job.train on a folder that does not exist; return exit code, errors and warnings."""
    environment = os.environ | variables  # `no_signs` has removed CUDA_VISIBLE_DEVICES
    program = [
        sys.executable,
        "-m",
        "job.train",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "run"),
    ]
    launcher = [os.path.join(os.path.dirname(sys.executable), "horovodrun"), "-np", str(workers)]
    command = (launcher if workers > 1 else []) + program
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if "error: " in line or "arning" in line]
    return done.returncode, said


@pytest.mark.slow
@pytest.mark.skipif(bool(gpus.driver("/proc")), reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_with_an_allocated_gpu_that_is_not_there_ends_with_one_line(tmp_path, workers):
    code, [line] = run(workers, ALLOCATED, tmp_path)
    prefix = "" if workers == 1 else "[0]<stderr>:"
    assert line.startswith(f"{prefix}error: SLURM_JOB_GPUS=0: no NVIDIA driver is loaded (")
    assert line.endswith(f"{ON_CPU} and submit with --gpus-per-node=0")
    assert code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_same_run_starts_on_the_cpu_on_purpose(tmp_path):
    code, [line] = run(1, ALLOCATED | {"CUDA_VISIBLE_DEVICES": ""}, tmp_path)
    assert code == 2 and line.startswith(f"error: no folder {tmp_path}/none: ")
