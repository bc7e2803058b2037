"""Runs that are killed or stopped several times in a row, each time resumed, and at last let to their end."""

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
TRAIN = "-a resnet18 --moco-k 20 --mlp --moco-t 0.2 --aug-plus --cos --warmup-epochs 1 --refresh-epochs every:1".split()
OPTIONS = {
    "job.train": [*COMMON, *TRAIN, "--knn-every", 1],
    "job.linear": [*COMMON, "--schedule", 2, "--lr", 0.3],
}
# Seconds from a phase's beginning to the latest signal that is aimed at it: about as long as it takes.
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
HITS += [
    ("rank 0", "SIGTERM"),
    ("rank 1", "SIGUSR2"),
    ("all", "SIGTERM"),
]  # after which a run saves and ends well
Aim = tuple[str, str, str]  # phase, whom, signal
PATIENCE = 120  # s until all of a run's processes have to be gone after a signal; horovodrun takes up to 60
END = 900  # s until a run has to have come to its end, or to the phase that is waited for


class Lost(Exception):
    """Something did not survive."""


@dataclass
class Fault:
    """One that was tried: what it hit, whom, by which signal, and whether that run ended as if undisturbed."""

    phase: str
    whom: str = ""
    signal: str = ""
    survived: bool = False


def aims(program: str, generator: random.Random) -> Iterator[Aim]:
    """Yield aims without end: each phase of a program in turn, in random order."""
    hits = cycle(generator.sample(HITS, len(HITS)))
    while True:
        for phase in generator.sample(AIMED[program], len(AIMED[program])):
            yield phase, *next(hits)


class KilledRun:
    """A run of `program` with two workers in `folder`, to be compared with an undisturbed one in `whole`."""

    def __init__(self, program: str, arguments: list, folder: Path, whole: Path):
        self.program, self.arguments, self.folder, self.whole = program, arguments, folder, whole
        self.job = None

    def start(self, resume: str = AUTO) -> None:
        self.job = Job(2, self.folder, [*self.arguments, "--resume", resume], self.program)

    def kills(self, aims: Iterable[Aim], generator: random.Random) -> Iterator[Fault]:
        """Start it and send a signal once for each aim, and yield what was hit; then start it once more.

        It goes back last, when there are checkpoints. A run that has reached its end can only go back.
        Lost: a checkpoint is incomplete, a process goes on, or a run that was to stop fails.
        """
        for phase, whom, name in sorted(aims, key=lambda aim: aim[0] == GOING_BACK):
            earlier = Checkpoints(str(self.folder), 1).paths()[:-1]
            back = bool(earlier) and phase == GOING_BACK
            if (self.folder / "complete").exists() and not back:
                continue
            phase = "steps" if phase == GOING_BACK and not back else phase
            phases = Phases(self.folder, self.program == "job.linear")
            self.start(generator.choice(earlier) if back else AUTO)
            self.wait_for(phase, phases)
            time.sleep(generator.uniform(0, LENGTH[phase]))
            if victims := self.victims(whom, name):
                hit = phases.now()
                self.send(victims, name)
                yield Fault(hit, whom, name)
            if self.job.process.returncode and not (
                victims and (name == "SIGKILL" or hit in ("start-up", "end"))
            ):
                raise Lost(
                    f"a run that should end well, or stop in {phase}, fails:\n{self.job.process.stdout.read()}"
                )
            check(self.folder)
        self.start()

    def wait_for(self, phase: str, phases: Phases) -> None:
        """Wait until the run begins a phase, or has ended before. Lost: neither comes."""
        deadline = time.monotonic() + END
        while phase != "start-up" and phases.now() != phase and self.job.process.poll() is None:
            time.sleep(0.002)
            if time.monotonic() > deadline:
                raise Lost(f"the run stands in {phases.now()} for {END} s")

    def victims(self, whom: str, name: str) -> list[psutil.Process]:
        """The processes to signal, as soon as all workers are there; none if the run has ended.

        Those of one rank or of all. A SIGKILL of all is for the launcher too.
        """
        while self.job.process.poll() is None:
            ranks = {}
            with contextlib.suppress(psutil.NoSuchProcess):
                for worker in self.job.workers():
                    ranks[f"rank {worker.environ().get('HOROVOD_RANK')}"] = worker
            if len(ranks) == 2:
                launcher = [psutil.Process(self.job.process.pid)] if name == "SIGKILL" else []
                return [*launcher, *ranks.values()] if whom == "all" else [ranks[whom]]
            time.sleep(0.02)
        return []

    def send(self, victims: list[psutil.Process], name: str) -> None:
        """Send them a signal, and see that what else belongs to the run ends with them. Lost: it does not."""
        below = psutil.Process(self.job.process.pid).children(recursive=True)
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.Signals[name])
        try:
            self.job.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Lost(f"the launcher goes on {PATIENCE} s after {name}") from None
        _, alive = psutil.wait_procs(below, timeout=PATIENCE)
        if alive:
            raise Lost(f"left behind by workers that ended: {alive}")

    def finish(self) -> None:
        """Let it come to its end. Lost: it does not, or ends otherwise than the undisturbed one."""
        try:
            output, _ = self.job.process.communicate(timeout=END)
        except subprocess.TimeoutExpired:
            raise Lost("the resumed run does not end") from None
        if self.job.process.returncode:
            raise Lost(f"the resumed run fails:\n{output}")
        check(self.folder)
        names = files(self.folder)
        if names != files(self.whole):
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


def files(folder: Path) -> set[str]:
    """The names of a run's files except checkpoints, of which a stop makes more, and the mark of going back."""
    return {
        path.name
        for path in folder.iterdir()
        if not NAME.fullmatch(path.name) and path.name != DECISION
    }


def check(folder: Path) -> None:
    """Lost: a checkpoint with a name of its own is not whole, or `complete` stands in a folder that is not."""
    for path in folder.glob("*.pth.tar"):
        try:
            content = load(str(path))
        except RunError as error:
            raise Lost(str(error)) from None
        if (
            path.name == "last.pth.tar"
            and (folder / "complete").exists()
            and content["epoch"] < EPOCHS
        ):
            raise Lost(f"`complete` stands beside a checkpoint of epoch {content['epoch']}")


def undisturbed(program: str, arguments: list, folder: Path) -> Path:
    """Run a program to its end with two workers; return its folder."""
    job = Job(2, folder, arguments, program)
    output, _ = job.process.communicate(timeout=END)
    if job.process.returncode:
        raise SystemExit(f"the undisturbed run of {program} fails:\n{output}")
    return folder
