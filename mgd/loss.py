"""The distance that pulls a student's maps towards the reduced teacher's."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


class PartialL2(torch.autograd.Function):
    """Of student and target maps (B, S, H, W) float32 the sum of squares of what counts of their difference.

    By itself autograd would keep three maps for the backward pass, and go over them four times; the difference that counts is
    half the gradient already.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the sum, a scalar; `target` is limited to the margin already."""
        difference = student - target
        counts = torch.maximum(difference, target).gt_(0)  # 1.0 where one of them is positive, else 0.0
        ctx.save_for_backward(difference.mul_(counts))
        return difference.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient by student, (B, S, H, W); the target has none."""
        (difference,) = ctx.saved_tensors
        return difference * (2 * gradient), None


def partial_l2(student: torch.Tensor, target: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """Return the partial squared distance, summed: (B, S, H, W), (B, S, H, W), (S,) -> scalar, differentiable by student.

    With t' = max(target, margin), positions count where student > t' or t' > 0: a student below a
    negative target is already as silent as it should be (arXiv 1904.01866, eq. 4).
    """
    return PartialL2.apply(student.float(), torch.maximum(target.float(), margin.float().view(1, -1, 1, 1)))
