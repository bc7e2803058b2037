"""What it takes to tell of a step: journal, log, hints and scalars, and once an epoch pictures and histograms."""

from types import SimpleNamespace

import torch

import setting
from job.metrics import tensorboard
from job.metrics.hints import Expectation
from job.metrics.meter import ContrastJournal
from job.engine.position import Count
from job.metrics.events import Events
from job.metrics.log import Log
from job.engine.state import Training


class Telling:
    """A journal whose every step is a whole epoch, with all that its end says, and is shown on the screen and to TensorBoard.

    A real run shows one step of --print-freq, and an epoch's end once an epoch: it takes less.
    """

    def __init__(self, training: Training, folder: str):
        config, self.training = training.config, training
        self.run = SimpleNamespace(size=training.run.size, log=Log(speaks=True), count=Count(1))
        self.run.log.open(folder, (0, 0))
        self.run.log.events = Events(folder, (0, 0), self.run.count, 1, self.run.log.line)
        expectation = Expectation(config, len(training.images), training.run.size)
        self.journal = ContrastJournal(self.run, config.batch_size, 1, expectation)
        sums = dict.fromkeys(("loss", "contrastive", "distillation", "gradient", "correct", "stop", "undecodable"), 1.0)
        self.sums = {name: value + len(name) / 7 for name, value in sums.items()}
        self.view = torch.randint(256, (tensorboard.PAIRS, 3, config.image_size, config.image_size), dtype=torch.uint8)
        self.epoch = 0

    def __call__(self) -> dict[str, float]:
        """Return the seconds of each, of a further step."""
        self.journal.start_epoch(self.epoch, 0.03)
        with self.journal.waiting():
            pass
        self.epoch += 1
        return {"telling": setting.seconds(self.tell), "drawing": setting.seconds(self.draw)}

    def tell(self) -> None:
        self.journal.step(0, self.sums)
        self.journal.end_epoch()

    def draw(self) -> None:
        tensorboard.distiller(self.run, self.epoch, self.training.distiller)
        tensorboard.pairs(self.run, 0, self.view, self.view)
