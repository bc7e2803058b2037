"""What a run's workers hold at a moment: memory, open files, threads, processes below them; and at which step they are."""

import json
import os
import time
from pathlib import Path

import psutil

MODULE = ["-m", "job.train"]


def workers(launcher: int) -> list[psutil.Process]:
    """The workers that a launcher's process has started, by rank."""
    found = {}
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            if process.cmdline()[1:3] == MODULE:
                found[int(process.environ()["HOROVOD_RANK"])] = process
        except (psutil.Error, KeyError):
            continue  # it has ended, or is about to become something else
    return [found[rank] for rank in sorted(found)]


def sample(launcher: int, metrics: Path) -> list[dict]:
    """Return a dict a worker; none while the run starts, or where a worker ends in between.

    epoch, step: of the last step that was recorded when the sample was complete; None if an epoch has ended meanwhile.
    rss_mb: memory of the worker itself; tree_mb: what it and each process below it have to themselves (USS). What is shared is
    not in it: its part of that (PSS) grows and falls by 25 MB as other programs begin and end that have torch loaded too.
    """
    begun, before = time.time(), place(metrics)
    try:
        found = [hold(process) for process in workers(launcher)]
    except psutil.Error:
        return []
    epoch, step = place(metrics)
    if epoch != before[0]:
        epoch = step = None
    return [
        {"time": begun, "epoch": epoch, "step": step, "rank": rank, **one}
        for rank, one in enumerate(found)
    ]


def hold(worker: psutil.Process) -> dict:
    """What one worker holds."""
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


def place(metrics: Path) -> tuple[int | None, int | None]:
    """The (epoch, step) of the last step that metrics.jsonl has."""
    if not metrics.exists():
        return None, None
    with open(metrics, "rb") as file:
        file.seek(max(0, os.path.getsize(metrics) - 4096))
        lines = file.read().decode(errors="replace").splitlines()[1:]
    for line in reversed(lines):
        if line.endswith("}") and (record := json.loads(line))["kind"] == "step":
            return record["epoch"], record["step"]
    return None, None
