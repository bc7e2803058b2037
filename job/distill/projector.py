"""Projector: the student's maps, through a trained 1x1 convolution, regress the teacher's.

A stage's loss is |BN(conv(s)) - t'|^2, a mean over images, channels and positions. The convolution
has S inputs and T outputs. t' are the standardised maps of the teacher: each channel has mean 0 and
variance 1 over all images and positions of a micro-batch, like the student's after BN. So all
channels of the teacher have the same weight, whatever their scale. A constant channel becomes 0.
The 1x1 convolution with BN is from arXiv 1904.01866. Standardising the teacher too is from
2303.11098, which compares pooled features. All stages have the same weight.

Before training the loss is near 2, so --loss-factor needs values near 1. The statistics of student
and teacher are those of a worker's micro-batch. So a run resumed with the same number of workers
computes the same bytes. With another number of workers, or another --accumulate, the loss differs
and is equally valid, as with any batch norm. Checkpoints have the projector, exported students do
not.
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
    """The mean squared distance of standardised targets (R, T) from projected features (R, S).

    It needs only the covariances of features and targets. So it neither computes nor keeps R x T
    projected values. BN has no shift, which would stay 0 because targets have mean 0.
    """

    def __init__(self, S: int, T: int):
        super().__init__()
        self.weight = nn.Linear(S, T, bias=False).weight  # (T, S), of the convolution
        self.scale = nn.Parameter(torch.ones(T))  # of BN

    def forward(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the distance, ()."""
        R, weight = len(features), self.weight
        centred = features - features.mean(0)  # (R, S)
        # Of the projected features, and of these with the targets.
        variance = (weight @ (centred.T @ centred / R) * weight).sum(1)  # (T,)
        covariance = (weight.T * (centred.T @ targets / R)).sum(0)  # (T,)
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
        """Return the standardised maps of the teacher, (R, T)."""
        return rows(F.batch_norm(teacher.float(), None, None, training=True, eps=EPS))

    def distance(self, stage: int, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean squared distance of the projected maps, ()."""
        with torch.autocast(student.device.type, enabled=False):
            return self.module.get_submodule(f"stage{stage}")(rows(student), target)


def rows(maps: torch.Tensor) -> torch.Tensor:
    """Return the positions of maps (b, C, H, W) as rows, (R, C) float32."""
    return maps.float().permute(0, 2, 3, 1).flatten(0, 2)
