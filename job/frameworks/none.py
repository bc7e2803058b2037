"""No framework: distillers alone train the student, on one view of each image."""

import torch.nn.functional as F
from torch import nn

from job.frameworks.base import Framework, MicroBatch, Output
from job.networks import DEPTH, with_features
from job.options import Options


class Student(nn.Module):
    """A student under the names that checkpoints have."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder_q = encoder


class NoFramework(Framework):
    """A student without a loss of its own."""

    name = "none"

    def __init__(self, config: Options, stages: list[int]):
        super().__init__(config, stages)
        self.encoder = with_features(self.network(), sorted({*stages, DEPTH}), output=None)
        self.module = Student(self.encoder)

    def forward(self, batch: MicroBatch, prepared: None) -> Output:
        """Run the student on a micro-batch."""
        features = self.encoder(batch.images)
        pooled = features[f"layer{DEPTH}"].detach().float().relu().mean((2, 3))  # (b, C)
        return Output({}, features, F.normalize(pooled, dim=1), {})
