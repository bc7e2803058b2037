"""Projector: the student's maps, through a trained 1x1 convolution, regress the teacher's.

A stage's loss is |BN(conv(s)) - t'|^2, a mean over images, channels and positions. The convolution
has S inputs and T outputs. t' are the teacher's maps, of which each channel is standardised: it has
mean 0 and variance 1 over all images and positions of a micro-batch, as the student's has in BN. So
every channel of the teacher counts alike, whatever its scale. A channel without spread is 0. The
1x1 convolution with BN is that of arXiv 1904.01866. Standardising the teacher too is from
2303.11098, which compares pooled features. Stages weigh alike.

Before training the loss is near 2, so --loss-factor needs values near 1. Statistics are those of a
worker's micro-batch, of the student and of the teacher. So a run resumed with as many workers computes
the same bytes. Another number of workers, or another --accumulate, computes another, equally valid
loss, as with any batch norm. Checkpoints have the projector, exported students do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from job.declare import option
from job.distill.maps import STAGES, TO_DISTIL, MapDistiller
from job.distill.options import DistillOptions
from job.distill.teacher import Teacher
from job.networks import DEPTH

EPS = 1e-5  # of batch norm


@dataclass(frozen=True)
class ProjectorOptions(DistillOptions):
    """Distillation of maps through a projector."""

    group = "projector"

    projector_stages: list[int] = option(STAGES, TO_DISTIL, at_least=1, at_most=DEPTH, many=True)


class Regression(nn.Module):
    """The mean squared distance of standardised targets (N, T) from projected features (N, S).

    It needs only the covariances of features and targets. So it neither computes nor keeps N x T
    projected values. BN has no shift: targets have mean 0, so it would stay 0.
    """

    def __init__(self, S: int, T: int):
        super().__init__()
        self.weight = nn.Linear(S, T, bias=False).weight  # (T, S), of the convolution
        self.scale = nn.Parameter(torch.ones(T))  # of BN

    def forward(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the distance, ()."""
        N, W = len(features), self.weight
        centred = features - features.mean(0)  # (N, S)
        variance = (W @ (centred.T @ centred / N) * W).sum(1)  # (T,), of projected features
        covariance = (W.T * (centred.T @ targets / N)).sum(0)  # (T,), with the targets
        gain = self.scale * (variance + EPS).rsqrt()  # (T,)
        squares = gain.square() * variance - 2 * gain * covariance + targets.square().mean(0)
        return squares.mean()


class Projector(MapDistiller):
    """The squared distance of projected maps."""

    name = "projector"
    shapes = ("projector_stages",)
    config: ProjectorOptions

    def __init__(self, config: ProjectorOptions, widths: Mapping[Any, int], teacher: Teacher):
        super().__init__(config, widths, teacher)
        for stage in config.projector_stages:
            regression = Regression(widths[stage], teacher.widths[stage])
            self.module.add_module(f"stage{stage}", regression)

    @staticmethod
    def stages(config: ProjectorOptions) -> list[int]:
        """Return the stages that are distilled."""
        return config.projector_stages

    def target(self, stage: int, teacher: torch.Tensor) -> torch.Tensor:
        """Return the teacher's maps, standardised, (N, T)."""
        return rows(F.batch_norm(teacher.float(), None, None, training=True, eps=EPS))

    def distance(self, stage: int, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean squared distance of the projected maps, ()."""
        with torch.autocast(student.device.type, enabled=False):
            return self.module.get_submodule(f"stage{stage}")(rows(student), target)


def rows(maps: torch.Tensor) -> torch.Tensor:
    """Return maps (b, C, H, W) as one row a position of all images, (b x H x W, C) float32."""
    return maps.float().permute(0, 2, 3, 1).flatten(0, 2)
