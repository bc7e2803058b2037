"""Sums of a step's scalars over all workers, in one collective."""

from collections.abc import Mapping

import torch

from job.cluster import comm
from moco.copies import to_device


def totals(values: Mapping[str, torch.Tensor | float], device: torch.device) -> dict[str, float]:
    """Return the sums of `values` over all workers. A collective.

    values: at least one; numbers, and tensors () on `device` or the CPU. A worker without images
    can have a number for another worker's tensor.
    All are summed on the device, for which the host waits only once.
    """
    numbers = torch.stack([on(device, value) for value in values.values()])
    sums = comm.to_host(comm.total(numbers, "total"), "total")
    return dict(zip(values, sums.tolist(), strict=True))


def on(device: torch.device, value: torch.Tensor | float) -> torch.Tensor:
    """Return a number on a device, () float64, without a wait for the device."""
    if not torch.is_tensor(value):
        return torch.full((), value, dtype=torch.float64, device=device)
    number = value.detach().double()
    return number if number.device == device else to_device(number, device)
