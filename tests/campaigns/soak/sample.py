"""Sample a run's workers: memory, open files, threads, child processes, and the position."""

import json
import os
import time
from pathlib import Path

import psutil

MODULE = ["-m", "job.train"]


def workers(launcher: int) -> list[psutil.Process]:
    """Return the workers of a launcher's process, by rank."""
    by_rank = {}
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            if process.cmdline()[1:3] == MODULE:
                by_rank[int(process.environ()["HOROVOD_RANK"])] = process
        except (psutil.Error, KeyError):
            continue  # it has ended, or is about to execute another program
    return [by_rank[rank] for rank in sorted(by_rank)]


def sample(launcher: int, metrics: Path) -> list[dict]:
    """Return a dict for each worker; [] while the run starts, or if a worker ends meanwhile.

    epoch, step: the last recorded step after the sample, None if the epoch has ended.
    rss_mb: memory of the worker.
    tree_mb: private memory (USS) of the worker and of its child processes. It excludes shared
    memory, whose proportion (PSS) changes by 25 MB when other programs with torch start or end.
    """
    start, before = time.time(), position(metrics)
    try:
        resources = [measure(process) for process in workers(launcher)]
    except psutil.Error:
        return []
    epoch, step = position(metrics)
    if epoch != before[0]:
        epoch = step = None
    return [
        {"time": start, "epoch": epoch, "step": step, "rank": rank, **one}
        for rank, one in enumerate(resources)
    ]


def measure(worker: psutil.Process) -> dict:
    """Return a worker's resources."""
    below = worker.children(recursive=True)
    with worker.oneshot():
        memory, spent = worker.memory_full_info(), worker.cpu_times()
    return {
        "rss_mb": memory.rss / 1e6,
        "tree_mb": (memory.uss + sum(process.memory_full_info().uss for process in below)) / 1e6,
        "files": worker.num_fds(),
        "threads": worker.num_threads(),
        "processes": len(below),
        "cpu_s": spent.user + spent.system,
    }


def position(metrics: Path) -> tuple[int | None, int | None]:
    """Return the (epoch, step) of the last step in metrics.jsonl."""
    if not metrics.exists():
        return None, None
    with open(metrics, "rb") as file:
        file.seek(max(0, os.path.getsize(metrics) - 4096))
        lines = file.read().decode(errors="replace").splitlines()[1:]
    for line in reversed(lines):
        if line.endswith("}") and (record := json.loads(line))["kind"] == "step":
            return record["epoch"], record["step"]
    return None, None
