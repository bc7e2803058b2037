"""Batch norm's running statistics: each worker's own while training, one average for all others to see."""

import torch
from torch import nn

from job.cluster import comm

OWN = ("running_mean", "running_var")  # what the names of a worker's own buffers end with


def running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """The running means and variances of a model, in the order of its state."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith(OWN)]


def gather(model: nn.Module) -> torch.Tensor:
    """Return every worker's running statistics, one row a worker: (N, D). A collective: all workers call it."""
    flat = torch.cat([buffer.flatten() for buffer in running_statistics(model)])
    return comm.gather(flat[None], "statistics")


def load(model: nn.Module, flat: torch.Tensor) -> None:
    """Set the running statistics of a model from a row (D,) of `gather`."""
    buffers = running_statistics(model)
    for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))


def average(model: nn.Module) -> None:
    """Give all workers the average of their running statistics. A collective: all workers call it."""
    load(model, gather(model).mean(0))
