"""Running statistics: each worker has its own in training, and checkpoints have the average."""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from job.cluster import comm
from job.engine.sync_norm import SynchronisedNorm

OWN = ("running_mean", "running_var")


def own_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's running means and variances by name, except those of synchronised norms.

    They are in the order of the model's state.
    """
    modules = dict(model.named_modules())
    own = {}
    for name, value in model.named_buffers():
        norm, _, last = name.rpartition(".")
        if last in OWN and not isinstance(modules[norm], SynchronisedNorm):
            own[name] = value
    return own


def gather(model: nn.Module) -> torch.Tensor:
    """Return the running statistics of all workers, a row each, (N, D). A collective."""
    if not (own := own_statistics(model)):
        return torch.zeros(comm.size(), 0)
    flat = torch.cat([buffer.flatten() for buffer in own.values()])
    return comm.gather(flat[None], "statistics")


def load(model: nn.Module, flat: torch.Tensor) -> None:
    """Set a model's running statistics, (D,), in the order of `gather`."""
    buffers = list(own_statistics(model).values())
    for buffer, values in zip(
        buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True
    ):
        buffer.copy_(values.view_as(buffer))


def average(model: nn.Module) -> None:
    """Set the running statistics to their average over the workers. A collective."""
    load(model, gather(model).mean(0))


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """Return a copy whose batch norms in eval mode use the statistics of the batch."""
    copied = copy.deepcopy(model)
    for norm in copied.modules():
        if isinstance(norm, _BatchNorm):
            norm.running_mean = norm.running_var = None
    return copied
