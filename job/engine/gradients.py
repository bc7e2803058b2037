"""Gradients, averaged over the workers while the backward pass goes on, in an order that timing cannot change.

Horovod's own optimizer fuses what happens to be ready, and a ring adds in an order set by where a value lies in the
fused buffer: from four workers on, the same run ends in other bytes each time. Here every gradient has a fixed place
in one of a few contiguous buckets, and Horovod sums a bucket where it lies, with nothing copied in or out.
A gradient has its parameter's strides, those of channels last on a GPU.
"""

import functools
from collections.abc import Iterable

import torch
from torch import nn

from job.cluster import comm

SHARE = 1 / 8  # of all values, for a bucket to be full: the last one, which nothing hides, is small


class Bucket:
    """A contiguous part of all gradients, from its first one in a step to the next step."""

    def __init__(self, named: list[tuple[str, nn.Parameter]]):
        self.name = named[0][0]  # of the parameter that comes first in the backward pass
        self.named = dict(named)
        self.parameters = list(self.named.values())
        self.clear()

    def clear(self) -> None:
        """Release the bucket so that the forward passes can use its memory."""
        self.came = 0  # gradients, of all backward passes of a step
        self.flat = self.travelling = torch.empty(0)
        self.views: dict[nn.Parameter, torch.Tensor] = {}  # of flat
        self.sum: comm.Pending | None = None
        for value in self.parameters:
            value.grad = None

    def take(self, value: nn.Parameter, scale: float) -> None:
        """Add `scale` times a parameter's gradient, and release the gradient's memory."""
        assert value.grad is not None
        if not self.views:
            sizes = [value.numel() for value in self.parameters]
            self.flat = value.grad.new_empty(sum(sizes))
            places = zip(self.parameters, self.flat.split(sizes), strict=True)
            self.views = {
                value: part.as_strided(value.shape, value.stride()) for value, part in places
            }
        if self.came < len(self.parameters):  # the first backward pass of a step
            torch.mul(value.grad, scale, out=self.views[value])
        else:
            self.views[value].add_(value.grad, alpha=scale)
        value.grad = None
        self.came += 1

    def send(self, half: bool) -> None:
        """Begin the sum over the workers. half: in half precision."""
        self.travelling = self.flat.half() if half else self.flat
        self.sum = comm.begin_sum_(self.travelling, f"gradients.{self.name}")

    def receive(self) -> None:
        """Wait for the sum, and set each parameter's `grad` to its part."""
        assert self.sum
        comm.wait(self.sum)
        if self.travelling is not self.flat:
            self.flat.copy_(self.travelling)
        for value, view in self.views.items():
            value.grad = view


class Gradients:
    """The gradients of `named` parameters, each a pair (name, parameter), averaged over the workers.

    passes: backward passes of a step, whose gradients are added up; half: sum over the workers in half precision.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], passes: int = 1, half: bool = False
    ):
        self.passes, self.half = passes, half
        # Reversed, because a backward pass computes the last gradients first.
        self.buckets = [Bucket(part) for part in parts(list(named)[::-1])]
        for bucket in self.buckets:
            for value in bucket.parameters:
                value.register_post_accumulate_grad_hook(functools.partial(self.came, bucket))

    def clear(self) -> None:
        """Begin a step: no parameter has a gradient."""
        for bucket in self.buckets:
            bucket.clear()

    def came(self, bucket: Bucket, value: nn.Parameter) -> None:
        """Add a parameter's gradient to its bucket, and send the bucket when it is complete."""
        bucket.take(value, 1 / comm.size())  # small before the sum: half precision ends at 65504
        if bucket.came == self.passes * len(bucket.parameters):
            bucket.send(self.half)

    def wait(self) -> None:
        """Wait until all are summed; then each is its parameter's `grad`. RuntimeError: some parameter had none."""
        for bucket in self.buckets:
            if bucket.sum is None:
                raise RuntimeError(
                    f"not every parameter of the bucket of {bucket.name} has a gradient"
                )
            bucket.receive()

    def norm(self) -> torch.Tensor:
        """The norm of all gradients together, once they are summed."""
        return torch.stack(torch._foreach_norm([bucket.flat for bucket in self.buckets])).norm()

    def beyond(self) -> list[str]:
        """Names of the parameters whose gradients have a norm that is not finite, in the order of the backward pass."""
        named = [pair for bucket in self.buckets for pair in bucket.named.items()]
        return [
            name
            for name, value in named
            if value.grad is not None and not value.grad.norm().isfinite()
        ]


def parts(named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    """Split parameters, in their order, wherever a part has reached SHARE of all values."""
    full = SHARE * sum(value.numel() for _, value in named)
    found: list[list[tuple[str, nn.Parameter]]] = [[]]
    held = 0
    for pair in named:
        if held >= full:
            found.append([])
            held = 0
        found[-1].append(pair)
        held += pair[1].numel()
    return found
