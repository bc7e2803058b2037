"""Find out whether this worker has GPUs, and why torch or Horovod cannot use them."""

import glob
import os
import re
import sys
import warnings
from pathlib import Path

import torch

from job.text import first_names

# The oldest driver for each major version of CUDA: NVIDIA, CUDA Compatibility, table 1.
DRIVERS = {11: 450, 12: 525, 13: 580}
# Values of CUDA_VISIBLE_DEVICES that hide all GPUs. SLURM sets the last one for jobs without GPUs.
HIDDEN = ("", "-1", "NoDevFiles")
VARIABLES = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES")
MOST = 4  # signs in an error


def available() -> bool:
    """Return whether torch can use a GPU, without torch's warning: `problem` reports its cause."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def problem(
    local_rank: int,
    workers: int,
    has_nccl: bool,
    dev: str = "/dev",
    proc: str = "/proc",
) -> str:
    """Return why this worker cannot use its GPU, and a fix; "" if it can, or has no GPU.

    If CUDA_VISIBLE_DEVICES hides all GPUs, the user chose the CPU: "".

    local_rank: this worker's number on its node. workers: the number of all workers.
    has_nccl: whether Horovod was built with NCCL. dev, proc: the folders /dev and /proc.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")[0].strip() in HIDDEN:
        return ""
    if available():
        text = without_kernels(local_rank % torch.cuda.device_count())
        if not text and workers > 1 and not has_nccl:
            text = without_nccl(workers)
    else:
        shown = signs(dev)
        text = unusable(shown, proc) if shown else without_devices(dev, proc)
    slurm = " and submit with --gpus-per-node=0" if "SLURM_JOB_ID" in os.environ else ""
    return text and f"{text}. To use the CPU, set CUDA_VISIBLE_DEVICES= (empty){slurm}"


def signs(dev: str) -> list[str]:
    """Return the signs of this worker's GPUs: variables with values, and device files."""
    values = {name: os.environ.get(name, "") for name in VARIABLES}
    if values["SLURM_GPUS_ON_NODE"] == "0":
        del values["SLURM_GPUS_ON_NODE"]
    files = sorted(glob.glob(f"{dev}/nvidia[0-9]*"))
    if "SLURM_JOB_ID" in os.environ:  # SLURM denies access to the GPUs of other jobs
        files = [path for path in files if os.access(path, os.R_OK | os.W_OK)]
    return [f"{name}={value}" for name, value in values.items() if value] + files


def without_devices(dev: str, proc: str) -> str:
    """Return an error, with a fix, if a container on a node with GPUs has no GPU, or "".

    The driver lists its GPUs in every container's /proc. In a SLURM job the list proves nothing:
    other jobs can have the node's GPUs.
    """
    listed = sorted(glob.glob(f"{proc}/driver/nvidia/gpus/*"))
    if not listed or "SLURM_JOB_ID" in os.environ:
        return ""
    return (
        f"this node has GPUs ({listed[0]}), but no {dev}/nvidia0 is here: in a container, which "
        "must start with --gpus all (podman: --device nvidia.com/gpu=all, apptainer: --nv)"
    )


def unusable(shown: list[str], proc: str) -> str:
    """Return why torch cannot use the GPUs of `signs`, and a fix."""
    gpus = first_names(shown, MOST)
    if not torch.version.cuda:
        return (
            f"{gpus}: torch {torch.__version__} was built without CUDA. Install a torch with CUDA, "
            f"and build Horovod again: build_horovod.sh {sys.executable}"
        )
    version, needed = driver(proc), DRIVERS.get(int(torch.version.cuda.split(".")[0]), 0)
    least = f"{needed} or newer" if needed else "a newer one"
    expected = f"expected {least}, for CUDA {torch.version.cuda}"
    if not version:
        missing = f"no version in {proc}/driver/nvidia/version"
        return f"{gpus}: no NVIDIA driver is loaded ({missing}); {expected}. Install or load it"
    if int(version.split(".")[0]) < needed:
        return (
            f"{gpus}: the NVIDIA driver is {version}; {expected}. Update the driver, "
            "or install a torch for an older CUDA and build Horovod again"
        )
    return (
        f"{gpus}: torch cannot use a GPU through the NVIDIA driver {version} "
        f"({reason_of_torch()}). Run nvidia-smi; a container needs --gpus all (apptainer: --nv)"
    )


def driver(proc: str) -> str:
    """Return the version of the loaded NVIDIA driver, such as 580.65.06; "" without one."""
    try:
        match = re.search(r"\s(\d+\.\d+[.\d]*)\s", Path(proc, "driver/nvidia/version").read_text())
    except OSError:
        return ""
    return match[1] if match else ""


def reason_of_torch() -> str:
    """Return torch's reason why it cannot use a GPU."""
    try:
        torch.cuda.init()
    except Exception as error:
        text = str(error)
        number = re.search(r"Error \d+: .*", text)  # of cudaGetDeviceCount
        return number[0] if number else text.splitlines()[0].partition(". ")[0]
    return "it finds no GPU"


def without_kernels(index: int) -> str:
    """Return an error, with a fix, if torch has no kernels for a GPU, or "".

    index: the GPU's number among the visible ones.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns in eight lines
        capability = torch.cuda.get_device_capability(index)
        name, codes = torch.cuda.get_device_name(index), torch.cuda.get_arch_list()
    if not torch.version.cuda or any(runs(code, capability) for code in codes):
        return ""
    age = "a newer" if capability > max(map(version_of, codes), default=(0, 0)) else "an older"
    return (
        f"{name}: torch {torch.__version__} has no kernels for its compute capability "
        f"{capability[0]}.{capability[1]}; expected one of {', '.join(codes)}. Use another GPU, "
        f"or install a torch for {age} CUDA and build Horovod again"
    )


def version_of(code: str) -> tuple[int, int]:
    """Return the compute capability of sm_75, sm_90a or compute_120: (7, 5), (9, 0) or (12, 0)."""
    number = re.sub(r"\D", "", code)
    return int(number[:-1]), int(number[-1])


def runs(code: str, capability: tuple[int, int]) -> bool:
    """Return whether kernels for an architecture run on a GPU.

    Machine code (sm) runs on GPUs of the same major version and the same or a later minor one,
    sm_90a only on 9.0. PTX (compute) runs on all later GPUs. Source: NVIDIA, CUDA C++ Programming
    Guide, sections "Binary Compatibility" and "PTX Compatibility".

    code: of torch's list, such as sm_86 or compute_120. capability: (major, minor).
    """
    built = version_of(code)
    if code.endswith("a"):
        return capability == built
    return built <= capability and (code.startswith("compute") or built[0] == capability[0])


def without_nccl(workers: int) -> str:
    """Return the error that Horovod was built without NCCL, with a fix."""
    return (
        f"Horovod has no NCCL, which {workers} workers on GPUs need. Run HOROVOD_BACKEND=nccl "
        f"build_horovod.sh {sys.executable}: it builds NCCL in, or ends with what it needs"
    )
