"""Jobs that run in turns: several horovodrun jobs exist, one computes, the others are stopped.

At the end of its turn a worker stops itself with all its threads (SIGSTOP), so the next job has the
machine for itself. The bench continues it (SIGCONT) for another turn. So both sides of a comparison
run within a minute, in separate processes with separate peaks of memory. No job starts or warms up
twice.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from job.cluster import comm

PATIENCE = 600  # seconds for a turn
# While a job is stopped, its network's timeouts continue to run. None may expire.
LIMITS = (
    "HOROVOD_GLOO_TIMEOUT_SECONDS",
    "HOROVOD_STALL_CHECK_TIME_SECONDS",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS",
)
LASTING = dict.fromkeys(LIMITS, "7200")


def take_turns(folder: Path, work) -> None:
    """In each turn, call `work()`, write its dict and stop. Return when the job is closed."""
    figures = folder / f"{comm.rank()}.jsonl"
    while not (folder / "closed").exists():
        comm.total(torch.ones(1), "turn begins")
        result = work()
        comm.total(torch.ones(1), "turn ends")  # the other workers need this one no longer
        with open(figures, "a") as file:
            file.write(json.dumps({"pid": os.getpid(), **result}) + "\n")
        os.kill(os.getpid(), signal.SIGSTOP)


def launch(workers: int, script: Path, arguments: list, output, **environment) -> subprocess.Popen:
    """Start `python script arguments`, under horovodrun if there are workers.

    By default each worker has one thread and uses the CPU.
    """
    command = [sys.executable, str(script), *map(str, arguments)]
    if workers:
        horovodrun = shutil.which(
            "horovodrun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        )
        command = [horovodrun, "-np", str(workers), *command]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **LASTING} | environment
    return subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment
    )


class Job:
    """A job that runs in turns: `script folder arguments` calls `take_turns(folder, ...)`."""

    def __init__(self, workers: int, script: Path, folder: Path, arguments: list, **environment):
        self.workers, self.folder, self.turns = workers, folder, 0
        folder.mkdir()
        self.output = open(folder / "output.txt", "w")
        self.process = launch(workers, script, [folder, *arguments], self.output, **environment)

    def turn(self) -> list[dict]:
        """Let the workers do a turn. Return each worker's result."""
        self.start()
        return self.finish()

    def start(self) -> None:
        """Start a turn. The workers start the first by themselves."""
        if self.turns:
            self.signal(signal.SIGCONT)
        self.turns += 1

    def finish(self) -> list[dict]:
        """Wait until all workers have written their results and stopped. Return the results."""
        deadline = time.monotonic() + PATIENCE
        while True:
            results = [self.lines(rank) for rank in range(self.workers)]
            if all(len(lines) == self.turns and is_stopped(lines[-1]["pid"]) for lines in results):
                return [lines[-1] for lines in results]
            if self.process.poll() is not None or time.monotonic() > deadline:
                output = (self.folder / "output.txt").read_text()
                raise RuntimeError(f"a job of the bench ended early:\n{output}")
            time.sleep(0.02)

    def lines(self, rank: int) -> list[dict]:
        """Return the results that a worker has written so far, one per turn."""
        path = self.folder / f"{rank}.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def signal(self, number: int) -> None:
        """Send a signal to all workers."""
        for rank in range(self.workers):
            for line in self.lines(rank)[-1:]:
                psutil.Process(line["pid"]).send_signal(number)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Let the workers end by themselves. After an error, kill them."""
        (self.folder / "closed").touch()
        running = self.process.poll() is None
        below = psutil.Process(self.process.pid).children(recursive=True) if running else []
        if kind is None:
            self.signal(signal.SIGCONT)
            self.process.wait(PATIENCE)
        else:
            for process in below:
                if process.is_running():
                    process.kill()
            self.process.kill()
            self.process.wait()
        self.output.close()


def is_stopped(pid: int) -> bool:
    """Return whether a signal has stopped a process."""
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED
