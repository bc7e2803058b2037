"""The sums of a step's scalars over all workers."""

from collections.abc import Mapping

import torch

from job.cluster import comm
from moco.copies import to_device


def totals(values: Mapping[str, torch.Tensor | float], device: torch.device) -> dict[str, float]:
    """Return the sums of `values` over all workers. A collective.

    values: numbers, and tensors () on `device` or the CPU, at least one.
    One collective sums all of them on the device, and the host waits for the device once.
    """
    numbers = {name: torch.as_tensor(value, dtype=torch.float64).detach() for name, value in values.items()}
    on_device = {name: value for name, value in numbers.items() if value.device == device}
    others = {name: value for name, value in numbers.items() if name not in on_device}
    parts = [torch.stack([*on_device.values()])] if on_device else []
    parts += [to_device(torch.stack([*others.values()]), device)] if others else []
    sums = comm.to_host(comm.total(torch.cat(parts), "total"), "total")
    found = dict(zip([*on_device, *others], sums.tolist(), strict=True))
    return {name: found[name] for name in values}
