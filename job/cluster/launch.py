"""Start the workers: connect the launcher's tasks by Horovod, and choose a device for each."""

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
    RunError: the launcher's number of tasks is not Horovod's number of workers (each task would
    then be a run of its own, and overwrite the files of the others). Or the workers differ
    (job/cluster/same_start.py), or one of them cannot use its GPU (job/cluster/gpus.py).
    """
    deterministic.prepare(options)
    # Gradients are summed in buckets of a fixed order (job/engine/gradients.py). If Horovod fused a
    # bucket with other tensors that are ready, timing would set the order of its sum. With four or
    # more workers, a run's bytes would depend on it.
    os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"
    # Once a cycle, Horovod exchanges a message among all workers to find new collectives. The
    # message delays a collective that begins meanwhile, and on CPUs it uses the cores that train.
    # A long cycle costs a step no time: the start of a collective ends the cycle
    # (docker/build_horovod.sh), and GPUs' collectives complete in a thread of their own. Only a
    # broadcast, or a collective that is new to Horovod's cache, can wait for a worker that began it
    # earlier: for at most one cycle.
    os.environ.setdefault("HOROVOD_CYCLE_TIME", "50")  # ms
    if gpus.available():
        # The GPU's stream waits for a collective, and the host queues the next operations.
        os.environ.setdefault("HOROVOD_ENABLE_ASYNC_COMPLETION", "1")
        nccl.keep_log()
    if os.environ.get("MGD_LIFELINE") == "stdin":
        threading.Thread(target=exits.follow_stdin, daemon=True).start()
    sockets.shorten_paths()
    patience()
    name, _, size = task.launched()
    if size > 1 and not comm.connected():  # already connected in a script's second run
        check_own_name()
        comm.load()  # first: srun's rendezvous needs Horovod too
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
    """Check that this machine's own name resolves. Horovod would end without a message.

    RunError: it does not.
    """
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        raise RunError(
            f"this machine's own name, {socket.gethostname()}, does not resolve. Add it to "
            "/etc/hosts (in Docker: --network host, or --hostname localhost)"
        ) from None


def patience() -> tuple[float, float]:
    """Return the s after which a wait for other workers is reported, and ends this worker.

    They are Horovod's own settings, but job/cluster/watchdog.py checks them. Horovod's check needs
    answers of all workers, so it does not report a worker that hangs or is unreachable. Gloo ends
    a wait after 30 s without the other worker's name.
    """
    os.environ.setdefault("HOROVOD_STALL_CHECK_DISABLE", "1")
    warn = slurm.seconds("HOROVOD_STALL_CHECK_TIME_SECONDS", 60)
    end = max(warn, slurm.seconds("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", 900))
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(int(end) + 60))
    return warn, end


def check_size(name: str, size: int) -> None:
    """Check that the launcher `name` started as many tasks, `size`, as Horovod has workers.

    RunError: it did not.
    """
    if size != comm.size():
        raise RunError(
            f"{name} started {size} tasks, but Horovod has {comm.size()} workers. Start with "
            f"`horovodrun -np {size} ...`"
        )
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if name == "horovodrun" and tasks > 1:
        raise RunError(
            f"srun started {tasks} tasks, and each a horovodrun of {size} workers. Start the "
            "program itself with srun, or horovodrun without srun"
        )
    allocated = int(os.environ.get("SLURM_NTASKS", 1))
    if name == "none" and allocated > 1:
        raise RunError(
            f"the SLURM job has {allocated} tasks, but Horovod has 1 worker. Start with "
            "`srun python -m ...`"
        )


def own_device(problem: str) -> torch.device:
    """Return this worker's device. A collective.

    It is the GPU of the local rank, or the only GPU that SLURM shows to this worker. If no worker
    has a GPU, it is the CPU.

    problem: why this worker cannot use its GPU, or "" (job/cluster/gpus.py).
    RunError, on all workers: a worker has a problem, two have the same GPU, or only some have one.
    """
    usable = not problem and torch.cuda.is_available()
    index = comm.local_rank() % torch.cuda.device_count() if usable else 0
    mine = (platform.node(), str(torch.cuda.get_device_properties(index).uuid) if usable else "")
    workers = objects.allgather((*mine, problem), "gpus")  # (node, GPU, problem)
    check_gpus(workers)
    used = [(node, gpu) for node, gpu, _ in workers]
    without = [node for node, gpu in used if not gpu]
    if len(without) == comm.size():
        return torch.device("cpu")
    if without:
        raise RunError(
            f"no GPU on {', '.join(sorted(set(without)))}, but GPUs on the other nodes. Fix that, "
            "or start all workers with CUDA_VISIBLE_DEVICES= to train on CPUs"
        )
    if len(set(used)) < comm.size():
        raise RunError(
            f"{comm.local_size()} workers on a machine with {torch.cuda.device_count()} GPUs. "
            "Start one worker a GPU"
        )
    torch.cuda.set_device(index)
    torch.backends.cudnn.deterministic = True  # a resumed run ends with the same bytes
    return torch.device("cuda", index)


def check_gpus(workers: Sequence[tuple[str, str, str]]) -> None:
    """Check that no worker has a problem with its GPU.

    workers: (node, GPU, problem) of each.
    RunError: the first problem, with the nodes that have the same one.
    """
    first = next((problem for *_, problem in workers if problem), "")
    if not first:
        return
    nodes = sorted({node for node, _, problem in workers if problem == first})
    several = len({node for node, *_ in workers}) > 1
    raise RunError(f"{first} (on {first_names(nodes)})" if several else first)


def watchdog(remark: Callable[[str, str, str], None]) -> Watchdog:
    """Return this worker's watchdog, on the interface that Horovod uses. A collective."""
    address = slurm.address_of(os.environ.get("HOROVOD_GLOO_IFACE", "lo"))
    return Watchdog(address, task.node(), *patience(), remark)
