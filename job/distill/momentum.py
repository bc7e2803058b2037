"""The momentum encoder: a copy of the student's backbone that follows the student by momentum.

A run has one for all distillers that need it. Like MoCo's key encoder, it runs in train mode
without gradient. Its batch norms use the statistics of a worker's micro-batch.
"""

import torch

from job.distill.pooled import pooled
from job.frameworks.base import Framework
from job.networks import DEPTH, with_features

MOMENTUM = "momentum_encoder"  # the name of its features, and its name in checkpoints


class MomentumEncoder:
    """A copy of a framework's student without its head.

    m: its momentum. module: the copy, which is saved and restored: images (b, 3, H, W) ->
    {"layer4": (b, S, H, W)}.
    """

    def __init__(self, framework: Framework, m: float):
        self.framework, self.m = framework, m
        self.module = with_features(framework.student(), [DEPTH], output=None).requires_grad_(False)

    @torch.no_grad()
    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Return the pooled features (b, S) float32 of normalised images (b, 3, H, W)."""
        return pooled(self.module(images))

    @torch.no_grad()
    def update(self) -> None:
        """Set each parameter to m * own + (1 - m) * the student's (arXiv 1911.05722, eq. 2)."""
        own = dict(self.module.named_parameters())
        student = dict(self.framework.encoder.named_parameters())
        torch._foreach_lerp_([*own.values()], [student[name] for name in own], 1.0 - self.m)
