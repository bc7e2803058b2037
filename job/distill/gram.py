"""Gram: the student learns which positions of an image are similar for the teacher.

A stage's loss is the mean over images and positions i of KL(p_i | q_i). Here p_i is the softmax
over j of t_i t_j / tau, q_i that of s_i s_j / tau, and t_i and s_i are the L2-normalised features
of position i in teacher and student. Only the student is trained. Similarities of positions are
from arXiv 1903.04197 (pair-wise distillation). The softmax and its divergence are from 2101.04731.

Only positions of the same image are compared. So the cost grows with the square of an image's
positions, not of the batch's. The loss depends neither on the number of workers nor on
--accumulate. Maps of more than SIDE x SIDE positions are first averaged in windows. All stages have
the same weight. The loss is at most a few units for any image size, so --loss-factor needs values
near 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from job.declare import option
from job.distill.maps import STAGES, TO_DISTIL, MapDistiller
from job.distill.options import DistillOptions
from job.distill.teacher import Teacher
from job.errors import RunError
from job.networks import DEPTH, network_outline

SIDE = 14  # most positions of a map in height and in width
# A feature with a norm up to this counts as 0, because the gradient of its direction is too large.
SMALLEST = 1e-3
NUMBERS = 2**17  # values in a block of similarities: 0.5 MB, which fits the cache of a core


@dataclass(frozen=True)
class GramOptions(DistillOptions):
    """Distillation of similarities between positions."""

    group = "gram"

    gram_stages: list[int] = option(STAGES, TO_DISTIL, at_least=1, at_most=DEPTH, many=True)
    gram_tau: float = option(0.07, "softmax temperature of similarities", above=0.0)


class Gram(MapDistiller):
    """The divergence of similarities between positions."""

    name = "gram"
    batch_statistics = True
    config: GramOptions

    def __init__(self, config: GramOptions, widths: Mapping[Any, int], teacher: Teacher):
        """RunError: a stage's maps have only one position."""
        super().__init__(config, widths, teacher)
        check_positions(config)

    @staticmethod
    def stages(config: GramOptions) -> list[int]:
        """Return the stages that are distilled."""
        return config.gram_stages

    def target(self, stage: int, teacher: torch.Tensor) -> torch.Tensor:
        """Return the teacher's features, (b, T, P)."""
        return positions(teacher)

    def distance(self, stage: int, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean divergence, ()."""
        s = positions(student)  # (b, S, P)
        scale = self.config.gram_tau**-0.5
        with torch.autocast(s.device.type, enabled=False):
            return Divergence.apply(scale * s, scale * target) / (len(s) * s.shape[2])


def check_positions(config: GramOptions) -> None:
    """RunError: the maps of a stage of --gram-stages have only one position."""
    outline = network_outline(config.arch, config.stem, config.width, config.image_size)
    fitting = [stage for stage, (_, H, W) in outline.maps.items() if H * W > 1]
    if small := [stage for stage in config.gram_stages if stage not in fitting]:
        stages = f"stages among {shown(fitting)}, or " if fitting else ""
        raise RunError(
            f"--gram-stages {shown(config.gram_stages)}: the maps of layer{small[0]} have 1 x 1 "
            f"positions with --image-size {config.image_size}; expected at least 2. Choose {stages}"
            "a larger --image-size"
        )


def shown(stages: list[int]) -> str:
    """Return stages for messages."""
    return " ".join(map(str, stages))


def positions(maps: torch.Tensor) -> torch.Tensor:
    """Return the L2-normalised features of P positions, (b, C, H, W) -> (b, C, P) float32."""
    window = -(-max(maps.shape[2:]) // SIDE)
    pooled = F.avg_pool2d(maps.float(), window, ceil_mode=True) if window > 1 else maps.float()
    x = pooled.flatten(2)
    norms = x.norm(dim=1, keepdim=True)  # (b, 1, P)
    return x / norms.where(norms > SMALLEST, torch.inf)


class Divergence(torch.autograd.Function):
    """The sum over images and positions of KL(p_i | q_i).

    The forward pass computes the gradient too, a few images at a time. So the similarities (P, P)
    stay in the cache, and none are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return the sum, (), for logits s_i s_j and t_i t_j of features (b, S, P), (b, T, P)."""
        gradient, total = torch.empty_like(student), student.new_zeros(())
        images = max(1, NUMBERS // student.shape[2] ** 2)
        if student.device.type != "cpu":
            images = len(student)
        blocks = (each.split(images) for each in (student, teacher, gradient))
        for s, t, d in zip(*blocks, strict=True):
            log_q, log_p = ((x.mT @ x).log_softmax(2) for x in (s, t))  # (n, P, P) each
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            error = log_q.exp() - p
            d.copy_(s @ (error + error.mT))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient by student, (b, S, P), and None for teacher."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None
