"""Gradients that do not depend on the number of workers: sums in fixed point.

A sum of floating-point numbers depends on its order, and a matrix product on its shape. So each
group of GROUP images has its own gradients, rounded to multiples of 1 / FIXED_POINT. Their sum over
groups and workers is exact in any order. job/engine/gradients.py overlaps its sums with the
backward pass. A classifier's backward pass is too short for that.
"""

from collections.abc import Iterable

import torch
from torch import nn

from job.cluster import comm

GROUP = 32  # images that pass through the network at a time, for any number of workers
FIXED_POINT = 2.0**40
LARGEST = 2.0**62  # bound of a sum in fixed point; int64 ends at 2**63


class FixedPointGradients:
    """Gradients, summed over groups of images and over workers.

    named: pairs (name, parameter), n of them.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]):
        self.names, self.parameters = map(list, zip(*named, strict=True))
        self.sizes = [value.numel() for value in self.parameters]

    def clear(self) -> None:
        """Start a step, without gradients."""
        count, device = len(self.sizes), self.parameters[0].device
        # The last `count` values count the workers on which a parameter exceeds LARGEST.
        self.sums = torch.zeros(sum(self.sizes) + count, dtype=torch.int64, device=device)
        self.largest = torch.zeros(count, device=device)  # (n,), sums of the groups' maxima

    def add(self, loss: torch.Tensor) -> None:
        """Add the gradients of a group's loss, ()."""
        gradients = torch.autograd.grad(loss, self.parameters)
        scaled = torch.cat([value.flatten() for value in gradients]).mul_(FIXED_POINT).round_()
        self.largest += torch.stack([value.abs().max() for value in scaled.split(self.sizes)])
        self.sums[: len(scaled)] += scaled.long()

    def wait(self) -> None:
        """Sum over the workers, and set each parameter's `grad`.

        It is NaN if the gradient of a group is not finite or too large.
        """
        self.sums[-len(self.sizes) :] = ~(self.largest < LARGEST / comm.size())
        comm.wait(comm.begin_sum_(self.sums, "gradients"))
        *sums, invalid = self.sums.split([*self.sizes, len(self.sizes)])
        scaled = [
            value.float().masked_fill(bad > 0, torch.nan)
            for value, bad in zip(sums, invalid, strict=True)
        ]
        gradients = torch._foreach_div(scaled, FIXED_POINT)
        self.norms = torch.stack(torch._foreach_norm(gradients))  # (n,)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)

    def norm(self) -> torch.Tensor:
        """Return the norm of all summed gradients together, ()."""
        return self.norms.norm()

    def not_finite(self) -> list[str]:
        """Return the parameters with gradients that are not finite, last layer first."""
        finite = reversed(self.norms.isfinite().tolist())
        return [name for name, ok in zip(reversed(self.names), finite, strict=True) if not ok]
