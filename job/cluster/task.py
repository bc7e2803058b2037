"""This process as a task of its launcher: the launcher's name, rank, node and cores."""

import os
import platform

from job.cluster import comm, slurm

# Each launcher's variables for the rank and the number of tasks, in order of precedence.
LAUNCHERS = {
    "horovodrun": ("HOROVOD_RANK", "HOROVOD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "MPI": ("PMI_RANK", "PMI_SIZE"),
}


def launched() -> tuple[str, int, int]:
    """Return the name of the launcher, the rank of this task and the number of tasks."""
    for name, (rank, size) in LAUNCHERS.items():
        if name == "horovodrun" and slurm.ours():
            continue
        if rank in os.environ and size in os.environ:
            return name, int(os.environ[rank]), int(os.environ[size])
    return "none", 0, 1


def node() -> str:
    """Return the name of this worker's node: SLURM's, or else the machine's own."""
    return os.environ.get("SLURMD_NODENAME", platform.node())


def cores() -> int:
    """Return the number of CPU cores of this worker.

    They are SLURM's cores of a task, or else the node's cores divided by its workers.
    """
    available = len(os.sched_getaffinity(0))
    if launched()[0] == "srun" and "SLURM_CPUS_PER_TASK" in os.environ:
        return min(available, int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, available // comm.local_size())
