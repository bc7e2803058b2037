"""LARS: SGD whose rate is adapted to each parameter, for large batches (arXiv 1708.03888)."""

from collections.abc import Iterable

import torch

TRUST = 0.001  # trust coefficient
EPSILON = 1e-8
FIXED_POINT = 2.0**36  # a norm is a sum of multiples of 1 / FIXED_POINT; int64 has room for 2**27
TINY = torch.finfo(torch.float32).tiny


class LARS(torch.optim.Optimizer):
    """SGD with momentum on gradients that are scaled to TRUST times the norm of their parameter.

    With weight w, gradient g, weight decay d, momentum m and rate r:

        v = m v + ratio (g + d w),  w = w - r v,  ratio = TRUST |w| / (|g| + d |w| + EPSILON)

    The ratio is not clipped to 1. It is 1 if |w| or |g| is 0, so a bias of 0 has a step of SGD.
    All other biases are adapted as weights are. Both follow SimSiam's released program, which uses
    NVIDIA Apex's LARC (apex/parallel/LARC.py, `clip=False`) around SGD, for every parameter.
    As there, the rate is outside of the momentum. In the paper's algorithm 1 it is inside.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    self.update(value, value.grad, group)

    def update(self, value: torch.Tensor, gradient: torch.Tensor, group: dict) -> None:
        """Update a parameter of a group, and its momentum."""
        state, decay = self.state[value], group["weight_decay"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(value)  # SGD's name
        size, slope = norm(value), norm(gradient)
        ratio = TRUST * size / (slope + decay * size + EPSILON)
        ratio = torch.where((size > 0) & (slope > 0), ratio, 1.0)
        scaled = gradient.add(value, alpha=decay).mul_(ratio)
        velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(scaled)
        value.add_(velocity, alpha=-group["lr"])


def norm(value: torch.Tensor) -> torch.Tensor:
    """Return the norm of a tensor, () float64.

    The sum is of integers, and exact in any order. So the ratio is the same on all workers, even if
    they have different numbers of threads.
    """
    largest = value.abs().max().double()
    squares = (value.double() / largest.clamp(min=TINY)).square()  # 0 to 1
    return largest * ((squares * FIXED_POINT).round().long().sum() / FIXED_POINT).sqrt()
