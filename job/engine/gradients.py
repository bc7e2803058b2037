"""Gradients, averaged over the workers during the backward pass, in an order without timing.

Horovod's own optimizer fuses the gradients that happen to be ready, and a ring adds in an order
that depends on a value's offset in the fused buffer. So with four or more workers, the same run
ends with other bytes each time. Here each gradient has a fixed offset in one of a few contiguous
buckets, which Horovod sums in place, without copies. A gradient has its parameter's strides, which
are channels last in convolutions of images if the network supports that.
"""

import functools
from collections.abc import Iterable

import torch
from torch import nn

from job.cluster import comm

# A bucket is full with this fraction of all values. No computation hides the last sum, so the last
# bucket must be small.
FRACTION = 1 / 8


class Bucket:
    """The gradients of some parameters in one contiguous tensor, for one step."""

    def __init__(self, named: list[tuple[str, nn.Parameter]]):
        self.name = named[0][0]  # of the parameter that comes first in the backward pass
        self.named = dict(named)
        self.parameters = list(self.named.values())
        self.clear()

    def clear(self) -> None:
        """Release the bucket so that the forward passes can use its memory."""
        self.added = 0  # gradients, of all backward passes of a step
        self.flat = self.sent = torch.empty(0)
        self.views: dict[nn.Parameter, torch.Tensor] = {}  # of flat, by parameter
        self.sum: comm.Pending | None = None
        for value in self.parameters:
            value.grad = None

    def add(self, value: nn.Parameter, scale: float) -> None:
        """Add `scale` times a parameter's gradient, and release the gradient's memory."""
        assert value.grad is not None
        if not self.views:
            sizes = [value.numel() for value in self.parameters]
            self.flat = value.grad.new_empty(sum(sizes))
            pairs = zip(self.parameters, self.flat.split(sizes), strict=True)
            self.views = {
                value: view.as_strided(value.shape, value.stride()) for value, view in pairs
            }
        if self.added < len(self.parameters):  # the first backward pass of a step
            torch.mul(value.grad, scale, out=self.views[value])
        else:
            self.views[value].add_(value.grad, alpha=scale)
        value.grad = None
        self.added += 1

    def send(self, half: bool) -> None:
        """Start the sum over the workers. half: in half precision."""
        self.sent = self.flat.half() if half else self.flat
        self.sum = comm.begin_sum_(self.sent, f"gradients.{self.name}")

    def receive(self) -> None:
        """Wait for the sum, and set each parameter's `grad`."""
        assert self.sum
        comm.wait(self.sum)
        if self.sent is not self.flat:
            self.flat.copy_(self.sent)
        for value, view in self.views.items():
            value.grad = view


class Gradients:
    """Gradients, averaged over the workers.

    named: pairs (name, parameter). passes: backward passes of a step, whose gradients are added.
    half: whether the sum over the workers is in half precision.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], passes: int = 1, half: bool = False
    ):
        self.passes, self.half = passes, half
        # Reversed, because a backward pass computes the last gradients first.
        self.buckets = [Bucket(pairs) for pairs in split(list(named)[::-1])]
        for bucket in self.buckets:
            for value in bucket.parameters:
                value.register_post_accumulate_grad_hook(functools.partial(self.add, bucket))

    def clear(self) -> None:
        """Start a step, without gradients."""
        for bucket in self.buckets:
            bucket.clear()

    def add(self, bucket: Bucket, value: nn.Parameter) -> None:
        """Add a parameter's gradient to its bucket, and send the bucket when it is complete."""
        # Divided before the sum, because half precision ends at 65504.
        bucket.add(value, 1 / comm.size())
        if bucket.added == self.passes * len(bucket.parameters):
            bucket.send(self.half)

    def wait(self) -> None:
        """Wait for all sums, and set each parameter's `grad`.

        RuntimeError: a parameter has no gradient.
        """
        for bucket in self.buckets:
            if bucket.sum is None:
                raise RuntimeError(f"a parameter in the bucket of {bucket.name} has no gradient")
            bucket.receive()

    def norm(self) -> torch.Tensor:
        """Return the norm of all summed gradients together, ()."""
        return torch.stack(torch._foreach_norm([bucket.flat for bucket in self.buckets])).norm()

    def not_finite(self) -> list[str]:
        """Return the parameters with gradients that are not finite, last layer first."""
        named = [pair for bucket in self.buckets for pair in bucket.named.items()]
        return [
            name
            for name, value in named
            if value.grad is not None and not value.grad.norm().isfinite()
        ]


def split(named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    """Split parameters, in their order, after each FRACTION of all values."""
    full = FRACTION * sum(value.numel() for _, value in named)
    buckets: list[list[tuple[str, nn.Parameter]]] = [[]]
    size = 0
    for pair in named:
        if size >= full:
            buckets.append([])
            size = 0
        buckets[-1].append(pair)
        size += pair[1].numel()
    return buckets
