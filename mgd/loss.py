"""The distance that pulls a student's maps towards the reduced teacher's."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mgd.blocks import blocks


class PartialL2(torch.autograd.Function):
    """Of student and target maps (B, S, H, W) float32, and margins (1, S, 1, 1), the partial squared distance.

    By itself autograd would keep three maps for the backward pass, and go over them four times; the difference that counts is
    half the gradient already.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, target: torch.Tensor, margin: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum, a scalar."""
        difference, total = torch.empty_like(student), student.new_zeros(())
        for d, s, t in blocks(difference, student, target):
            t = torch.maximum(t, margin)
            torch.sub(s, t, out=d)
            d.mul_(torch.maximum(d, t).gt_(0))  # 1.0 where one of them is positive, else 0.0
            total += d.square().sum()
        ctx.save_for_backward(difference)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient by student, (B, S, H, W); target and margin have none."""
        (difference,) = ctx.saved_tensors
        return difference * (2 * gradient), None, None


def partial_l2(student: torch.Tensor, target: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """Return the partial squared distance, summed: (B, S, H, W), (B, S, H, W), (S,) -> scalar, differentiable by student.

    With t' = max(target, margin), positions count where student > t' or t' > 0: a student below a
    negative target is already as silent as it should be (arXiv 1904.01866, eq. 4).
    """
    return PartialL2.apply(student.float(), target.float(), margin.float().view(1, -1, 1, 1))
