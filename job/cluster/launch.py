"""Start workers: connect the tasks of a launcher by Horovod, and give each worker its device."""

import contextlib
import os
import platform
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from job.cluster import (
    comm,
    deterministic,
    exits,
    gpus,
    nccl,
    objects,
    same_start,
    slurm,
    sockets,
    task,
)
from job.cluster.watchdog import Watchdog
from job.errors import RunError
from job.text import first_names


def start(options: Mapping[str, Any]) -> torch.device:
    """Connect the workers, and return the device of this worker. A collective.

    options: of the program, by name.
    RunError: the launcher started another number of tasks than Horovod has workers. Each task would be a
    whole run by itself, and write over the others' files. Or the workers differ
    (job/cluster/same_start.py), or one of them has a GPU that it cannot use (job/cluster/gpus.py).
    """
    deterministic.prepare(options)
    # Gradients are summed in buckets of a fixed order (job/engine/gradients.py). If a bucket fuses
    # with whatever else is ready, timing sets the order of its sum: from four workers on, a run's
    # bytes would depend on it.
    os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"
    # Horovod looks for collectives once a cycle. Each look is a message among all workers. It
    # delays a collective that begins meanwhile, and on CPUs it takes the cores that train. A long
    # cycle costs a step nothing: the start of a collective ends it (docker/build_horovod.sh), and
    # GPUs' collectives complete in a thread of their own. Only a broadcast, or a collective that is
    # new to Horovod's cache, can wait for a worker that began it earlier: for a cycle at most.
    os.environ.setdefault("HOROVOD_CYCLE_TIME", "50")  # ms
    if gpus.available():
        # The GPU's stream waits for a collective, and the host goes on to the next operations.
        os.environ.setdefault("HOROVOD_ENABLE_ASYNC_COMPLETION", "1")
        nccl.keep_log()
    if os.environ.get("MGD_LIFELINE") == "stdin":
        threading.Thread(target=exits.follow_stdin, daemon=True).start()
    sockets.shorten_paths()
    patience()
    name, _, size = task.launched()
    if size > 1 and not comm.connected():  # a script's second run finds the workers connected
        check_own_name()
        comm.load()  # before srun's rendezvous, which needs Horovod too
        joined = slurm.joined() if name == "srun" else contextlib.nullcontext()
        with exits.left_at_signals(), joined:
            comm.start()
    check_size(name, size)
    problem = gpus.problem(comm.local_rank(), comm.size(), comm.has_nccl())
    same_start.check(options, task.node(), on_cpu=not (problem or torch.cuda.is_available()))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(task.cores())
    device = own_device(problem)
    deterministic.apply(options, device)
    return device


def check_own_name() -> None:
    """RunError: this machine's own name does not resolve, at which Horovod would end without a word."""
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        raise RunError(
            f"this machine's own name, {socket.gethostname()}, does not resolve: add it to /etc/hosts "
            "(in Docker: --network host, or --hostname localhost)"
        ) from None


def patience() -> tuple[float, float]:
    """The seconds after which a worker that waits for another says so, and after which it ends: Horovod's own settings.

    Horovod's own check asks every worker first, and so says nothing of one that stands still or is out of reach,
    while Gloo gives up after 30 s and does not know on whom: job/cluster/watchdog.py looks instead.
    """
    os.environ.setdefault("HOROVOD_STALL_CHECK_DISABLE", "1")
    warn = slurm.seconds("HOROVOD_STALL_CHECK_TIME_SECONDS", 60)
    end = max(warn, slurm.seconds("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", 900))
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(int(end) + 60))
    return warn, end


def check_size(name: str, size: int) -> None:
    """RunError: the launcher `name` started another number of tasks, `size`, than Horovod has workers."""
    if size != comm.size():
        raise RunError(
            f"{name} started {size} tasks, but Horovod has {comm.size()} workers: start with `horovodrun -np {size} ...`"
        )
    steps = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if name == "horovodrun" and steps > 1:
        raise RunError(
            f"srun started {steps} tasks, and each a horovodrun of {size} workers: start the program itself with srun, "
            "or horovodrun without srun"
        )
    asked = int(os.environ.get("SLURM_NTASKS", 1))
    if name == "none" and asked > 1:
        raise RunError(
            f"the SLURM job has {asked} tasks, but Horovod has 1 worker: start with `srun python -m ...`"
        )


def own_device(problem: str) -> torch.device:
    """The GPU of this worker's local rank, or the only one that SLURM lets it see; the CPU where no worker has any. A collective.

    problem: why this worker cannot use its GPU, or "" (job/cluster/gpus.py).
    RunError, on all workers: one has a problem, two have the same GPU, or some have none.
    """
    usable = not problem and torch.cuda.is_available()
    index = comm.local_rank() % torch.cuda.device_count() if usable else 0
    mine = (platform.node(), str(torch.cuda.get_device_properties(index).uuid) if usable else "")
    found = objects.allgather((*mine, problem), "gpus")  # (node, GPU, problem)
    check_gpus(found)
    taken = [(node, gpu) for node, gpu, _ in found]
    without = [node for node, gpu in taken if not gpu]
    if len(without) == comm.size():
        return torch.device("cpu")
    if without:
        raise RunError(
            f"no GPU on {', '.join(sorted(set(without)))}, and GPUs on the other nodes: fix that, "
            "or start all with CUDA_VISIBLE_DEVICES= to train on CPUs"
        )
    if len(set(taken)) < comm.size():
        raise RunError(
            f"{comm.local_size()} workers on a machine of {torch.cuda.device_count()} GPUs: start one worker a GPU"
        )
    torch.cuda.set_device(index)
    torch.backends.cudnn.deterministic = True  # a resumed run ends with the same bytes
    return torch.device("cuda", index)


def check_gpus(found: Sequence[tuple[str, str, str]]) -> None:
    """RunError: a worker cannot use its GPU; the first such worker's line, with its nodes.

    found: (node, GPU, problem) of each worker.
    """
    first = next((problem for *_, problem in found if problem), "")
    if not first:
        return
    nodes = sorted({node for node, _, problem in found if problem == first})
    several = len({node for node, *_ in found}) > 1
    raise RunError(f"{first} (on {first_names(nodes)})" if several else first)


def watchdog(remark: Callable[[str, str, str], None]) -> Watchdog:
    """A watchdog over this worker, on the interface that Horovod uses. A collective."""
    address = slurm.address_of(os.environ.get("HOROVOD_GLOO_IFACE", "lo"))
    return Watchdog(address, task.node(), *patience(), remark)
