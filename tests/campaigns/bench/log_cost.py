"""Measure the logging of a step (journal, log, hints, scalars) and an epoch's pictures."""

import dataclasses
from types import SimpleNamespace

import torch

import setting
from job.metrics import tensorboard
from job.hints import Expectation
from job.journal import TrainingJournal
from job.position import START, Count
from job.metrics.events import Events
from job.metrics.log import Log
from job.training import Training


def journal(training: Training, kind=TrainingJournal) -> TrainingJournal:
    """Return the journal of a training."""
    framework, names = training.framework, training.distillation.names
    expectation = Expectation(training.config, framework, len(training.images))
    return kind(training.run, training.config, framework, names, expectation)


class LogCost:
    """A journal in which each step is a complete epoch, printed and written to TensorBoard.

    A real run needs less: it prints one of --print-freq steps, and an epoch's end once per epoch.
    """

    def __init__(self, training: Training, folder: str):
        config, self.training = training.config, training
        self.run = SimpleNamespace(size=training.run.size, log=Log(speaks=True), count=Count(1))
        self.run.log.open(folder, START)
        self.run.log.events = Events(
            folder, START, self.run.count, 1, training.framework.losses, self.run.log.line
        )
        self.journal = journal(
            dataclasses.replace(
                training, run=self.run, config=dataclasses.replace(config, print_freq=1)
            )
        )
        sums = dict.fromkeys(
            ("loss", "contrastive", "mgd", "gradient", "accuracy", "stop", "undecodable"), 1.0
        )
        self.sums = {name: value + len(name) / 7 for name, value in sums.items()}
        self.view = torch.randint(
            256, (tensorboard.IMAGES, 3, config.image_size, config.image_size), dtype=torch.uint8
        )
        self.epoch = 0

    def __call__(self) -> dict[str, float]:
        """Log another step. Return the seconds of logging and of drawing."""
        self.journal.start_epoch(self.epoch, 0.03)
        with self.journal.waiting():
            pass
        self.epoch += 1
        return {"logging": setting.seconds(self.log), "drawing": setting.seconds(self.draw)}

    def log(self) -> None:
        self.journal.step(0, self.sums)
        self.journal.end_epoch()

    def draw(self) -> None:
        tensorboard.histograms(self.run.log, self.epoch, self.training.distillation.histograms())
        tensorboard.views(self.run.log, "query beside key", 0, [self.view, self.view])
