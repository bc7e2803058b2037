"""Heads, from a backbone's pooled features (b, C) to outputs (b, dim)."""

import re
from collections.abc import Mapping

import torch
from torch import nn


def build_mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return a head of MoCo v2's kind, (b, inputs) -> (b, outputs)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def hidden_layer(inputs: int, outputs: int, bias: bool = True) -> list[nn.Module]:
    """Return a hidden layer of a head, with batch norm, (b, inputs) -> (b, outputs)."""
    return [nn.Linear(inputs, outputs, bias), nn.BatchNorm1d(outputs), nn.ReLU()]


def build_head(state: Mapping[str, torch.Tensor]) -> nn.Sequential:
    """Return the head of a checkpoint, (b, inputs) -> (b, outputs), in eval mode.

    state: tensors by names such as "weight" of a linear layer, or "0.weight" of a linear layer or
    batch norm of a sequence. A number without tensors is a ReLU. ValueError: another type of head.
    """
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        match = re.fullmatch(r"(?:(?:layers\.)?([0-9]{1,2})\.)?([a-z_]+)", name)
        if not match or value.is_meta or value.layout != torch.strided:
            raise ValueError(f"{name} belongs to no linear layer or batch norm")
        if not value.is_floating_point() and match[2] != "num_batches_tracked":
            raise ValueError(f"{name} is {value.dtype}, expected floats")
        if value.is_floating_point() and not value.float().isfinite().all():
            raise ValueError(f"{name} has values that are not finite")
        layers.setdefault(int(match[1] or 0), {})[match[2]] = value
    try:
        return nn.Sequential(*map(build_layer, map(layers.get, range(max(layers) + 1)))).eval()
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[-1].strip()) from None


def build_layer(state: Mapping[str, torch.Tensor] | None) -> nn.Module:
    """Return a layer of a head with its tensors. RuntimeError: they are of another layer."""
    if state is None:
        return nn.ReLU()
    weight, bias, mean = map(state.get, ("weight", "bias", "running_mean"))
    layer: nn.Module
    if mean is not None:
        layer = nn.BatchNorm1d(mean.numel(), affine=weight is not None)
    elif weight is not None and weight.ndim == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    else:
        raise RuntimeError(f"{', '.join(state)} belong to no linear layer or batch norm")
    layer.load_state_dict(state)
    return layer
