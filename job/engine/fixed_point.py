"""Gradients that do not depend on the number of workers: sums in fixed point over groups of equally many images.

A sum of floating-point numbers depends on its order, and a matrix product on its shape. Here each group of GROUP images has its
own gradients, rounded to whole multiples of 1 / FIXED_POINT. Their sum over groups and workers is exact in any order.
job/engine/gradients.py overlaps its sums with the backward pass. A classifier's backward pass is too short for that.
"""

from collections.abc import Iterable

import torch
from torch import nn

from job.cluster import comm

GROUP = 32  # images that pass at a time, for any number of workers
FIXED_POINT = 2.0**40
LARGEST = 2.0**62  # bound of a sum in fixed point; int64 ends at 2**63


class FixedPointGradients:
    """The gradients of `named` parameters, each a pair (name, parameter), summed over groups of images and over workers."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]):
        self.names, self.parameters = map(list, zip(*named, strict=True))
        self.sizes = [value.numel() for value in self.parameters]

    def clear(self) -> None:
        """Begin a step, without gradients."""
        count, device = len(self.sizes), self.parameters[0].device
        # The last `count` are the parameters beyond LARGEST.
        self.sums = torch.zeros(sum(self.sizes) + count, dtype=torch.int64, device=device)
        self.largest = torch.zeros(count, device=device)  # sums of the groups' largest values

    def add(self, loss: torch.Tensor) -> None:
        """Add the gradients of a group's part of the loss, ()."""
        gradients = torch.autograd.grad(loss, self.parameters)
        scaled = torch.cat([value.flatten() for value in gradients]).mul_(FIXED_POINT).round_()
        self.largest += torch.stack([part.abs().max() for part in scaled.split(self.sizes)])
        self.sums[: len(scaled)] += scaled.long()

    def wait(self) -> None:
        """Sum over the workers, and set each parameter's `grad`: NaN if a group's is not finite, or too large."""
        self.sums[-len(self.sizes) :] = ~(self.largest < LARGEST / comm.size())
        comm.wait(comm.begin_sum_(self.sums, "gradients"))
        *sums, beyond = self.sums.split([*self.sizes, len(self.sizes)])
        scaled = [
            whole.float().masked_fill(bad > 0, torch.nan)
            for whole, bad in zip(sums, beyond, strict=True)
        ]
        gradients = torch._foreach_div(scaled, FIXED_POINT)
        self.norms = torch.stack(torch._foreach_norm(gradients))  # (n,)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)

    def norm(self) -> torch.Tensor:
        """Return the norm of all summed gradients together, ()."""
        return self.norms.norm()

    def beyond(self) -> list[str]:
        """Return the names of the parameters whose gradients are not finite, in the order of the backward pass."""
        finite = self.norms.isfinite().tolist()
        return [
            name for name, sound in reversed([*zip(self.names, finite, strict=True)]) if not sound
        ]
