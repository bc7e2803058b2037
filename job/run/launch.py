"""From a launcher's processes to Horovod workers: checks, threads, devices, and how errors leave them."""

import contextlib
import ctypes
import os
import sys
import time

import torch

from job.errors import RunError

try:
    import horovod.torch as hvd
except ImportError:
    sys.exit("Horovod is not installed for this Python: run docker/build_horovod.sh " + sys.executable)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h

# What launchers say of their tasks, in the order in which they are asked.
LAUNCHERS = {
    "horovodrun": ("HOROVOD_RANK", "HOROVOD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "MPI": ("PMI_RANK", "PMI_SIZE"),
}


def launched() -> tuple[str, int, int]:
    """Return the launcher's name, this task's rank and the number of tasks, from its variables."""
    for name, (rank, size) in LAUNCHERS.items():
        if rank in os.environ and size in os.environ:
            return name, int(os.environ[rank]), int(os.environ[size])
    return "none", 0, 1


def start() -> torch.device:
    """Start Horovod, and return the device of this worker.

    RunError: the launcher started another number of tasks than Horovod has workers. Each task would be a
    whole run by itself, and write over the others' files.
    """
    # Gradients are summed in buckets of a fixed order: a bucket that fuses with whatever else is ready adds in
    # an order set by timing, and from four workers on the bytes of a run would depend on it.
    os.environ["HOROVOD_DISABLE_GROUP_FUSION"] = "1"
    # A worker that never joins a collective ends the run, after Horovod has named it in the log.
    os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", "60")
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "900")
    if not torch.cuda.is_available():
        # Workers on CPUs pay for each look at what is ready with the cores that they train on.
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "5")  # ms
    hvd.init()
    name, _, size = launched()
    if size != hvd.size():
        raise RunError(
            f"{name} started {size} tasks, but Horovod has {hvd.size()} workers: start with `horovodrun -np {size} ...`"
        )
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores())
    if not (torch.cuda.is_available() and hvd.nccl_built()):
        return torch.device("cpu")
    if hvd.local_size() > torch.cuda.device_count():
        raise RunError(f"{hvd.local_size()} workers on a machine of {torch.cuda.device_count()} GPUs: start one worker a GPU")
    torch.cuda.set_device(hvd.local_rank())
    torch.backends.cudnn.deterministic = True  # a resumed run ends with the same bytes
    return torch.device("cuda", hvd.local_rank())


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free instead of giving it back to the system.

    A step frees and takes gigabytes of feature maps, and each page given back costs a fault when it returns:
    measured at 224 pixels on the CPU, 0.6 of 4.5 seconds a step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cores() -> int:
    """The cores of this machine that are this worker's share."""
    return max(1, len(os.sched_getaffinity(0)) // (hvd.local_size() if hvd.is_initialized() else 1))


@contextlib.contextmanager
def reported_errors():
    """End the program on a RunError with its line, from rank 0 alone, and its exit code."""
    try:
        yield
    except RunError as error:
        if launched()[1] == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # horovodrun ends all at the first that goes: let rank 0 speak before
        sys.exit(error.code)
    except hvd.mpi_ops.HorovodInternalError as error:
        first = str(error).splitlines()[0] if str(error) else "Horovod stopped"
        print(f"error: another worker is gone ({first}); its own last lines say why", file=sys.stderr, flush=True)
        sys.exit(1)
