"""Jobs of a real SLURM, and the records of their runs."""

import json
import re
import time
from pathlib import Path

import psutil

from runs import of_kind

REPO = Path(__file__).parents[2]
EPOCHS, EPOCH = 3, 50 // 12  # steps an epoch
STEPS = EPOCHS * EPOCH
ANY = "-a resnet18 --image-size 32 --batch-size 12 --aug-plus --cos --workers 0".split()
ANY += f"--epochs {EPOCHS} --warmup-epochs 1 --save-every 2steps --keep 9".split()
SMALL = [*ANY, *"--moco-k 60 --mlp --moco-t 0.2".split()]
TEACHER = "--refresh-epochs 0,1 --teacher".split()  # before the file
SIMSIAM = [*ANY, *"--framework simsiam --width 16 --dim 64 --pred-dim 16 --fix-pred-lr".split()]


class BatchJob:
    """A job of one of this project's scripts."""

    def __init__(self, slurm, number: str, log: Path, run: Path):
        self.slurm, self.number, self.log, self.run = slurm, number, log, run

    def text(self) -> str:
        """Return the job's log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def shown(self, field: str) -> str:
        """Return a field of `scontrol show job`."""
        return re.search(
            rf"\b{field}=(\S*)", self.slurm("scontrol", "show", "job", "-o", self.number)
        )[1]

    def steps(self) -> list[int]:
        """Return the numbers of the steps recorded in metrics.jsonl so far."""
        return [record["steps"] for record in of_kind(self.run, "step")]

    def records(self, kind: str) -> list[dict]:
        """Return the records of a kind in the job's log."""
        return [
            json.loads(line)
            for line in self.text().splitlines()
            if line.startswith(f'{{"kind": "{kind}", ')
        ]

    def decisions(self) -> list[str]:
        """Return the reasons of the job's decisions so far, one for each try."""
        return [record["reason"] for record in self.records("decision")]

    def wait_for_decision(self, reason: str, times: int = 1, seconds: float = 120) -> float:
        return self.wait(
            f"the decision '{reason}'", lambda: self.decisions().count(reason) >= times, seconds
        )

    def wait_for_stop(self) -> None:
        """Wait until a try has saved a checkpoint and stopped because of a signal."""
        self.wait(
            "a stop", lambda: "stopped" in [record["how"] for record in of_kind(self.run, "end")]
        )

    def tasks(self) -> dict[int, psutil.Process]:
        """Return the job's running tasks by rank."""
        step = {
            process: process.environ()
            for process in self.processes()
            if process.cmdline()[1:2] == ["-m"]
        }
        return {
            int(values["SLURM_PROCID"]): process
            for process, values in step.items()
            if "SLURM_STEP_NUM_TASKS" in values
        }

    def processes(self) -> list[psutil.Process]:
        """Return all live processes that this job has started."""
        processes = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                ours = environment.get("SLURM_CONF", "").startswith(f"{self.slurm.folder}/")
                if (
                    ours
                    and environment.get("SLURM_JOB_ID") == self.number
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    processes.append(process)
            except psutil.Error:
                continue
        return processes

    def wait(self, event: str, condition, seconds: float = 120, pause: float = 0.05) -> float:
        """Wait until `condition()` holds and return the waiting time in seconds."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() < start + seconds, (
                f"waited {seconds} s for {event}. The log:\n{self.text()}"
            )
            time.sleep(pause)
        return time.monotonic() - start

    def wait_for_step(self, step: int) -> None:
        self.wait(f"step {step}", lambda: step in self.steps())

    def wait_for_line(self, text: str, times: int = 1, seconds: float = 120) -> float:
        return self.wait(f"'{text}'", lambda: self.text().count(text) >= times, seconds)

    def wait_for_end(self, seconds: float = 180) -> str:
        """Wait until the job has ended and return its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait("the job's end", lambda: self.shown("JobState") in over, seconds)
        return self.shown("JobState")
