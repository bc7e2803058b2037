"""Jobs that take turns: several horovodrun jobs stay alive, one computes, the others stand still.

A worker stops itself (SIGSTOP) when its turn is over, with all its threads, so that the next job has the machine for
itself; the bench wakes it (SIGCONT) for another. So what is compared runs within the same minute, in processes of
its own, with its own peak of memory, and nothing is started or warmed up twice.
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
# While a job stands still its network's clocks run on: none may give up.
LIMITS = (
    "HOROVOD_GLOO_TIMEOUT_SECONDS",
    "HOROVOD_STALL_CHECK_TIME_SECONDS",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS",
)
LASTING = dict.fromkeys(LIMITS, "7200")


def take_turns(folder: Path, work) -> None:
    """Call `work()` once a turn, leave the dict that it returns for the bench, and stand still; until the job is closed."""
    figures = folder / f"{comm.rank()}.jsonl"
    while not (folder / "closed").exists():
        comm.total(torch.ones(1), "turn begins")
        found = work()
        comm.total(torch.ones(1), "turn ends")  # the other workers are through with this one
        with open(figures, "a") as file:
            file.write(json.dumps({"pid": os.getpid(), **found}) + "\n")
        os.kill(os.getpid(), signal.SIGSTOP)


def launch(workers: int, script: Path, arguments: list, output, **environment) -> subprocess.Popen:
    """Start `python script arguments`, under horovodrun if there are workers: one thread each, on the CPU by default."""
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
    """A job whose workers take turns, for the bench: `script folder arguments` calls `take_turns(folder, ...)`."""

    def __init__(self, workers: int, script: Path, folder: Path, arguments: list, **environment):
        self.workers, self.folder, self.turns = workers, folder, 0
        folder.mkdir()
        self.output = open(folder / "output.txt", "w")
        self.process = launch(workers, script, [folder, *arguments], self.output, **environment)

    def turn(self) -> list[dict]:
        """Let the workers do a turn, the first of which they take by themselves, and return what each found."""
        self.start()
        return self.finish()

    def start(self) -> None:
        """Begin a turn."""
        if self.turns:
            self.signal(signal.SIGCONT)
        self.turns += 1

    def finish(self) -> list[dict]:
        """Wait until the turn is over: all have written their lines, and stand still."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = [self.lines(rank) for rank in range(self.workers)]
            if all(len(lines) == self.turns and stands_still(lines[-1]["pid"]) for lines in found):
                return [lines[-1] for lines in found]
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"a job of the bench ended early:\n{(self.folder / 'output.txt').read_text()}"
                )
            time.sleep(0.02)

    def lines(self, rank: int) -> list[dict]:
        """What a worker has written so far, a line a turn."""
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
        """Let the workers end by themselves, or end them if something failed."""
        (self.folder / "closed").touch()
        below = (
            psutil.Process(self.process.pid).children(recursive=True)
            if self.process.poll() is None
            else []
        )
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


def stands_still(pid: int) -> bool:
    """Whether a process has been stopped."""
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED
