"""A toy framework and a toy distiller in as few lines as possible.

`python -m toys` is job.train with both. The framework predicts the mean colour of a view. The
distiller compares pooled features, in units of the teacher's mean, through a trained projector.
"""

import torch
import torch.nn.functional as F
from torch import nn

from job import train
from job.cluster import comm
from job.distill import DISTILLERS, Distiller
from job.distill.base import Change
from job.engine.passes import BATCH, centre_crops
from job.frameworks import FRAMEWORKS, Framework
from job.frameworks.base import Output
from job.networks import DEPTH, POOLED, stage_widths, with_features


class ToyFramework(Framework):
    name = "toy"
    losses = ("colour",)
    metrics = ("close",)
    reference, reference_text = 1.0, "the colours' variance"

    def __init__(self, config, stages):
        super().__init__(config, stages)
        self.encoder = with_features(self.network(), stages, output=POOLED)
        guess = nn.Linear(stage_widths(config.arch, config.width)[DEPTH], 3)
        self.module = nn.ModuleDict({"encoder_q": self.encoder, "guess": guess})

    def forward(self, batch, prepared):
        features = self.encoder(batch.images)
        pooled = features.pop(POOLED)  # (b, C)
        error = self.module["guess"](pooled) - batch.images.mean((2, 3))  # (b, 3)
        close = (error.abs().amax(1) < 0.5).sum()  # ()
        return Output(
            {"colour": error.square().mean()},
            features,
            F.normalize(pooled.detach(), dim=1),
            {"close": close},
        )


class ToyDistiller(Distiller):
    name = "toy"

    def __init__(self, config, widths, teacher):
        super().__init__(config, widths, teacher)
        T = teacher.norms[DEPTH].num_features
        self.module.add_module("projector", nn.Conv2d(widths[DEPTH], T, 1))
        self.module.register_buffer("unit", torch.ones(1))

    @torch.no_grad()
    def before_epoch(self, epoch, networks):
        run, images, net = networks.run, networks.images, networks.teacher.net
        total = torch.zeros(1, device=run.device)
        every = list(range(len(images)))
        for inputs, _ in centre_crops(images, every, BATCH, self.config, run, "unit"):
            total += net(inputs)[f"layer{DEPTH}"].abs().mean((1, 2, 3)).sum()
        unit = comm.total(total, "toy.unit") / len(images)  # (1,)
        record = {"epoch": epoch, "step": 0, "distiller": self.name, "stage": DEPTH, "changed": 1.0}
        return Change({"unit": unit}, lambda: run.log.record("refresh", **record))

    def targets(self, teacher, generator):
        return teacher[f"layer{DEPTH}"].mean((2, 3)) / self.module.unit  # (b, T)

    def loss(self, student, targets):
        projected = self.module.projector(student[f"layer{DEPTH}"]).mean((2, 3))  # (b, T)
        return (projected - targets).square().sum(1).mean() / self.factor


FRAMEWORKS["toy"] = ToyFramework
DISTILLERS["toy"] = ToyDistiller

if __name__ == "__main__":
    train.main()
