"""--deterministic: settings of torch, CUDA and NCCL for the same bytes on GPUs each time.

cuDNN's deterministic algorithms are always chosen (job/cluster/launch.py). This module adds
torch's, and fixes cuBLAS's workspace and NCCL's order of summation. It has no effect on a CPU.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch

from job.errors import RunError

# Variable: its accepted values. The first one is the default. Sources: NVIDIA, cuBLAS, "Results
# reproducibility", and NCCL, "Environment variables". NCCL chooses algorithm and protocol by size
# and network, and each adds in another order.
VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring",),
    "NCCL_PROTO": ("Simple",),
}

# Whether CUDA has started with the variables. A run from a script restores them at its end.
started = False


def prepare(options: Mapping[str, Any]) -> None:
    """Set the variables if --deterministic is given. Call it before CUDA and NCCL start.

    RunError: a variable has a value that is not accepted, or CUDA has started without it.
    """
    if not options.get("deterministic"):
        return
    for name, accepted in VARIABLES.items():
        value = os.environ.get(name, "")
        if value and value not in accepted:
            expected = f"--deterministic expects {' or '.join(accepted)}"
            raise RunError(
                f"{name}={value}: {expected}. Unset {name}, or leave --deterministic out"
            )
        if not value and torch.cuda.is_initialized() and not started:
            late = "CUDA has started without it, and --deterministic needs it"
            raise RunError(f"{name}: {late}. Set {name}={accepted[0]} before the script starts")
        os.environ[name] = value or accepted[0]


def apply(options: Mapping[str, Any], device: torch.device) -> None:
    """Make torch use only deterministic algorithms on a GPU if --deterministic is given.

    Call it after `prepare` and the first use of the device. From then on, an operation without
    such an algorithm raises an error.
    """
    global started
    if options.get("deterministic") and device.type == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
        started = True
