"""Batch norm over the images of all workers, with a collective for each layer, pass and direction.

Forward, each worker sends (count, sum, sum of squares) and gets the statistics of the total batch.
Backward, it sends the sums of dy and of dy * x_hat (arXiv 1502.03167, section 3). A collective has
the name of its layer and direction. The passes of a step follow one another, so no two collectives
of the same name overlap. Sums are in float64, and timing cannot change their order.

x: the input. y: the output. x_hat: the normalised input. dx, dy: gradients of x and y.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from job.cluster import comm


class TotalNorm(torch.autograd.Function):
    """Normalise this worker's maps by the statistics of the total batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        name: str,
    ) -> tuple:
        """Return normalised maps like x (b, C, ...), and statistics of the total batch in float64.

        The statistics are the mean (C,), the biased variance (C,), and the count of values (1,).
        """
        C = x.shape[1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        unused = x.new_zeros(C, dtype=dtype)  # sets the dtype of the moments
        moments = torch.batch_norm_update_stats(x, unused, unused, 0.0)
        mean, variance = (value.double() for value in moments)  # (C,) each, of this worker
        averages = torch.cat([torch.ones_like(mean[:1]), mean, variance + mean.square()])
        sums = comm.total(averages * (x.numel() // C), f"norm.{name}")
        count, total, squares = sums.split([1, C, C])
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        ctx.save_for_backward(x, weight, mean.to(dtype), variance.to(dtype), count)
        ctx.eps, ctx.name = eps, name
        y = F.batch_norm(x, mean.to(dtype), variance.to(dtype), weight, bias, eps=eps)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple:
        """Return the gradients of x, like x, and this worker's of weight and bias, (C,) each."""
        x, weight, mean, variance, count = ctx.saved_tensors
        unit = torch.ones_like(mean)
        _, own_xhat, own = torch.ops.aten.native_batch_norm_backward(
            dy, x, unit, mean, variance, None, None, False, ctx.eps, [False, True, True]
        )  # (C,) each: sums of dy * x_hat and of dy
        sums = comm.total(torch.cat([own, own_xhat]).double(), f"norm.{ctx.name}.backward")
        shape = (1, -1, *(1,) * (x.ndim - 2))
        mean_dy, mean_xhat = ((each / count).to(mean).view(shape) for each in sums.chunk(2))
        scale = (variance + ctx.eps).rsqrt() * (unit if weight is None else weight)
        xhat = F.batch_norm(x, mean, variance, eps=ctx.eps)
        dx = (dy - mean_dy - xhat * mean_xhat) * scale.view(shape)
        affine = (None, None) if weight is None else (own_xhat, own)
        return dx.to(x.dtype), *affine, None, None


class SynchronisedNorm(_BatchNorm):
    """A batch norm with the statistics of the total batch in train mode.

    norm: the batch norm to replace, whose tensors and layers it has under the same names.
    name: of its collectives.
    """

    def __init__(self, norm: _BatchNorm, name: str):
        assert norm.momentum is not None and norm.track_running_stats
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.weight, self.bias = norm.weight, norm.bias
        for buffer, value in norm.named_buffers(recurse=False):
            self.register_buffer(buffer, value)
        for child, module in norm.named_children():  # timm's norms include their activation
            self.add_module(child, module)
        self.training, self.name = norm.training, name

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Accept any number of dimensions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return normalised maps like x (b, C, ...). A collective in train mode."""
        if not self.training:
            return self.after(super().forward(x))
        y, mean, variance, count = TotalNorm.apply(x, self.weight, self.bias, self.eps, self.name)
        unbiased = variance * count / (count - 1)
        momentum = self.momentum or 0.0
        with torch.no_grad():
            self.get_buffer("num_batches_tracked").add_(1)
            for buffer, value in (("running_mean", mean), ("running_var", unbiased)):
                running = self.get_buffer(buffer)
                running.lerp_(value.to(running), momentum)
        return self.after(y)

    def after(self, y: torch.Tensor) -> torch.Tensor:
        """Return normalised maps after the layers that the norm includes."""
        for module in self.children():
            y = module(y)
        return y


def synchronise(net: nn.Module, under: Iterable[str] = ("",)) -> None:
    """Replace the batch norms of `net` whose names begin with one of `under`, in place.

    With one worker they stay.
    """
    if comm.size() == 1:
        return
    for name, norm in list(net.named_modules()):
        if isinstance(norm, _BatchNorm) and name.startswith(tuple(under)):
            net.set_submodule(name, SynchronisedNorm(norm, name))
