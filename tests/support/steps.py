"""Trainings built by `job.build`, and steps of `job.train` on given views."""

import numpy as np
import torch
from PIL import Image

from job.build import build
from job.config import Config
from job.hints import Expectation
from job.journal import TrainingJournal
from job.networks import build_resnet
from job.position import Count
from job.train import train_epoch


def build_training(run, folder, **options):
    """Build the training of a ResNet-18, with as many images as a batch has. A collective.

    folder: where to write the images. options: of `job.train`. By default no checkpoint is saved.
    """
    options = {"arch": "resnet18", "mlp": True, "moco_t": 0.2, "workers": 0, **options}
    options = {"epochs": 10**6, "save_every": str(10**6), "refresh_epochs": "never", **options}
    config = Config(data=str(folder), **options)
    (folder / "train" / "one").mkdir(parents=True)
    for number in range(config.batch_size):
        pixels = np.full((8, 8, 3), number, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train" / "one" / f"{number}.png")
    return build(config, run)


def train(training, batches, before_average=lambda: None):
    """Train one step for each of `batches` and return the journal. A collective.

    batches: [2 x (B, 3, H, W)] of this worker.
    before_average: called after the last update, before running statistics are averaged.
    """
    config, framework, steps = training.config, training.framework, len(batches)

    class Journal(TrainingJournal):
        def step(self, step, sums):
            super().step(step, sums)
            if step == steps - 1:
                before_average()

    training.run.count = Count(steps)
    expectation = Expectation(config, framework, len(training.images))
    names = training.distillation.names
    journal = Journal(training.run, config, framework, names, expectation)
    journal.start_epoch(0, config.lr)
    given = [(views, torch.arange(len(views[0])), []) for views in batches]
    train_epoch(training, iter(given), journal, 0, range(steps))
    return journal


def save_teacher(path, width=64, arch="resnet50"):
    """Save a ResNet with random weights and batch norms as a teacher."""
    torch.manual_seed(5)
    net = build_resnet(arch, width=width)
    for norm in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_var, 1.0, 2.0)
        torch.nn.init.normal_(norm.bias, 0.0, 0.3)
    state = {f"module.encoder_q.{name}": value for name, value in net.state_dict().items()}
    torch.save({"arch": arch, "state_dict": state}, path)
