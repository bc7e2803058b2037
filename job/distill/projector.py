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
from torch import nn
from torch.autograd.function import once_differentiable

from job.declare import option
from job.distill.maps import STAGES, TO_DISTIL, MapDistiller
from job.distill.options import DistillOptions
from job.distill.teacher import Teacher
from job.networks import DEPTH
from mgd.blocks import blocks

EPS = 1e-5  # of batch norm


@dataclass(frozen=True)
class ProjectorOptions(DistillOptions):
    """Distillation of maps through a projector."""

    group = "projector"

    projector_stages: list[int] = option(STAGES, TO_DISTIL, at_least=1, at_most=DEPTH, many=True)


class Regression(nn.Module):
    """The mean squared distance of standardised targets (R, T) from projected features (R, S)."""

    def __init__(self, S: int, T: int):
        super().__init__()
        self.weight = nn.Linear(S, T, bias=False).weight  # (T, S), of the convolution
        self.scale = nn.Parameter(torch.ones(T))  # of BN, which needs no shift

    def forward(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the distance, (). The targets are those before they are standardised."""
        return Distance.apply(features, targets, self.weight, self.scale)


class Distance(torch.autograd.Function):
    """The function of `Regression`, with a hand-written backward pass.

    It needs only the covariances of features and targets. So it neither computes nor keeps R x T
    projected or standardised values. BN has no shift, which would stay 0 because standardised
    targets have mean 0. With the covariances C of the features and X of targets and features, and
    the variance u of a target t,

        variance v = w C w    covariance r = X w / sqrt(u + EPS)    gain a = scale / sqrt(v + EPS)
        distance of t = a^2 v - 2 a r + u / (u + EPS).

    Both passes read features and targets in blocks that fit the cache, and centre them there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
    ) -> torch.Tensor:
        """Return the distance, (), of (R, S) and (R, T), with weight (T, S) and scale (T,)."""
        R, (T, S) = len(features), weight.shape
        means = features.mean(0), targets.mean(0, dtype=features.dtype)  # (S,) and (T,)
        C, X, u = (features.new_zeros(shape) for shape in ((S, S), (T, S), (T,)))
        for t, s in blocks(targets, features):
            s, t = s - means[0], t - means[1]
            C.addmm_(s.T, s, alpha=1 / R)
            X.addmm_(t.T, s, alpha=1 / R)
            u.add_(t.square_().sum(0), alpha=1 / R)
        norm = (u + EPS).rsqrt()  # (T,), of the targets
        projected = weight @ C  # (T, S)
        v, r = (projected * weight).sum(1), (X * weight).sum(1) * norm  # (T,) each
        inverse = (v + EPS).rsqrt()
        gain = scale * inverse
        d_gain = 2 * (gain * v - r) / T
        d_scale = d_gain * inverse
        d_v = gain.square() / T - d_gain * gain * inverse.square() / 2
        d_r = -2 * gain * norm / T  # of r without `norm`
        ctx.save_for_backward(features, targets, *means, weight, projected, X, d_v, d_r, d_scale)
        return (gain.square() * v - 2 * gain * r + u * norm.square()).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients by features (R, S), weight (T, S) and scale (T,)."""
        features, targets, *means, weight, projected, X, d_v, d_r, d_scale = ctx.saved_tensors
        d_v, d_r = (each[:, None] * upstream for each in (d_v, d_r))  # (T, 1) each
        of_features = (weight.T @ (d_v * weight)).mul_(2 / len(features))  # (S, S)
        of_targets = weight * (d_r / len(features))  # (T, S)
        d_features = torch.empty_like(features)
        for t, s, d in blocks(targets, features, d_features):
            torch.mm(s - means[0], of_features, out=d).addmm_(t - means[1], of_targets)
        d_weight = projected.mul(2 * d_v).addcmul_(X, d_r)
        return d_features, None, d_weight, d_scale * upstream


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
        """Return the maps of the teacher, (R, T), which can be bfloat16."""
        return rows(teacher)

    def distance(self, stage: int, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean squared distance of the projected maps, ()."""
        with torch.autocast(student.device.type, enabled=False):
            return self.module.get_submodule(f"stage{stage}")(rows(student.float()), target)


def rows(maps: torch.Tensor) -> torch.Tensor:
    """Return the positions of maps (b, C, H, W) as rows, (R, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)
