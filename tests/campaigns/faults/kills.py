"""Runs that are killed or stopped and resumed several times, and then finished."""

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import psutil

from job.errors import RunError
from job.checkpoints.folder import AUTO, DECISION, NAME, Checkpoints, load
from phases import GOING_BACK, Phases
from runs import Job, differences, records

EPOCHS = 4
COMMON = (
    f"--image-size 32 --batch-size 8 --epochs {EPOCHS} --save-every 2steps --print-freq 1".split()
)
TRAIN = "-a resnet18 --moco-k 20 --mlp --moco-t 0.2 --aug-plus --cos --warmup-epochs 1".split()
TRAIN += "--refresh-epochs every:1".split()
OPTIONS = {
    "job.train": [*COMMON, *TRAIN, "--knn-every", 1],
    "job.linear": [*COMMON, "--schedule", 2, "--lr", 0.3],
}
# Seconds from the start of a phase to the latest signal that aims at it: about the phase's length.
LENGTH = {
    "start-up": 7.0,
    GOING_BACK: 1.5,
    "steps": 0.8,
    "refresh": 0.8,
    "k-NN": 0.6,
    "validation": 0.6,
    "checkpoint write": 0.3,
}
AIMED = {
    "job.train": ("start-up", GOING_BACK, "steps", "refresh", "k-NN", "checkpoint write"),
    "job.linear": ("start-up", GOING_BACK, "steps", "validation", "checkpoint write"),
}
HITS = [("rank 0", "SIGKILL"), ("rank 1", "SIGKILL"), ("all", "SIGKILL")]
# After these signals, a run saves and ends with 0.
HITS += [("rank 0", "SIGTERM"), ("rank 1", "SIGUSR2"), ("all", "SIGTERM")]
Aim = tuple[str, str, str]  # phase, target, signal
PATIENCE = 120  # s from a signal to the end of all processes (horovodrun needs up to 60)
END = 900  # s until a run must reach its end, or the phase that is waited for


class Lost(Exception):
    """A run or a checkpoint did not survive."""


@dataclass
class Fault:
    """A fault that was tried, and whether its run ended with the bytes of an undisturbed one."""

    phase: str
    target: str = ""
    signal: str = ""
    survived: bool = False


def aims(program: str, generator: random.Random) -> Iterator[Aim]:
    """Yield aims without end: all phases of a program in random order, then all again."""
    hits = cycle(generator.sample(HITS, len(HITS)))
    while True:
        for phase in generator.sample(AIMED[program], len(AIMED[program])):
            yield phase, *next(hits)


class KilledRun:
    """A run of `program` with two workers in `folder`. `reference` has the undisturbed run."""

    def __init__(self, program: str, arguments: list, folder: Path, reference: Path):
        self.program, self.arguments = program, arguments
        self.folder, self.reference = folder, reference
        self.job = None

    def start(self, resume: str = AUTO) -> None:
        self.job = Job(2, self.folder, [*self.arguments, "--resume", resume], self.program)

    def kills(self, aims: Iterable[Aim], generator: random.Random) -> Iterator[Fault]:
        """Start the run and send a signal, once per aim, and yield the hits. Then start it again.

        Aims at going back are last, when there are checkpoints. A complete run can only go back.
        Lost: a checkpoint is incomplete, a process survives, or a run that must stop fails.
        """
        for phase, target, name in sorted(aims, key=lambda aim: aim[0] == GOING_BACK):
            earlier = Checkpoints(str(self.folder), 1).paths()[:-1]
            back = bool(earlier) and phase == GOING_BACK
            if (self.folder / "complete").exists() and not back:
                continue
            phase = "steps" if phase == GOING_BACK and not back else phase
            phases = Phases(self.folder, self.program == "job.linear")
            self.start(generator.choice(earlier) if back else AUTO)
            self.wait_for(phase, phases)
            time.sleep(generator.uniform(0, LENGTH[phase]))
            if victims := self.victims(target, name):
                hit = phases.now()
                self.send(victims, name)
                yield Fault(hit, target, name)
            if self.job.process.returncode and not (
                victims and (name == "SIGKILL" or hit in ("start-up", "end"))
            ):
                output = self.job.process.stdout.read()
                raise Lost(f"a run that must end with 0, or stop in {phase}, fails:\n{output}")
            check(self.folder)
        self.start()

    def wait_for(self, phase: str, phases: Phases) -> None:
        """Wait until the run reaches a phase or ends. Lost: it does neither."""
        deadline = time.monotonic() + END
        while phase != "start-up" and phases.now() != phase and self.job.process.poll() is None:
            time.sleep(0.002)
            if time.monotonic() > deadline:
                raise Lost(f"the run stays in {phases.now()} for {END} s")

    def victims(self, target: str, name: str) -> list[psutil.Process]:
        """Wait for all workers, and return the processes to signal. [] if the run has ended.

        SIGKILL to all includes the launcher.
        """
        while self.job.process.poll() is None:
            ranks = {}
            with contextlib.suppress(psutil.NoSuchProcess):
                for worker in self.job.workers():
                    ranks[f"rank {worker.environ().get('HOROVOD_RANK')}"] = worker
            if len(ranks) == 2:
                launcher = [psutil.Process(self.job.process.pid)] if name == "SIGKILL" else []
                return [*launcher, *ranks.values()] if target == "all" else [ranks[target]]
            time.sleep(0.02)
        return []

    def send(self, victims: list[psutil.Process], name: str) -> None:
        """Send a signal, and wait for the end of all of the run's processes. Lost: one survives."""
        below = psutil.Process(self.job.process.pid).children(recursive=True)
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.Signals[name])
        try:
            self.job.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Lost(f"the launcher survives {PATIENCE} s after {name}") from None
        _, alive = psutil.wait_procs(below, timeout=PATIENCE)
        if alive:
            raise Lost(f"left behind by workers that ended: {alive}")

    def finish(self) -> None:
        """Wait for the end. Lost: the run does not end, or its results are not the reference's."""
        try:
            output, _ = self.job.process.communicate(timeout=END)
        except subprocess.TimeoutExpired:
            raise Lost("the resumed run does not end") from None
        if self.job.process.returncode:
            raise Lost(f"the resumed run fails:\n{output}")
        check(self.folder)
        names = files(self.folder)
        if names != files(self.reference):
            raise Lost(f"the files differ from the undisturbed run's: {sorted(names)}")
        for name in {"last.pth.tar", "best.pth.tar"} & names:
            if differs := differences(self.reference, self.folder, name):
                raise Lost(f"{name} differs from the undisturbed run's: {differs[:5]}")
        if records(self.folder) != records(self.reference):
            raise Lost("the numbers of metrics.jsonl differ from the undisturbed run's")

    def close(self) -> None:
        """Kill the job if it still runs."""
        if self.job and self.job.process.poll() is None:
            self.job.kill()


def files(folder: Path) -> set[str]:
    """Return the names of a run's files that a disturbed run must have too.

    A stop adds checkpoints, and going back adds DECISION.
    """
    return {
        path.name
        for path in folder.iterdir()
        if not NAME.fullmatch(path.name) and path.name != DECISION
    }


def check(folder: Path) -> None:
    """Check a folder. Lost: a checkpoint is incomplete, or `complete` exists too early."""
    for path in folder.glob("*.pth.tar"):
        try:
            content = load(str(path))
        except RunError as error:
            raise Lost(str(error)) from None
        complete = path.name == "last.pth.tar" and (folder / "complete").exists()
        if complete and content["epoch"] < EPOCHS:
            raise Lost(f"`complete` exists with a checkpoint of epoch {content['epoch']}")


def run_undisturbed(program: str, arguments: list, folder: Path) -> Path:
    """Run a program to its end with two workers. Return its folder."""
    job = Job(2, folder, arguments, program)
    output, _ = job.process.communicate(timeout=END)
    if job.process.returncode:
        raise SystemExit(f"the undisturbed run of {program} fails:\n{output}")
    return folder
