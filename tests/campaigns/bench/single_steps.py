"""A training measured one step at a time, so that several trainings can run in turns."""

import itertools
import time

import log_cost
import setting
from job.build import build
from job.engine.run import Run
from job.journal import TrainingJournal
from job.position import START
from job.train import train_epoch


class Journal(TrainingJournal):
    """The program's journal, and the processor's seconds of a step.

    They exclude the signs of collapse, which a real run measures in one of --check-every steps.
    """

    def start_epoch(self, epoch: int, rate: float) -> None:
        super().start_epoch(epoch, rate)
        self.started = time.process_time()

    def step(self, step: int, sums: dict[str, float]) -> None:
        super().step(step, sums)
        self.cpu_seconds = time.process_time() - self.started


class Steps:
    """A training whose steps are measured one at a time."""

    def __init__(self, options, run: Run, batch: int, **more):
        """Build it with a total batch of `batch` images. more: options beyond the bench's own."""
        config = setting.config(options.photos, batch, options.size, **more)
        self.training = build(config, run)
        self.batches, self.done = self.training.batches(START), itertools.count()
        run.begin(vars(config), None, len(self.training.images), "")
        self.journal = log_cost.journal(self.training, Journal)

    def seconds(self) -> float:
        """Do a step. Return its seconds by the program's own clock."""
        training = self.training
        epoch, step = divmod(next(self.done), training.steps)
        self.journal.start_epoch(epoch, training.config.lr)
        train_epoch(training, self.batches, self.journal, epoch, range(step, step + 1))
        return training.config.batch_size / self.journal.records[-1]["images_per_s"]

    def cpu_seconds(self) -> float:
        """Do a step. Return the processor's seconds."""
        self.seconds()
        return self.journal.cpu_seconds
