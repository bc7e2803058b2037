"""The distance between a student's maps and the reduced maps of a teacher."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mgd.blocks import blocks


class PartialL2(torch.autograd.Function):
    """Partial squared distance of student and target maps, with a hand-written backward pass.

    student and target (B, S, H, W) float32, margin (1, S, 1, 1) -> scalar. Autograd would keep
    three maps for the backward pass and read them four times. The masked difference suffices: it
    is half the gradient.
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
        """Return the gradient by student, (B, S, H, W), and None for target and margin."""
        (difference,) = ctx.saved_tensors
        return difference * (2 * gradient), None, None


def partial_l2(student: torch.Tensor, target: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """Return the partial squared distance, a scalar summed over all values.

    student (B, S, H, W), target (B, S, H, W), margin (S,). Only student has a gradient. With
    t' = max(target, margin), a value counts if student > t' or t' > 0. A student below a negative
    target is already inactive enough (arXiv 1904.01866, eq. 4).
    """
    return PartialL2.apply(student.float(), target.float(), margin.float().view(1, -1, 1, 1))
