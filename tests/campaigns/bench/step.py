"""Measure steps of training in turns: the project's, and the bare passes, or the baseline's.

bench.py starts it: horovodrun -np N python step.py FOLDER {ours,plain} PHOTOS. A turn is several
steps. Its figures are their medians. "ours" is the program itself: `job.build.build` builds the
training, and each call of `job.train.train_epoch` does one step.
"""

import dataclasses
import functools
import resource
import statistics
import time
from pathlib import Path

import torch

import baseline
import setting
from breakdown import Breakdown
from job.cluster import comm, task
from job.journal import TrainingJournal
from job.engine.run import Run
from job.position import START
from job.train import train_epoch
from job.build import build
from log_cost import LogCost, journal
from passes import Passes
from turns import take_turns


WARM = 4  # steps, after which a worker's memory hardly grows


class Ours:
    """The project's step, and the bare passes of its networks."""

    def __init__(self, options, run: Run):
        self.run, self.options = run, options
        config = setting.config(
            options.photos, options.batch, options.size, out=str(options.folder / "run")
        )
        loaders = task.cores() if options.loaders < 0 else options.loaders
        given = {name: getattr(options, name) for name in ("precision", "augment_on", "compile")}
        self.config = dataclasses.replace(config, workers=loaders, **given)
        self.training = build(self.config, run)
        run.begin(dataclasses.asdict(self.config), None, len(self.training.images), "")
        self.batches = self.training.batches(START)
        self.journal = journal(self.training, Journal)
        self.journal.breakdown = Breakdown(self.training)
        self.done = 0  # steps
        # Both are built after the first turn, which measures the steps' peak of memory.
        self.passes = functools.cache(lambda: Passes(self.training))
        self.log_cost = functools.cache(lambda: LogCost(self.training, str(options.folder)))

    def turn(self) -> dict:
        """Do several steps. After the first turn, also measure bare passes and rank 0's logging."""
        first = self.done == 0
        steps = [self.step() for _ in range(WARM if first else self.options.steps)]
        figures = medians(steps) | memory(self.run.device)
        if self.options.passes and not first:
            figures |= medians([self.passes()() for _ in steps])
            if self.run.rank == 0:
                figures |= medians([self.log_cost()() for _ in steps])
        return figures

    def step(self) -> dict:
        """Do a step. Return its seconds by kind."""
        epoch, step = divmod(self.done, self.training.steps)
        self.done += 1
        self.journal.start_epoch(epoch, self.config.lr)
        train_epoch(self.training, self.batches, self.journal, epoch, range(step, step + 1))
        return self.journal.seconds


class Journal(TrainingJournal):
    """The program's journal. The bench uses its clock."""

    def start_epoch(self, epoch: int, rate: float) -> None:
        self.breakdown.clear()
        super().start_epoch(epoch, rate)

    def step(self, step: int, sums: dict[str, float]) -> None:
        spent = self.breakdown.seconds()
        super().step(step, sums)
        step_seconds = self.total / self.records[-1]["images_per_s"]
        self.seconds = {
            "step": step_seconds,
            "data_wait": step_seconds * self.records[-1]["data_wait"],
            **spent,
        }


class Plain:
    """The baseline's step, on the CPU."""

    def __init__(self, options):
        comm.start()
        self.steps, self.first = options.steps, True
        self.baseline = baseline.Baseline(torch.load(options.photos / "teacher.pth"))
        self.batches = baseline.batches(setting.photos(options.photos), options.batch, options.size)

    def turn(self) -> dict:
        times = []
        for _ in range(WARM if self.first else self.steps):
            start = time.perf_counter()
            self.baseline.step(*next(self.batches))
            times.append(time.perf_counter() - start)
        self.first = False
        return {"step": statistics.median(times)} | memory(torch.device("cpu"))


def medians(steps: list[dict]) -> dict:
    """Return the median of each figure."""
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]}


def memory(device: torch.device) -> dict[str, int]:
    """Return this worker's peak of memory in bytes, without loader processes (none on the CPU)."""
    if device.type == "cuda":
        return {"memory": torch.cuda.max_memory_allocated()}
    return {"memory": peak(), "imports": IMPORTS}


def peak() -> int:
    """Return this process's peak of memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


IMPORTS = peak()  # torch, its CUDA libraries and Horovod: the same for any job


def main() -> None:
    parser = setting.parser(__doc__)
    parser.add_argument("kind", choices=("ours", "plain"))
    parser.add_argument("photos", type=Path)
    parser.add_argument(
        "--batch", type=int, default=setting.BATCH, help="images of a step, over all workers"
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of a turn; the first starts with cold caches"
    )
    parser.add_argument("--passes", action="store_true", help="also measure the bare passes")
    parser.add_argument("--core", type=int, default=0, help="core of the first worker")
    parser.add_argument("--precision", default="float32")
    parser.add_argument(
        "--loaders",
        type=int,
        default=0,
        help="loader processes (-1: as many as a worker has cores)",
    )
    parser.add_argument("--augment-on", default="cpu")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        setting.pin(options.core)
    if options.kind == "plain":
        return take_turns(options.folder, Plain(options).turn)
    with Run(str(options.folder / "run"), 1) as run:
        take_turns(options.folder, Ours(options, run).turn)


if __name__ == "__main__":
    main()
