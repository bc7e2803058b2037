"""Runs that are killed several times in a row, each time resumed, and at last let to their end."""

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from job.errors import RunError
from job.run.checkpoint import load
from phases import Phases
from runs import Job, differences, records

EPOCHS = 4
COMMON = f"--image-size 32 --batch-size 8 --epochs {EPOCHS} --save-every 2steps --print-freq 1".split()
TRAIN = "-a resnet18 --moco-k 20 --mlp --moco-t 0.2 --aug-plus --cos --warmup-epochs 1 --refresh-epochs every:1".split()
OPTIONS = {
    "job.train": [*COMMON, *TRAIN, "--knn-every", 1],
    "job.linear": [*COMMON, "--schedule", 2, "--lr", 0.3],
}
WHOM = ("rank 0", "rank 1", "all")
# Seconds from a phase's beginning to the latest kill that is aimed at it: about as long as it takes.
LENGTH = {"start-up": 7.0, "steps": 0.8, "refresh": 0.8, "evaluation": 0.6, "checkpoint write": 0.3}
PATIENCE = 120  # s until all of a run's processes have to be gone when one is killed; horovodrun takes up to 60
END = 900  # s until a run has to have come to its end, or to the phase that is waited for


class Lost(Exception):
    """Something did not survive."""


@dataclass
class Fault:
    """One that was tried: what it hit, whom, and whether the run that it hit ended as if undisturbed."""

    phase: str
    whom: str = ""
    survived: bool = False


class KilledRun:
    """A run of `program` with two workers in `folder`, to be compared with an undisturbed one in `whole`."""

    def __init__(self, program: str, arguments: list, folder: Path, whole: Path):
        self.program, self.arguments, self.folder, self.whole = program, arguments, folder, whole
        self.job = None

    def start(self) -> None:
        self.job = Job(2, self.folder, [*self.arguments, "--resume", "auto"], self.program)

    def kills(self, aims: Iterable[tuple[str, str]], generator: random.Random) -> Iterator[Fault]:
        """Start and kill it once for each of (phase, whom), and yield what was hit; no more once it has reached its end.

        Lost: a checkpoint is not whole, or a process goes on.
        """
        linear = self.program == "job.linear"
        for phase, whom in aims:
            phase = "evaluation" if linear and phase == "refresh" else phase
            phases = Phases(self.folder, linear)
            self.start()
            self.wait_for(phase, phases)
            time.sleep(generator.uniform(0, LENGTH[phase]))
            while not (victims := self.victims(whom)):
                if self.job.process.poll() is not None:
                    return
                time.sleep(0.02)
            self.kill(victims)
            yield Fault(phases.now(), whom)
            check(self.folder)
        self.start()

    def wait_for(self, phase: str, phases: Phases) -> None:
        """Wait until the run begins a phase, or has ended before. Lost: neither comes."""
        deadline = time.monotonic() + END
        while phase != "start-up" and phases.now() != phase and self.job.process.poll() is None:
            time.sleep(0.002)
            if time.monotonic() > deadline:
                raise Lost(f"the run stands in {phases.now()} for {END} s")

    def victims(self, whom: str) -> list[psutil.Process]:
        """The processes to kill, as soon as all workers are there: those of one rank, or all with their launcher."""
        ranks = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for worker in self.job.workers():
                ranks[f"rank {worker.environ().get('HOROVOD_RANK')}"] = worker
        if len(ranks) < 2:
            return []
        return [psutil.Process(self.job.process.pid), *ranks.values()] if whom == "all" else [ranks[whom]]

    def kill(self, victims: list[psutil.Process]) -> None:
        """SIGKILL them, and see that what else belongs to the run ends with them. Lost: it does not."""
        below = psutil.Process(self.job.process.pid).children(recursive=True)
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        try:
            self.job.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Lost(f"the launcher goes on {PATIENCE} s after the kill") from None
        _, alive = psutil.wait_procs(below, timeout=PATIENCE)
        if alive:
            raise Lost(f"left behind by killed workers: {alive}")

    def finish(self) -> None:
        """Let it come to its end. Lost: it does not, or ends otherwise than the undisturbed one."""
        try:
            output, _ = self.job.process.communicate(timeout=END)
        except subprocess.TimeoutExpired:
            raise Lost("the resumed run does not end") from None
        if self.job.process.returncode:
            raise Lost(f"the resumed run fails:\n{output}")
        check(self.folder)
        names = {path.name for path in self.folder.iterdir()}
        if names != {path.name for path in self.whole.iterdir()}:
            raise Lost(f"other files than those of an undisturbed run: {sorted(names)}")
        for name in {"last.pth.tar", "best.pth.tar"} & names:
            if differs := differences(self.whole, self.folder, name):
                raise Lost(f"{name} has other bytes than that of an undisturbed run: {differs[:5]}")
        if records(self.folder) != records(self.whole):
            raise Lost("metrics.jsonl has other numbers than that of an undisturbed run")

    def close(self) -> None:
        """End what still runs."""
        if self.job and self.job.process.poll() is None:
            self.job.kill()


def check(folder: Path) -> None:
    """Lost: a checkpoint with a name of its own is not whole, or `complete` stands in a folder that is not."""
    for path in folder.glob("*.pth.tar"):
        try:
            content = load(str(path))
        except RunError as error:
            raise Lost(str(error)) from None
        if path.name == "last.pth.tar" and (folder / "complete").exists() and content["epoch"] < EPOCHS:
            raise Lost(f"`complete` stands beside a checkpoint of epoch {content['epoch']}")


def undisturbed(program: str, arguments: list, folder: Path) -> Path:
    """Run a program to its end with two workers; return its folder."""
    job = Job(2, folder, arguments, program)
    output, _ = job.process.communicate(timeout=END)
    if job.process.returncode:
        raise SystemExit(f"the undisturbed run of {program} fails:\n{output}")
    return folder
