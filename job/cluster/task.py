"""This process as a task of its launcher: the launcher's name, the task's rank, node and cores."""

import os
import platform

from job.cluster import comm, slurm

# Variables of each launcher with a task's rank and the number of tasks, in order of precedence.
LAUNCHERS = {
    "horovodrun": ("HOROVOD_RANK", "HOROVOD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "MPI": ("PMI_RANK", "PMI_SIZE"),
}


def launched() -> tuple[str, int, int]:
    """Return the launcher's name, this task's rank and the number of tasks, from its variables."""
    for name, (rank, size) in LAUNCHERS.items():
        if name == "horovodrun" and slurm.ours():
            continue
        if rank in os.environ and size in os.environ:
            return name, int(os.environ[rank]), int(os.environ[size])
    return "none", 0, 1


def node() -> str:
    """Return the name of this worker's node, as SLURM or the machine itself has it."""
    return os.environ.get("SLURMD_NODENAME", platform.node())


def cores() -> int:
    """Return the number of this worker's cores on its machine.

    They are those that SLURM gives to a task, or an equal part of all.
    """
    available = len(os.sched_getaffinity(0))
    if launched()[0] == "srun" and "SLURM_CPUS_PER_TASK" in os.environ:
        return min(available, int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, available // comm.local_size())
